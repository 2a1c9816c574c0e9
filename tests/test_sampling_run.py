"""Prompts, extraction, and a benchmark's samples as a file that survives anything."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks, examples
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.model import checkpoint, llada
from treediff.runs import open_run
from treediff.sampling import decode, diffusion
from treediff.sampling.decode import NEVER, Decoding
from treediff.sampling.prompts import RESPONSE, Prompt, answer_text, extract, prompt_ids
from treediff.sampling.run import _made, read_samples, samples_path, settings
from treediff.training import launch


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("<think>\na\n</think>\n\n```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
        ("Here:\n```\nx = 1\n```\nor\n```python\ny = 2\n```", "x = 1"),
        ("x = 1\n", "x = 1"),
        ("<think>```python\nno\n```</think>\n```py\nyes = 1\n```", "yes = 1"),
        ("<think>\nnever closed\n```python\nx = 1\n```", "x = 1"),
        ("Sure! Below it is.\n\n```Python3\nx = 1\n\n\ny = 2\n```\nHope this helps!", "x = 1\n\n\ny = 2"),
        ("~~~python\nx = 1\n~~~\nprose", "x = 1"),
        ("~~~\ns = '```'\n~~~", "s = '```'"),
        ("````md\n```\nx = 1\n````", "```\nx = 1"),
        ("1. First:\n\n   ```python\n   def f():\n       return 1\n   ```\n", "def f():\n    return 1"),
        ('```python\ns = """\na ``` b\n"""\n```', 's = """\na ``` b\n"""'),
        ("The code: ```python\nx = 1```", "x = 1"),
        ("```python\nx = 1```", "x = 1"),
        ("    x = 1\n    y = 2", "    x = 1\n    y = 2"),
        ("```\n```", ""),
        ("", ""),
        ("```python title=a.py\r\nx = 1\r\n```", "x = 1\r"),
    ],
)
def test_first_fence(answer, program):
    assert extract(answer, "solve", "first_fence") == program


@pytest.mark.parametrize(
    "answer",
    [
        "Sure:\n```python\ndef solve(n):\n    return n\n```\nIt works.",
        "<think>\nhm\n</think>\n```python\ndef helper():\n    pass\n\ndef solve(n):\n    return n\n```",
        "def solve(n):\n    return n",
        "```python\ndef solve(n):\n    return n",
    ],
)
def test_sanitize_keeps_what_defines_the_entry_point(answer):
    space = {}
    exec(extract(answer, "solve", "sanitize"), space)
    assert space["solve"](3) == 3


def tiny_tokenizer(folder):
    tokens.train_tokenizer(["def solve(n):\n    return n\n"], 300, folder)
    return tokens.load_tokenizer(str(folder))


def test_prompt_styles(tmp_path):
    tok = tiny_tokenizer(tmp_path / "t")

    def text(**switches):
        ids, begin = prompt_ids(resolve("tiny", **switches), tok, "  Add one.\n")
        return b"".join(tokens.byte_table(tok).spelling[i] for i in ids).decode(), begin

    bare, begin = text(prompt_style="bare")
    assert "Add one." in bare
    assert examples.INSTRUCTION not in bare
    assert begin == ""
    instruct, _ = text(prompt_style="instruct")
    assert f"{examples.INSTRUCTION}\n```\nAdd one.\n```" in instruct
    filled, begin = text(prompt_style="prefill", think="closed")
    assert begin == f"<think>\n\n</think>\n\n{RESPONSE}\n```python\n"
    assert filled == instruct + begin


def test_an_answer_ends_at_its_first_end(tmp_path):
    tok = tiny_tokenizer(tmp_path / "t")
    ids, _ = tokens.tokenize(tok, "return n")
    for end in tokens.endings(tok):
        assert answer_text(tok, [*ids.tolist(), end, *ids.tolist()]) == "return n"


