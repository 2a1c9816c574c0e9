"""Autoregressive models through the same path, and one prompt in the terminal; with tiny random models."""

import io
import json
import re

import pytest
import torch
from test_sampling_run import lines, run, tiny_tokenizer  # noqa: F401 (a fixture)

from treediff import cli, pipeline
from treediff.config import resolve
from treediff.data import benchmarks, contamination
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.report import comparisons
from treediff.sampling import autoregressive, terminal


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny llama"
    tok = tiny_tokenizer(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(tok),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=tok.eos_token_id,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def test_a_causal_model_is_sampled_like_a_run(runs, llama):
    cfg = resolve("tiny", model=str(llama), limit=4, lengths=[32], block_length=32)
    path = pipeline.sampled(cfg, "tinycode", 32)
    assert re.fullmatch(r"model-.*tiny-llama-seed0", cfg.run_dir.name)
    records = lines(path)
    assert [r["task_id"] for r in records] == list(benchmarks.benchmark_problems(cfg, "tinycode"))
    assert all(r["settings"]["model"] == str(llama) for r in records)
    assert all(r["committed_at"] == list(range(len(r["ids"]))) for r in records)
    path.unlink()
    pipeline.sampled(cfg.but(sample_batch=1), "tinycode", 32)
    assert lines(path) == records  # whatever the batch


@pytest.mark.slow
def test_a_causal_model_is_scored_like_a_run_and_stands_in_the_report(runs, llama):
    cfg = resolve("tiny", model=str(llama), limit=4, lengths=[32], block_length=32)
    assert comparisons.autoregressive_table(cfg) is None
    assert pipeline.scored(cfg, "tinycode", 32).is_file()
    table = comparisons.autoregressive_table(cfg).markdown().splitlines()
    assert [row.split(" | ")[1] for row in table[2:]] == ["Tiny", "Tiny+"]
    assert all(str(llama) in row and "(0/4)" in row for row in table[2:])


def test_a_causal_model_s_samples_differ_and_can_be_repeated(runs, llama):
    cfg = resolve("tiny", model=str(llama), limit=2, lengths=[32], block_length=32, temperature=1.0, samples_per_task=2)
    path = pipeline.sampled(cfg, "tinycode", 32)
    first = [r["ids"] for r in lines(path)]
    assert len({tuple(ids) for ids in first}) == 4
    path.unlink()
    pipeline.sampled(cfg.but(sample_batch=3), "tinycode", 32)
    assert [r["ids"] for r in lines(path)] == first


def test_a_model_that_is_none_is_an_error(runs, tmp_path):
    with pytest.raises(UserError, match=r"model: .* is no causal language model"):
        pipeline.sampled(resolve("tiny", model=str(tmp_path), lengths=[32]), "tinycode", 32)


# --- one prompt -----------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(written: str) -> list[str]:
    """What a terminal shows after `written`: knows new lines, cursor up, carriage return and erase below."""
    rows, at = [""], 0
    for up, erase, new, text in re.findall(r"\x1b\[(\d+)A|(\r\x1b\[J)|(\n)|((?:\x1b\[[\d;]*m|[^\x1b\n\r])+)", written):
        if up:
            at -= int(up)
            assert at >= 0
        elif erase:
            rows = [*rows[:at], ""]
        elif new:
            at += 1
            rows += [""] * (at + 1 - len(rows))
        else:
            rows[at] += re.sub(r"\x1b\[[\d;]*m", "", text)
    return rows


def test_a_prompt_is_denoised_in_place_on_a_terminal(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(terminal.Screen.__init__, "__defaults__", (0.0,))
    plain, screen = io.StringIO(), Terminal()
    text = terminal.stream(run, "Add one.", plain)
    assert plain.getvalue() == text + "\n"  # no control codes in a pipe
    assert terminal.stream(run, "Add one.", screen) == text
    frames = screen.getvalue().split("\r\x1b[J")
    assert len(frames) > 32
    assert frames[1].count(terminal.HIDDEN) > frames[-3].count(terminal.HIDDEN)
    assert terminal.NEW in screen.getvalue()
    assert "\n".join(shown(screen.getvalue())).strip("\n") == terminal.harmless(text).strip("\n")


def test_a_frame_fits_the_terminal(tmp_path):
    tok = tiny_tokenizer(tmp_path / "t")
    ids, _ = tokens.tokenize(tok, "def solve(n):\n" + "    return n\n" * 30)
    ids = [*ids.tolist(), tok.mask_token_id, tok.mask_token_id]
    for columns, height in ((20, 5), (80, 24)):
        rows = re.sub(r"\x1b\[[\d;]*m", "", terminal.frame(tok, ids, [], columns, height)).splitlines()
        assert len(rows) <= height
        assert all(len(row) < columns for row in rows)
        assert rows[-1].endswith(terminal.HIDDEN * 2)


def test_an_answer_cannot_steer_the_terminal():
    assert terminal.harmless("a\x1b[2Jb\x07\r\n\tc") == "a\ufffd[2Jb\ufffd\n    c"


def test_the_command_answers_one_prompt(run, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(cli, "switches", lambda args, extra: run)
    cli.main(["sample", "--prompt", "Add one."])
    assert capsys.readouterr().out == answers_text(run)


def answers_text(cfg) -> str:
    out = io.StringIO()
    terminal.stream(cfg, "Add one.", out)
    return out.getvalue()


def test_a_model_that_only_its_own_code_can_load_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    tiny_tokenizer(tmp_path / "t")
    names = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
    (tmp_path / "t" / "config.json").write_text(json.dumps({"model_type": "llada", "auto_map": names}))
    (tmp_path / "t" / "own.py").write_text('raise SystemExit("code of a folder was run")')
    with pytest.raises(UserError, match=r"model: .* code of its own only, which is never run here"):
        autoregressive.Autoregressive(resolve("tiny", model=str(tmp_path / "t")), 32)
    with pytest.raises(UserError, match=r"embedder: .* code of its own only, which is never run here"):
        contamination.embedded(resolve("tiny", embedder=str(tmp_path / "t")), [])
