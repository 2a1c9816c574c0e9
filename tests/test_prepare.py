"""Rows to a data set: what is counted, chosen and written, and that neither kills nor processes can change it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treediff import pipeline
from treediff.config import resolve
from treediff.data import examples, prepare, sources
from treediff.errors import UserError
from treediff.files import read_jsonl
from treediff.masking import tiers, tokens

GOOD = "<think>\nAdd them.\n</think>\n\nHere it is:\n```python\ndef f(a, b):\n    return a + b\n```\nDone."


def row(output=GOOD, **more):
    return {"id": "1", "input": "Add two numbers.", "output": output, **more}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([GOOD, "user assistant Add two numbers."], 400, folder)
    return tokens.load_tokenizer(str(folder))


def switches_of(path, tok, **switches):
    switches = {"rows": 0, "benchmarks": ["tinycode"], **switches}
    return resolve("paper", data=str(path), tokenizer=tok.name_or_path, **switches)


def test_prepare_counts_and_reopens(tok, runs, tmp_path):
    rows = [row(), row("<think>a</think> words"), row(GOOD.replace("a + b", "a - b")), row("x")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = switches_of(tmp_path / "d.jsonl", tok)
    stats = pipeline.statistics(cfg)
    assert stats["rows"] == {
        "read": 4,
        "dropped": {"no code block": 1, "no <think>": 1},
        "usable": 2,
        "not_chosen": 0,
        "kept": 2,
    }
    data = prepare.prepare(cfg)
    assert sum(stats["tokens"].values()) == sum(len(x) for x in data["input_ids"])
    assert len(set(data["uid"][:].tolist())) == 2
    import datasets

    assert datasets.load_from_disk(str(prepare.data_folder(cfg))).num_rows == 2
    assert prepare.data_fingerprint(cfg.but(max_length=999)) != prepare.data_fingerprint(cfg)
    (tmp_path / "d.jsonl").write_text(json.dumps(row()) + "\n")
    assert pipeline.statistics(cfg)["rows"]["kept"] == 1  # a changed file is another data set


def test_a_folder_of_another_data_set_is_refused(tok, runs, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row()) + "\n")
    cfg = switches_of(tmp_path / "d.jsonl", tok)
    prepare.prepare(cfg, tmp_path / "out")
    prepare.prepare(cfg, tmp_path / "out")
    with pytest.raises(UserError, match="made from other data or switches"):
        prepare.prepare(cfg.but(max_length=999), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        prepare.prepare(cfg, tmp_path / "mine")


def test_parquet_is_read_like_jsonl(tok, runs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row(), row("x")]), tmp_path / "d.parquet")
    assert pipeline.statistics(switches_of(tmp_path / "d.parquet", tok))["rows"]["kept"] == 1


def test_a_hub_data_set_is_streamed(tok, runs, tmp_path):
    """A folder in the hub's form, read by the code that reads the hub."""
    folder = tmp_path / "hub"
    folder.mkdir()
    files = "- config_name: split_0\n  data_files:\n  - split: split_0\n    path: '*.jsonl'\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    data = many(folder / "d.jsonl", 30)
    cfg = switches_of(folder, tok)
    assert pipeline.statistics(cfg)["rows"]["kept"] == 28
    want = prepare.prepare(cfg.but(data=str(data)))
    assert list(prepare.prepare(cfg)["id"][:]) == list(want["id"][:])
    with pytest.raises(UserError, match=r"data: .* no reachable data set"):
        prepare.prepare(cfg.but(data_split="split_7"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"id": 1}\nnot json\n', r"d\.jsonl, line 2: not valid JSON"),
        (b"[1]\n", r"d\.jsonl, line 1: not a JSON object"),
        (b'{"a": "\xff"}\n', r"d\.jsonl, line 1: not valid UTF-8"),
        (b"", "no row can be used"),
    ],
)
def test_bad_files_are_named(tok, runs, tmp_path, content, said):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare.prepare(switches_of(tmp_path / "d.jsonl", tok))
    assert not list(runs.rglob("*.arrow"))  # nothing half-made is left
    assert not list(runs.rglob("*.tmp"))


