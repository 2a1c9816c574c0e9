"""Nodes restored whole: which ones, the greedy fill against the sampler's own proposals, the ledger, a killed call."""

import json

import numpy as np
import pytest
import torch
from test_llada import golden

from treediff.config import resolve
from treediff.data import examples, sources, stdlib
from treediff.errors import UserError
from treediff.files import read_json
from treediff.masking import tokens
from treediff.model import checkpoint, llada
from treediff.sampling import decode
from treediff.scoring import restore

CODE = "if not items or len(items) > 3:\n    return None\nfor item in items:\n    total += item.size\nreturn total"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tok") / "t"
    tokens.train_tokenizer((CODE for _ in range(3)), 300, folder)
    return tokens.load_tokenizer(str(folder))


def encoded(tok, code=CODE, name="m.f"):
    return examples.encode(resolve("stdlib", max_length=400), tok, examples.Example(name, "def f(items):", "", code))


def test_nodes_have_the_tier_of_their_type_or_of_most_of_their_tokens(tok):
    record = encoded(tok)
    found = restore.nodes([record], sizes=(2, 1000))
    said = {tok.decode(n.ids[n.start : n.end]).strip(): (n.tier, n.typed) for n in found}
    assert said["return total"] == ("control", True)
    assert said["total += item.size"] == ("data", True)
    assert said["item.size"] == ("data", False)
    assert said["not items or len(items) > 3"][1] is False
    assert said[CODE.partition("\nfor")[0]] == ("condition", True)
    labels = record["labels"]
    for n in found:
        assert (labels[n.start : n.end] >= tokens.CODE).all()
        if not n.typed:
            counts = np.bincount(labels[n.start : n.end] - tokens.CODE, minlength=5)
            assert counts[("default", "skeleton", "data", "condition", "control").index(n.tier)] == counts.max()
    spans = {(s, e) for s, e, _ in record["spans"].reshape(-1, 3).tolist()}
    assert {(n.start, n.end) for n in found} <= spans
    assert len({n.id for n in found}) == len(found)


def test_the_choice_is_seeded_by_name_and_of_the_asked_sizes(tok):
    records = [encoded(tok, CODE.replace("total", f"total{i}"), f"m.f{i}") for i in range(12)]
    found = restore.nodes(records, per_tier=10, sizes=(3, 12))
    tally = [sum(n.tier == t for n in found) for t in ("skeleton", "data", "condition", "control")]
    assert max(tally) == 10
    assert all(3 <= n.end - n.start <= 12 for n in found)
    again = restore.nodes(records[::-1], per_tier=10, sizes=(3, 12))
    assert {n.id for n in again} == {n.id for n in found}
    fewer = restore.nodes(records, per_tier=4, sizes=(3, 12))
    assert {n.id for n in fewer} <= {n.id for n in found}


def filled(net, mask_id, hole):
    """The hole filled by the sampler: what stands before it as the prompt, what follows put back at every step."""
    canvas = torch.from_numpy(hole.ids.astype(np.int64))[None].clone()
    canvas[0, hole.start : hole.end] = mask_id
    how = decode.Decoding(mask_id=mask_id, ends=(0,), gen_length=8, steps=8, block_length=8)
    for _ in range(hole.end - hole.start):
        with torch.no_grad():
            logits = net(input_ids=canvas).logits[0].float()
        places = (canvas[0] == mask_id).nonzero()[:, 0]
        token, odds = decode.propose(logits[places].clone(), how, torch.tensor([0]), None)
        best = int(odds.argmin())
        canvas[0, places[best]] = token[best]
    return canvas[0].numpy()