def test_a_sample_s_random_numbers_have_a_name_of_their_own():
    uids = {Prompt(f"HumanEval/{i}", k, "", [], "").uid for i in range(164) for k in range(256)}
    assert len(uids) == 164 * 256
    assert max(uids) < 2**36
    with pytest.raises(UserError, match="samples_per_task"):
        resolve("tiny", samples_per_task=2)


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(runs, tmp_path):
    """A finished backbone run with random weights, small and slow enough to be killed in the middle."""
    cfg = resolve("tiny", masking="none", d_model=32, n_layers=1, n_heads=2, mlp_hidden=48, limit=12, lengths=[32])
    cfg = cfg.but(block_length=32, sample_batch=2, early_exit=False)
    folder = tokens_of(cfg, tmp_path)
    cfg = cfg.but(tokenizer=str(folder))
    tok = tokens.load_tokenizer(str(folder))
    net = llada.new_backbone(cfg, len(tok), tok.eos_token_id, tok.mask_token_id)

    open_run(cfg, *launch.TRAINING_STAGES)
    checkpoint.save_backbone(net, cfg.run_dir / "model")
    return cfg


def tokens_of(cfg, tmp_path):
    tiny_tokenizer(tmp_path / "tok")
    return tmp_path / "tok"


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_samples_carry_their_settings_and_come_in_the_benchmark_s_order(run):
    path = pipeline.sampled(run, "tinycode", 32)
    records = lines(path)
    assert [r["task_id"] for r in records] == list(benchmarks.benchmark_problems(run, "tinycode"))
    for r in records:
        assert r["settings"] == settings(run, 32)
        assert len(r["ids"]) == len(r["committed_at"]) == len(r["confidence"]) == 32
        assert sorted(r["committed_at"]) == list(range(32))
        assert (r["margin"] is None) == (r["margin_at"] == NEVER)
    for name in ("prompt_style", "extract", "think", "threshold", "cache", "guidance", "remasking", "eos_suppression"):
        assert name in records[0]["settings"]
    assert not list(path.parent.glob(".*"))
    before = path.stat().st_mtime_ns
    assert pipeline.sampled(run, "tinycode", 32).stat().st_mtime_ns == before
    provenance = json.loads(path.with_suffix(".provenance.json").read_text())
    assert provenance["settings"] == settings(run, 32)


def test_other_settings_are_refused(run):
    path = pipeline.sampled(run, "tinycode", 32)
    with pytest.raises(UserError, match=rf"{path}: sampled with threshold = 0.0, not 0.9"):
        pipeline.sampled(run.but(threshold=0.9), "tinycode", 32)


def test_two_decodings_of_one_run_stand_side_by_side(run):
    exact = pipeline.scored(run, "tinycode", 32)
    before = {p: p.read_bytes() for p in (samples_path(run, "tinycode", 32), exact)}
    with pytest.raises(UserError, match="name these switches by --as"):
        pipeline.sampled(run.but(threshold=0.9), "tinycode", 32)
    fast = run.but(threshold=0.9, decoding="fast")
    path = pipeline.scored(fast, "tinycode", 32)
    assert path == exact.with_name("tinycode-T32-fast.json")
    assert {p: p.read_bytes() for p in before} == before
    assert json.loads(path.read_text())["settings"]["decoding"] == "fast"
    assert "decoding" not in json.loads(exact.read_text())["settings"]
    of = lines(samples_path(fast, "tinycode", 32))[0]["settings"]
    assert (of["decoding"], of["threshold"]) == ("fast", 0.9)
    with pytest.raises(UserError, match=r"sampled with threshold = 0\.9, not 0\.5"):  # one name, one set of switches
        pipeline.sampled(fast.but(threshold=0.5), "tinycode", 32)


