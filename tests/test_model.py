"""The backbone against the official code's outputs (tests/golden/llada, made with it)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from treediff import model as m
from treediff.config import UserError, resolve

GOLDEN = Path(__file__).parent / "golden" / "llada"
SHARED = Path(__file__).resolve().parents[2] / "shared" / "golden" / "llada"
CASES = ["tiny/checkpoint", "tiny/checkpoint_sharded", "real_ids/checkpoint"]


def golden(name: str) -> Path:
    for root in (GOLDEN, SHARED):
        if (root / name).exists():
            return root / name
    pytest.skip(f"golden files of {name} are not in this checkout")


@pytest.mark.parametrize("checkpoint", CASES)
def test_logits_and_hidden_states_are_the_official_ones(checkpoint):
    model = m.load_backbone(str(golden(checkpoint)))
    want = load_file(golden(checkpoint.split("/")[0] + "/logits.safetensors"))
    for name in {k.split(".")[0] for k in want if k.endswith(".logits")}:
        ids = want[f"{name}.input_ids"]
        with torch.no_grad():
            got = model.lm_head(m.encode(model, ids))
        assert (got - want[f"{name}.logits"]).abs().max() < 1e-4, name


def test_padding_is_ignored_where_the_mask_says_so():
    model = m.load_backbone(str(golden("tiny/checkpoint")))
    want = load_file(golden("tiny/logits.safetensors"))
    seen = want["padmask.attention_mask"].bool()
    with torch.no_grad():
        got = model.lm_head(m.encode(model, want["padmask.input_ids"], want["padmask.attention_mask"]))
    assert (got - want["padmask.logits_2025_10"])[seen].abs().max() < 1e-4


def test_every_position_sees_every_other():
    model = m.load_backbone(str(golden("tiny/checkpoint")))
    ids = torch.randint(0, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad():
        assert (m.encode(model, ids)[0, 0] - m.encode(model, other)[0, 0]).abs().max() > 1e-6


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    source = golden("tiny/checkpoint")
    m.save_backbone(m.load_backbone(str(source)), tmp_path / "copy")
    ours, theirs = load_file(tmp_path / "copy" / "model.safetensors"), load_file(source / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.transformer.ln_f.weight"), "ln_f.weight is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor extra belongs to no part"),
        (lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(3)}), "ln_f.weight has shape (3,)"),
    ],
)
def test_wrong_tensors_are_named(tmp_path, change, said):
    source = golden("tiny/checkpoint")
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UserError, match=said.replace("(", r"\(").replace(")", r"\)")):
        m.load_backbone(str(tmp_path))


def test_a_truncated_file_and_an_unsupported_shape_are_refused(tmp_path):
    source = golden("tiny/checkpoint")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        m.load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "alibi": True}))
    with pytest.raises(UserError, match="alibi"):
        m.load_backbone(str(tmp_path))


def test_lora_sits_on_the_seven_matrices_and_changes_nothing_at_first():
    cfg = resolve("tiny")
    model = m.load_backbone(str(golden("tiny/checkpoint")))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = m.encode(model, ids)
        wrapped = m.add_lora(model, cfg)
        assert torch.equal(before, m.encode(wrapped, ids))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers
    assert not any("lm_head" in n for n in trained)


def test_a_new_backbone_is_a_function_of_the_seed(tmp_path):
    cfg = resolve("tiny")
    one, two, other = (m.new_backbone(c, 300, 1, 2) for c in (cfg, cfg, cfg.but(seed=1)))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    m.save_backbone(one, tmp_path / "model")
    back = m.load_backbone(str(tmp_path / "model"))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(one.lm_head(m.encode(one, ids)), back.lm_head(m.encode(back, ids)))