def test_a_missing_file_is_named(tok, runs, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        prepare.prepare(switches_of(tmp_path / "none.jsonl", tok))


def test_real_rows(shared, runs):
    data = shared / "data" / "think_code" / "can_ai_code_full.jsonl"
    tokenizer = str(shared / "tokenizers" / "llada_standin_8k")
    stats = pipeline.statistics(resolve("paper", data=str(data), tokenizer=tokenizer, rows=0))
    assert stats["rows"]["read"] == 120
    assert stats["rows"]["kept"] + sum(stats["rows"]["dropped"].values()) == 120
    assert stats["rows"]["kept"] >= 10
    adverse = shared / "data" / "think_code" / "can_ai_code_truncated_or_empty.jsonl"
    with pytest.raises(UserError, match=r"102 empty reasoning, 9 <think> never closed"):
        pipeline.statistics(resolve("paper", data=str(adverse), tokenizer=tokenizer, rows=0))


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_first_rows_are_chosen_and_nothing_is_read_behind_them(tok, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 4000)
    monkeypatch.setattr(prepare, "HELD_BACK", 5)
    path = many(tmp_path / "d.jsonl", 400)
    read = []
    real = sources.raw_rows
    monkeypatch.setattr(sources, "raw_rows", lambda cfg: (read.append(n) or (n, r) for n, r in real(cfg)))
    cfg = switches_of(path, tok, rows=20, choice="first", workers=1)
    data = prepare.prepare(cfg)
    assert len(read) < 100
    usable = prepare.prepare(switches_of(path, tok))["id"][:]
    assert list(data["id"][:]) == list(usable[5:25])
    rows = prepare.stats(cfg)["rows"]
    assert rows["kept"] == 20
    assert rows["not_chosen"] >= 5
    first = (prepare.data_folder(cfg) / "stats.json").read_text()
    shutil.rmtree(prepare.data_folder(cfg))
    del read[:]
    prepare.prepare(cfg)  # from the parts
    assert not read
    assert (prepare.data_folder(cfg) / "stats.json").read_text() == first
    shutil.rmtree(runs)
    prepare.prepare(cfg.but(workers=2))
    assert json.loads((prepare.data_folder(cfg) / "stats.json").read_text())["rows"] == rows


def test_the_first_rows_of_a_short_source_are_all_of_it(tok, runs, tmp_path):
    path = many(tmp_path / "d.jsonl", 30)
    every = prepare.prepare(switches_of(path, tok))["id"][:]
    got = prepare.prepare(switches_of(path, tok, rows=len(every) - 3, choice="first"))["id"][:]
    assert list(got) == list(every[3:])
    assert list(prepare.prepare(switches_of(path, tok, rows=500, choice="first"))["id"][:]) == list(every)


@given(st.sets(st.integers(0, 10**6), max_size=80), st.integers(0, 90), st.integers(0, 9))
def test_the_choice_is_a_seeded_subset_that_asks_nothing_but_the_numbers(numbers, rows, seed):
    numbers = np.array(sorted(numbers), np.int64)
    chosen = prepare.choice(numbers, rows, seed)
    assert len(chosen) == (min(rows, len(numbers)) if rows else len(numbers))
    assert (np.isin(chosen, numbers)).all()
    assert (np.diff(chosen) > 0).all()
    if 0 < len(chosen) < len(numbers):  # a row that is not chosen changes nothing by its absence
        assert (prepare.choice(chosen, rows, seed) == chosen).all()
        without = numbers[numbers != np.setdiff1d(numbers, chosen)[0]]
        assert (prepare.choice(without, rows, seed) == chosen).all()


def test_every_row_is_as_likely_as_another():
    numbers = np.arange(200)
    count = np.zeros(200)
    for seed in range(400):
        count[prepare.choice(numbers, 50, seed)] += 1
    assert abs(count.mean() - 100) < 1e-9
    assert (abs(count - 100) < 5 * np.sqrt(400 * 0.25 * 0.75)).all()


def many(path, n=300):
    """Rows of many lengths, a few of them useless or too long."""
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        for i in range(n):
            words = " ".join(rng.choice(["add", "them", "é", "😀", "two", "x=1"], int(rng.integers(1, 60))))
            output = GOOD.replace("Add them.", words).replace("a + b", f"a + b + {i}")
            broken = {7: "no tags", 11: "<think>a</think> words", 13: GOOD.replace("return", "return return (")}
            file.write(json.dumps(row(broken.get(i % 50, output), id=f"row {i}")) + "\n")
    return path


def contents(folder):
    """Everything in a data set's folder, byte for byte."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 4000)
    monkeypatch.setattr(prepare, "SHARD", 30_000)


def test_the_number_of_processes_changes_no_bit(tok, runs, tmp_path, small_chunks):
    data = many(tmp_path / "d.jsonl")
    cfg = switches_of(data, tok, rows=100, max_length=180)
    prepare.prepare(cfg.but(workers=1), tmp_path / "one")
    prepare.prepare(cfg.but(workers=2), tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.arrow"))) > 1
    assert not list(tmp_path.glob(".*.parts"))
    counts = pipeline.statistics(cfg, tmp_path / "one")["rows"]
    assert counts["read"] == 300 == sum(counts["dropped"].values()) + counts["usable"]
    assert counts["usable"] == counts["kept"] + counts["not_chosen"] > 150
    assert set(counts["dropped"]) == {"no <think>", "no code block", "longer than max_length"}
    assert counts["kept"] == 100


def test_the_chosen_rows_stand_as_encoded_and_the_statistics_count_them(tok, runs, tmp_path, small_chunks):
    """Against a plain loop over the rows."""
    data = many(tmp_path / "d.jsonl")
    cfg = switches_of(data, tok, rows=100, max_length=180, workers=1)
    made, stats = prepare.prepare(cfg), pipeline.statistics(cfg)
    want = {}
    for number, raw in enumerate(read_jsonl(data)):
        try:
            want[number] = examples.encode(cfg, tok, examples.example(raw))
        except examples.Dropped:
            continue
    chosen = prepare.choice(np.array(list(want)), 100, 0)
    assert list(made["id"][:]) == [want[n]["id"] for n in chosen]
    for got, n in zip(made, chosen, strict=True):
        assert got["uid"] == want[n]["uid"]
        assert all((got[k] == want[n][k]).all() for k in ("input_ids", "labels", "spans"))
    labels = [want[n]["labels"] for n in chosen]
    code = sum(int((x >= tokens.CODE).sum()) for x in labels)
    assert list(stats["tokens"].values()) == np.bincount(np.concatenate(labels), minlength=len(tokens.LABELS)).tolist()
    assert stats["default_share"] == round(sum(int((x == tokens.CODE).sum()) for x in labels) / code, 4)
    assert stats["rows_with_parse_errors"] == sum(want[n]["error_bytes"] > 0 for n in chosen) > 0
    assert 0 < stats["parse_error_byte_share"] < 0.5
    assert stats["longest"] == stats["length_deciles"]["sample"][10] == max(map(len, labels))
    for name, which in (("prompt", [0]), ("reasoning", [1]), ("code", range(2, 7))):
        lengths = sorted(int(np.isin(x, which).sum()) for x in labels)
        assert stats["length_deciles"][name][0] == lengths[0]
        assert stats["length_deciles"][name][5] == lengths[49]


def test_another_choice_of_rows_encodes_nothing_again(tok, runs, tmp_path, small_chunks, monkeypatch):
    data = many(tmp_path / "d.jsonl")
    cfg = switches_of(data, tok, rows=100, max_length=180, workers=1)
    first = set(prepare.prepare(cfg)["id"][:])
    other = cfg.but(rows=90, data_seed=1)
    prepare.prepare(other, tmp_path / "want")  # by itself
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "encode_part", None)
        patch.setattr(sources, "raw_rows", None)
        second = set(prepare.prepare(other)["id"][:])
    assert contents(prepare.data_folder(other)) == contents(tmp_path / "want")
    assert (len(first), len(second)) == (100, 90)
    assert 10 < len(first & second) < 80
    prepare.prepare(cfg.but(max_length=170))  # other samples have parts of their own
    assert len(list((runs / "paper" / "data" / "parts").glob("*/complete.json"))) == 2


# --- kills, full disks, other processes ------------------------------------------------------------------------------

START = """
import sys
from pathlib import Path
from treediff.config import resolve
from treediff.data import prepare
from treediff.errors import UserError
prepare.PART_BYTES, prepare.SHARD = 4000, 30_000
if __name__ == "__main__":
    if len(sys.argv) > 5:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[5]),) * 2)
    try:
        data, tokenizer, out, workers = sys.argv[1:5]
        cfg = resolve("paper", data=data, tokenizer=tokenizer, rows=100, max_length=180, workers=workers,
                      benchmarks=["tinycode"])
        prepare.prepare(cfg, Path(out))
    except UserError as e:
        sys.exit(str(e))