def test_a_damaged_file_is_named(run):
    path = pipeline.sampled(run, "tinycode", 32)
    for damage in ("{", "[]", '{"task_id": 1}'):
        path.write_text(path.read_text() + damage + "\n")
        with pytest.raises(UserError, match=rf"{path}: this file holds a line that is no sample"):
            pipeline.sampled(run, "tinycode", 32)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def test_more_tasks_and_more_samples_go_on_from_what_is_there(run):
    warm = run.but(temperature=0.7)
    path = pipeline.sampled(warm.but(limit=4), "tinycode", 32)
    few = {r["task_id"]: r["ids"] for r in lines(path)}
    pipeline.sampled(warm.but(samples_per_task=3), "tinycode", 32)
    records = lines(path)
    keys = [(r["task_id"], r.get("sample", 0)) for r in records]
    wanted = [(t, k) for t in benchmarks.benchmark_problems(run, "tinycode") for k in range(3)]
    assert sorted(keys) == sorted({*wanted, *((t, 0) for t in few)})  # each once; what was there stays
    assert all(r["ids"] == few[r["task_id"]] for r in records if r["task_id"] in few and not r.get("sample"))
    assert any(a["ids"] != b["ids"] for a, b in itertools.pairwise(records))
    assert set(read_samples(path)) == {t for t, _ in keys}
    assert all(not r.get("sample") for r in read_samples(path).values())


def test_an_answer_does_not_depend_on_the_batch(run):
    warm = run.but(temperature=0.7, sample_batch=5)
    path = pipeline.sampled(warm, "tinycode", 32)
    first = {r["task_id"]: r for r in lines(path)}
    path.unlink()
    pipeline.sampled(warm.but(sample_batch=1), "tinycode", 32)
    clear = [r for r in lines(path) if r["margin"] > 1e-4]  # the others' order hangs on rounding, as they say
    assert len(clear) > 6
    assert all(r["ids"] == first[r["task_id"]]["ids"] for r in clear)


def test_short_memory_halves_the_batch(run, monkeypatch):
    real, sizes = decode.decode, []

    def limited(net, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError
        return real(net, prompts, *rest)

    monkeypatch.setattr(decode, "decode", limited)
    assert len(lines(pipeline.sampled(run.but(sample_batch=8), "tinycode", 32))) == 12
    assert sizes[:3] == [8, 4, 2]


def test_memory_is_freed_before_a_smaller_batch_is_tried(run, monkeypatch):
    """The failed call's tensors hang on its exception: nothing of them may live when the next call begins."""
    real, kept, alive = decode.decode, [], []

    def limited(net, prompts, *rest):
        alive.append([ref() is not None for ref in kept])
        if len(prompts) > 2:
            big = torch.zeros(1000)
            kept.append(weakref.ref(big))
            raise torch.OutOfMemoryError
        return real(net, prompts, *rest)

    monkeypatch.setattr(decode, "decode", limited)
    pipeline.sampled(run.but(sample_batch=8), "tinycode", 32)
    assert len(kept) == 4  # 12 prompts by 8 and 4: of 8, of its two halves, and of the 4
    assert not any(x for seen in alive for x in seen)


def test_one_load_serves_all_lengths_and_benchmarks(run, monkeypatch):
    loads = []
    real = diffusion.load_run
    monkeypatch.setattr(diffusion, "load_run", lambda cfg: loads.append(1) or real(cfg))
    both = run.but(lengths=[32, 64], limit=3)
    paths = pipeline.all_sampled(both)
    assert list(paths) == [("tinycode", 32), ("tinycode", 64)]
    assert [len(lines(p)[0]["ids"]) for p in paths.values()] == [32, 64]
    assert len(loads) == 1
    assert pipeline.all_sampled(both) == paths
    assert len(loads) == 1


def test_on_a_gpu_samples_are_made_in_a_process_of_its_own(run, monkeypatch):
    """So that the memory is free when it ends: a notebook's kernel would keep it."""
    started = []
    real = launch.sampling
    monkeypatch.setattr(launch, "sampling", lambda *a: started.append(a[1:3]) or real(*a))
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda i=0: "a GPU")
        pipeline.all_sampled(run.but(lengths=[32, 64], limit=2))
    assert started == [([("tinycode", 32), ("tinycode", 64)], 1)]