def test_holes_are_filled_as_the_sampler_fills_a_block():
    """Original tokens are what the model itself would fill in for some holes and others for the rest."""
    net = checkpoint.load_backbone(str(golden("tiny/checkpoint")))
    mask_id = net.official_config["mask_token_id"]
    draw = np.random.default_rng(0)
    holes, expected = [], []
    for i in range(24):
        ids = draw.integers(0, min(200, net.config.vocab_size - 1), int(draw.integers(12, 40))).astype(np.int32)
        start = int(draw.integers(0, len(ids) - 6))
        hole = restore.Node(str(i), "p", "data", True, ids, start, start + int(draw.integers(1, 6)))
        own = filled(net, mask_id, hole).astype(np.int32)
        if i % 3:  # two in three are right; of these every second one is spoiled at one place
            ids = own.copy()
            if i % 3 == 2:
                at = int(draw.integers(hole.start, hole.end))
                ids[at] = (ids[at] + 1) % 200
        holes.append(hole._replace(ids=ids))
        expected.append(bool((filled(net, mask_id, holes[-1]) == ids).all()))
    assert restore.restore(net, mask_id, holes) == expected
    assert sum(expected) >= 8
    assert not all(expected)


def small(runs) -> object:
    """A tiny backbone of random weights in the place of a trained one."""
    cfg = resolve("stdlib", masking="none", d_model=16, n_layers=1, n_heads=2, mlp_hidden=16, vocab_size=320)
    sources.train_tokenizer(cfg)
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg))
    net = llada.new_backbone(cfg, 320, tok.eos_token_id, tok.mask_token_id)
    checkpoint.save_backbone(net, cfg.run_dir / "model")
    return cfg


def test_the_ledger_is_whole_and_a_killed_call_goes_on(runs, monkeypatch):
    monkeypatch.setattr(restore, "PER_TIER", 12)
    monkeypatch.setattr(restore, "_PART", 10)
    monkeypatch.setattr(restore, "SIZES", (1, 32))  # a vocabulary of 320 entries makes many tokens of a node
    functions = stdlib.rows(held_out=True)[:60]
    monkeypatch.setattr(stdlib, "rows", lambda held_out=False, every=False: functions)
    monkeypatch.setattr(restore.nodes, "__defaults__", (12, restore.SIZES))
    cfg = small(runs)
    real, asked = restore.restore, []

    def counted(net, mask_id, holes):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(len(holes))
        return [i % 2 == 0 for i, _ in enumerate(real(net, mask_id, holes))]

    monkeypatch.setattr(restore, "restore", counted)
    with pytest.raises(KeyboardInterrupt):
        restore.score(cfg)
    assert not restore.ledger_path(cfg).exists()
    part = restore.ledger_path(cfg).with_name(".nodes.json.part")
    part.write_bytes(part.read_bytes() + b'["cut')
    asked.clear()
    asked.append(0)

    def rest(net, mask_id, holes):
        asked.append(len(holes))
        return [False] * len(holes)

    monkeypatch.setattr(restore, "restore", rest)
    ledger = read_json(restore.score(cfg))
    assert sum(asked) == 48 - 20
    assert sum(t["pass"] for t in ledger["tasks"].values()) == 10
    assert not part.exists()
    assert ledger["benchmark"] == "stdlib-nodes"
    assert ledger["settings"]["data"] == stdlib.stamp()
    shares = restore.shares(ledger)
    assert shares["all"]["nodes"] == 48
    assert sum(shares[t]["nodes"] for t in ("skeleton", "data", "condition", "control")) == 48
    for name, task in ledger["tasks"].items():
        assert name.startswith(f"{task['program']}:")
        assert restore.SIZES[0] <= task["tokens"] <= restore.SIZES[1]
    asked.clear()
    restore.score(cfg)  # there already
    assert not asked
    net = checkpoint.load_backbone(str(cfg.run_dir / "model"))
    net.model.norm.weight.data += 1
    checkpoint.save_backbone(net, cfg.run_dir / "model-2")
    (cfg.run_dir / "model-2" / "model.safetensors").replace(cfg.run_dir / "model" / "model.safetensors")
    restore.score(cfg)  # other weights
    assert sum(asked) == 48


def test_bad_input_is_named(runs):
    with pytest.raises(UserError, match="data: nodes are restored on the held-out part of stdlib"):
        restore.held_out(resolve("tiny"))
    with pytest.raises(UserError, match="not trained yet"):
        restore.weights(resolve("stdlib", masking="ast"))
    assert json.dumps(restore.shares({"tasks": {}})) == "{}"
