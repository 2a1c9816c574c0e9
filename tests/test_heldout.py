"""Held-out denoising: rows never trained on, the same figures by brute force and however they are split over ranks."""

import json

import numpy as np
import pytest
import torch
from test_llada import golden

from treediff import pipeline
from treediff.config import resolve
from treediff.data import sources
from treediff.masking import tokens
from treediff.model import checkpoint, forward
from treediff.training import batch, heldout, loss

SMALL = {"rows": 30, "eval_rows": 12, "pretrain": {"rows": 50, "data_seed": 1}}


def test_rows_are_never_trained_on_and_the_same_for_every_run(runs):
    cfg = resolve("tiny", masking="ast", **SMALL)
    for run in (cfg.with_masking("none"), cfg):
        pipeline.prepared(run)
    held = heldout.rows(cfg)
    assert len(held) == 12
    mine = {int(r["uid"]) for r in held}
    for run in (cfg, cfg.with_masking("none")):
        assert not mine & set(pipeline.prepared(run)["uid"][:].tolist())
    for other in (cfg.with_masking("random"), cfg.but(seed=5)):
        assert [int(r["uid"]) for r in heldout.rows(other)] == [int(r["uid"]) for r in held]
    assert heldout.rows(cfg.but(eval_every=0)) == []
    assert heldout.rows(cfg.but(eval_rows=0)) == []


def test_rows_of_a_file_are_those_that_were_not_chosen(runs, tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    lines = [
        {"id": w, "input": f"Say {w}.", "output": f"<think>\n{w}\n</think>\n\n```python\nprint('{w}')\n```"}
        for w in words
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    pipeline.tokenizer(resolve("tiny", **SMALL))
    tok = sources.tokenizer_folder(resolve("tiny", **SMALL))
    cfg = resolve("tiny", data=str(path), rows=7, eval_rows=9, tokenizer=tok, backbone="elsewhere")
    chosen = set(pipeline.prepared(cfg)["uid"][:].tolist())
    held = heldout.rows(cfg)
    assert len(held) == 5
    assert not chosen & {r["uid"] for r in held}
    again = heldout.rows(cfg.but(seed=8, masking="random"))
    assert all(np.array_equal(a["input_ids"], b["input_ids"]) for a, b in zip(held, again, strict=True))


def records(n: int) -> list[dict]:
    draw = np.random.default_rng(0)
    found = []
    for i in range(n):
        labels = np.concatenate([np.zeros(3), np.ones(draw.integers(1, 6)), draw.integers(2, 7, 12)]).astype(np.uint8)
        found.append({"input_ids": draw.integers(0, 500, len(labels)), "labels": labels, "uid": 31 * i})
    return found


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t)


def test_figures_are_those_of_the_literal_count(alone):
    cfg = resolve("paper", micro_batch=4, eos_padding="one")
    backbone = checkpoint.load_backbone(str(golden("tiny/checkpoint")))
    net = loss.Denoiser(backbone)
    held = heldout.Evaluation(cfg, records(9), 509, 510)
    state = torch.get_rng_state()
    beats = []
    found = held.run(net, 0, 1, torch.device("cpu"), lambda: beats.append(1))
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn
    assert net.training
    assert len(beats) == len(held.micros) == 9
    right, count = np.zeros(7), np.zeros(7)
    for level, m in held.micros:
        with torch.no_grad():
            logits = forward.lm_head(backbone)(forward.hidden_states(backbone, m.noisy, m.attention_mask)).flatten(0, 1)
        for place, target, label in zip(m.places.tolist(), m.targets.tolist(), m.label.tolist(), strict=True):
            assert m.noisy.flatten()[place] == 510
            right[label] += int(logits[place].argmax()) == target
            count[label] += 1
        assert level in range(len(heldout.LEVELS))
    assert found["tokens"] == {k: int(c) for k, c in zip(tokens.LABELS, count, strict=True) if c}
    assert found["accuracy"] == pytest.approx(right.sum() / count.sum(), abs=1e-5)
    for i, label in enumerate(tokens.LABELS):
        if count[i]:
            assert found["accuracy_by_label"][label] == pytest.approx(right[i] / count[i], abs=1e-5)


def test_each_level_masks_its_share_of_every_answer_and_no_end_of_text():
    cfg = resolve("paper", micro_batch=9)
    [*micros] = heldout.Evaluation(cfg, records(9), 509, 510).micros
    answers = sum(int((r["labels"] != tokens.PROMPT).sum()) for r in records(9))
    for number, m in micros:
        assert 0 <= len(m.places) - heldout.LEVELS[number] * answers <= 9
        assert not (m.targets == 509).any()


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_split_over_ranks_does_not_matter(monkeypatch, world):
    cfg = resolve("paper", micro_batch=2)
    net = loss.Denoiser(checkpoint.load_backbone(str(golden("tiny/checkpoint"))))
    held = heldout.Evaluation(cfg, records(7), 509, 510)
    parts = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: parts.append(t.clone()))
    calls = [0] * world
    for rank in range(world):
        held.run(net, rank, world, torch.device("cpu"), lambda r=rank: calls.__setitem__(r, calls[r] + 1))
    assert len(set(calls)) == 1  # every rank makes as many forward passes: ZeRO 3 needs them all
    whole = heldout._record(sum(parts))
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t)
    assert held.run(net, 0, 1, torch.device("cpu"), lambda: None) == whole


def test_a_micro_batch_scores_what_the_loss_sees():
    net = loss.Denoiser(checkpoint.load_backbone(str(golden("tiny/checkpoint"))))
    [(_, m), *_] = heldout.Evaluation(resolve("paper", micro_batch=3), records(3), 509, 510).micros
    with torch.no_grad():
        _, want = net(m.noisy, m.places, m.targets, torch.ones(len(m.places)), m.attention_mask)
        _, got = net(m.noisy, m.places, m.targets, None, m.attention_mask)
    assert torch.allclose(got, want)
    assert isinstance(m, batch.Micro)