def test_cudnn_is_off_while_sampling(run, monkeypatch):
    flags = []
    real = decode.exactly
    monkeypatch.setattr(decode, "exactly", lambda r: flags.append(torch.backends.cuda.cudnn_sdp_enabled()) or real(r))
    pipeline.sampled(run.but(limit=1), "tinycode", 32)
    assert flags == [False]


def test_rows_that_fit():
    how = Decoding(126336, (126081,), 512, 512, 32)
    shape = SimpleNamespace(
        hidden_size=4096,
        num_key_value_heads=32,
        num_attention_heads=32,
        intermediate_size=12288,
        num_hidden_layers=32,
        vocab_size=126464,
    )
    free = 60 * 2**30  # an A100 of 80 GB beside the weights
    rows = diffusion.rows_that_fit(shape, how, 400, free)
    assert 100 < rows < 2000
    cached = Decoding(126336, (126081,), 512, 512, 32, cache="dual")
    assert 50 < diffusion.rows_that_fit(shape, cached, 400, free) < rows
    assert diffusion.rows_that_fit(shape, cached, 400, 10**9) == 1


COMMAND = [sys.executable, "-m", "treediff.sampling.run"]


def start(cfg, rank, world):
    task = json.dumps({"switches": cfg.as_dict(), "jobs": [["tinycode", 32]]})
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*COMMAND, task], env=env, stderr=subprocess.DEVNULL, start_new_session=True)


def discrete(text: str) -> list[dict]:
    """The records without what the last bits of a float decide: those differ with the batch a prompt stands in."""
    records = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in r.items() if k not in ("confidence", "margin", "margin_at")} for r in records]


def test_killed_processes_lose_and_double_nothing_whatever_their_number(run):
    """kill -9 in the middle, twice, with other numbers of processes; the result is that of one undisturbed process."""
    # Alone, an answer is the same to the last bit; with so many, none of the processes is done before it is killed.
    run = run.but(sample_batch=1, limit=90)
    path = samples_path(run, "tinycode", 32)
    want = pipeline.sampled(run, "tinycode", 32).read_text()
    path.unlink()
    mine = settings(run, 32)
    for world, enough in ((2, 2), (3, 6)):
        processes = [start(run, rank, world) for rank in range(world)]
        try:
            begin = time.monotonic()
            while len(_made(path, mine)) < enough and time.monotonic() - begin < 100:
                assert any(p.poll() is None for p in processes)
                time.sleep(0.005)
        finally:
            for p in processes:
                with suppress(ProcessLookupError):
                    os.killpg(p.pid, signal.SIGKILL)
                p.wait()
        made = _made(path, mine)
        assert enough <= len(made)
        # As if the kill had come in the middle of a line.
        part = random.choice(list(path.parent.glob(".*.part")))
        with part.open("ab") as file:
            file.write(next(iter(made.values()))[:40])
    assert not path.exists()
    pipeline.sampled(run, "tinycode", 32)
    assert discrete(path.read_text()) == discrete(want)
    assert not list(path.parent.glob(".*"))


def test_several_processes_through_the_launcher(run):
    run = run.but(sample_batch=1)  # alone, an answer is the same to the last bit
    path = samples_path(run, "tinycode", 32)
    want = pipeline.sampled(run, "tinycode", 32).read_text()
    path.unlink()
    pipeline.sampled(run.but(sample_processes=2), "tinycode", 32)
    assert path.read_text() == want
    assert "(2 of 2)" in (run.run_dir / "sample.log").read_text()


def test_a_process_that_fails_says_why(run):
    (run.run_dir / "model" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"rank\d: .*model.safetensors: damaged or cut short"):
        pipeline.sampled(run.but(sample_processes=2), "tinycode", 32)


def test_under_a_launcher_nothing_is_trained(runs, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="not trained yet"):
        pipeline.sampled(resolve("tiny", masking="none"), "tinycode", 64)