"""


def start(tmp_path, tok, workers, *limit):
    script = tmp_path / "start.py"
    script.write_text(START)
    args = [sys.executable, script, tmp_path / "d.jsonl", tok.name_or_path, tmp_path / "out", workers, *limit]
    return subprocess.Popen([str(a) for a in args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pids, seconds=20):
    until = time.monotonic() + seconds
    while alive := [p for p in pids if psutil.pid_exists(p) and psutil.Process(p).status() != "zombie"]:
        assert time.monotonic() < until, alive
        time.sleep(0.05)


def kill_when(process, due):
    """SIGKILL the process as soon as `due()` holds; its children must end by themselves."""
    while process.poll() is None and not due():
        time.sleep(0.002)
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.communicate()
    gone([p.pid for p in family])


def test_a_killed_call_goes_on_and_ends_bit_for_bit_like_an_unkilled_one(tok, runs, tmp_path, small_chunks):
    data = many(tmp_path / "d.jsonl")
    cfg = switches_of(data, tok, rows=100, max_length=180, workers=1)
    prepare.prepare(cfg, tmp_path / "want")
    for workers, parts in ((2, 3), (1, 8)):
        kill_when(start(tmp_path, tok, workers), lambda parts=parts: len(finished(tmp_path)) >= parts)
        assert not (tmp_path / "out").exists()
        assert len(finished(tmp_path)) >= parts
    before = {p: p.stat().st_mtime_ns for p in finished(tmp_path)}
    seen = []
    real = prepare.encode_part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "encode_part", lambda cfg, path, rows: seen.append(path) or real(cfg, path, rows))
        prepare.prepare(cfg, tmp_path / "out")
    assert seen
    assert not before.keys() & set(seen)  # what was there was used
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == {".out.lock", ".want.lock"}


def finished(tmp_path):
    return sorted((tmp_path / ".out.parts").glob("*/*.arrow"))


def test_a_kill_while_the_data_set_is_written_leaves_no_half_of_it(tok, runs, tmp_path, small_chunks):
    cfg = switches_of(many(tmp_path / "d.jsonl"), tok, rows=100, max_length=180, workers=1)
    kill_when(start(tmp_path, tok, 1), lambda: any(tmp_path.glob(".out.*.tmp")))
    prepare.prepare(cfg, tmp_path / "out")
    prepare.prepare(cfg, tmp_path / "want")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.slow
def test_kills_at_random_moments(tok, runs, tmp_path, small_chunks):
    data = many(tmp_path / "d.jsonl", 2000)
    cfg = switches_of(data, tok, rows=100, max_length=180, workers=1)
    prepare.prepare(cfg, tmp_path / "want")
    rng = np.random.default_rng()
    for kill in range(1000):
        until = time.monotonic() + rng.uniform(1, 7)
        process = start(tmp_path, tok, kill % 2 + 1)
        kill_when(process, lambda until=until: time.monotonic() > until)
        if process.returncode == 0:
            break
    assert kill > 1
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


@pytest.mark.parametrize(("limit", "kept"), [(2000, False), (20_000, True)])
def test_a_full_disk_is_said_and_leaves_only_whole_parts(tok, runs, tmp_path, small_chunks, limit, kept):
    """At 2,000 bytes no part can be written; at 20,000 every part can, but not the data set."""
    data = many(tmp_path / "d.jsonl")
    process = start(tmp_path, tok, 1, limit)
    said = process.communicate()[1]
    assert process.returncode == 1
    assert re.search(r"out: cannot be written \(.*File too large\); make room and call again", said)
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert bool(finished(tmp_path)) == kept
    cfg = switches_of(data, tok, rows=100, max_length=180, workers=1)
    prepare.prepare(cfg, tmp_path / "want")
    prepare.prepare(cfg, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "want")


def test_two_calls_at_once_make_it_once(tok, runs, tmp_path, small_chunks, monkeypatch):
    cfg = switches_of(many(tmp_path / "d.jsonl", 50), tok, workers=1)
    seen = []
    real = prepare.encode_part
    monkeypatch.setattr(prepare, "encode_part", lambda *job: seen.append(job[1].name) or real(*job))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(prepare.prepare, [cfg, cfg]))
    assert len(seen) == len(set(seen)) > 1
    assert found[0]["uid"][:].tolist() == found[1]["uid"][:].tolist()


def test_work_is_spread_in_order_and_a_process_that_dies_is_said(runs):
    cfg = resolve("tiny", workers=2)
    assert list(prepare.spread(cfg, pow, ((2, i) for i in range(20)))) == [2**i for i in range(20)]
    with pytest.raises(BrokenProcessPool):
        list(prepare.spread(cfg, os._exit, [(1,), (1,), (1,)]))


def test_a_dead_process_keeps_the_parts(tok, runs, tmp_path, small_chunks, monkeypatch):
    cfg = switches_of(many(tmp_path / "d.jsonl", 50), tok, workers=1)
    calls = iter(range(3))
    real = prepare.encode_part

    def dies(*job):
        if next(calls) == 2:
            raise BrokenProcessPool
        return real(*job)

    monkeypatch.setattr(prepare, "encode_part", dies)
    with pytest.raises(UserError, match="a process ended before its work did"):
        prepare.prepare(cfg, tmp_path / "out")
    assert len(finished(tmp_path)) == 2


# --- the fingerprint -------------------------------------------------------------------------------------------------


def test_the_fingerprint_covers_all_that_the_data_set_depends_on_and_nothing_else(tok, runs, tmp_path, monkeypatch):
    data = many(tmp_path / "d.jsonl", 3)
    shutil.copytree(tok.name_or_path, tmp_path / "tok")
    cfg = switches_of(data, tok).but(tokenizer=str(tmp_path / "tok"))

    def mark(**switches):
        prepare._tokenizer.cache_clear()
        return prepare.data_fingerprint(cfg.but(**switches))

    first = mark()
    same = {"workers": 3, "seed": 1, "masking": "random", "lr": 1.0, "benchmark_files": {"mbpp": "x"}}
    assert all(mark(**{k: v}) == first for k, v in same.items())
    assert mark(tokenizer=tok.name_or_path) == first  # the same one elsewhere
    others = {"max_length": 99, "rows": 5, "data_seed": 1, "span_nodes": "tiered", "token_owner": "max_weight"}
    others |= {"overlong": "trim_reasoning", "tier_owner": "keyword"}
    marks = [mark(**{k: v}) for k, v in others.items()]
    marks.append(mark(token_owner="max_weight", default_weight=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(tiers, "grammar_version", lambda language: "0.0.1")
        marks.append(mark())
    changed = tokens.load_tokenizer(str(tmp_path / "tok"))
    changed.chat_template = changed.chat_template.replace("assistant", "helper")
    changed.save_pretrained(tmp_path / "tok")
    marks.append(mark())
    with data.open("a") as file:
        file.write("\n")
    marks.append(mark())
    assert len({first, *marks}) == 1 + len(marks)
    few, more = (resolve("tiny", rows=n) for n in (5, 6))
    for run in (few, more):
        pipeline.tokenizer(run)
    assert prepare.data_fingerprint(few) != prepare.data_fingerprint(more)


def test_shares_made_apart_and_at_once_are_the_data_set_made_in_one_call(tok, runs, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", 400)
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row(GOOD.replace("a + b", f"a - {i}"))) + "\n" for i in range(40)))
    cfg = switches_of(path, tok, workers=1, rows=30)
    whole = prepare.prepare(cfg, tmp_path / "whole")
    for out in (None, tmp_path / "shared"):
        with ThreadPoolExecutor() as pool:
            made = set(pool.map(lambda k, out=out: prepare.encode_share(cfg, k, 3, out), range(3)))
        assert len(made) == 1
        assert len(list(made.pop().glob("*.arrow"))) > 6
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "encode_part", lambda *_: pytest.fail("a part was made twice"))
            data = prepare.prepare(cfg, out)
        assert data["uid"][:].tolist() == whole["uid"][:].tolist()
        assert all((a == b).all() for a, b in zip(data["input_ids"], whole["input_ids"], strict=True))
    with pytest.raises(UserError, match="share: 3/3 is none of 0/3 to 2/3"):
        prepare.encode_share(cfg, 3, 3)
    with pytest.raises(UserError, match="choice: `first` reads no further"):
        prepare.encode_share(cfg.but(choice="first"), 0, 3)
