"""The records of the backbones against the official Dream code's outputs (golden/dream), and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SHARED
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from treediff.config import resolve
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.model import backbones, forward, llada, lora
from treediff.model.checkpoint import load_backbone, save_backbone
from treediff.training import batch, memory, plan
from treediff.training.loss import Denoiser

GOLDEN = Path(__file__).parent / "golden" / "dream"
CHECKPOINTS = ["tiny_untied/checkpoint", "tiny_untied/checkpoint_sharded", "tiny_tied/checkpoint"]


def golden(name: str) -> Path:
    for root in (GOLDEN, SHARED / "golden" / "dream"):
        if (root / name).exists():
            return root / name
    pytest.skip(f"needs golden files of dream/{name}: make oracles FROM=FOLDER")


def config(name: str) -> dict:
    return json.loads((golden(name) / "config.json").read_text())


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_are_the_official_ones(checkpoint, attention):
    model = load_backbone(str(golden(checkpoint)))
    model.config._attn_implementation = attention
    want = load_file(golden(checkpoint.split("/")[0] + "/logits.safetensors"))
    names = {k.split(".")[0] for k in want if k.endswith(".input_ids")}
    assert len(names) >= 5
    for name in names:
        ids, seen = want[f"{name}.input_ids"], want.get(f"{name}.attention_mask")
        with torch.no_grad():
            got = model.lm_head(forward.hidden_states(model, ids, seen))
        valid = torch.ones_like(ids).bool() if seen is None else seen.bool()
        assert (got - want[f"{name}.logits"])[valid].abs().max() < 1e-4, name


def test_padding_that_is_attended_to_changes_what_the_official_code_says_it_does():
    model = load_backbone(str(golden("tiny_untied/checkpoint")))
    want = load_file(golden("tiny_untied/logits.safetensors"))
    with torch.no_grad():
        got = model.lm_head(forward.hidden_states(model, want["rightpad.input_ids"]))
    assert (got - want["rightpad_attended.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_checkpoint_comes_back_bit_for_bit(tmp_path, checkpoint):
    source = golden(checkpoint)
    save_backbone(load_backbone(str(source)), tmp_path / "copy")
    ours = load_file(tmp_path / "copy" / "model.safetensors")
    theirs = {k: t for f in source.glob("*.safetensors") for k, t in load_file(f).items()}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    saved = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert saved == {**config(checkpoint), "torch_dtype": "float32"}


def test_the_official_index_lists_this_record_s_tensors_and_bytes():
    """Dream-v0-Instruct-7B: 339 tensors, 15,231,233,024 bytes in bf16."""
    index = json.loads((golden("official_config") / "model.safetensors.index.json").read_text())
    model = backbones.empty(config("official_config"), torch.bfloat16)
    named = {model.backbone.official_name(n): p for n, p in model.named_parameters()}
    assert named.keys() == index["weight_map"].keys()
    size = sum(p.numel() * 2 for p in named.values())
    assert size == index["metadata"]["total_size"] == 15_231_233_024
    s = memory.Shape.of(backbones.shape(config("official_config")))
    assert s == memory.Shape.of(model.config) == memory.Shape.of(backbones.shape(backbones.DREAM_7B))
    assert 2 * s.parameters == size


@pytest.mark.parametrize("name", backbones.KNOWN)
def test_what_is_known_by_its_hub_id_is_planned_as_it_would_be_loaded(name):
    known = backbones.KNOWN[name]
    record = backbones.of(known)
    rest = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "pad_token_id": 0}
    model = backbones.empty({**{record.key(k): v for k, v in rest.items()}, **known}, torch.bfloat16)
    s = plan.shape(resolve("paper", backbone=name))
    assert s == memory.Shape.of(model.config)
    assert s.parameters == sum(p.numel() for n, p in model.named_parameters() if not (s.tied and n == "lm_head.weight"))
    rank = 8
    wrapped = lora.add_lora(model, resolve("tiny", lora_rank=rank))
    trained = {n: p.numel() for n, p in wrapped.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == s.lora(rank)
    assert len(trained) == 2 * 7 * s.layers
    assert not any("bias" in n or "lm_head" in n or "embed" in n for n in trained)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"hidden_size": None}, "no hidden_size; is it a Dream checkpoint's"),
        ({"rope_theta": None}, "no rope_theta"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"head_dim": 32}, "head_dim = 32"),
        ({"num_hidden_layers": 3}, r"layers\.2.* is missing"),
        ({"num_hidden_layers": 1}, r"layers\.1.* belongs to no part"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight belongs to no part"),
        ({"num_experts": 8}, "num_experts: a mixture of experts"),
        ({"model_type": "llada_moe"}, "llada_moe is not supported: its feed-forward layers are a mixture"),
        ({"model_type": "llada2_moe"}, "mixture of experts"),
        ({"architectures": ["LLaDA2MoeModelLM"]}, "mixture of experts"),
        ({"model_type": "sdar"}, "sdar is not supported: it is block-causal"),
        ({"architectures": ["StableDiffcoderForCausalLM"]}, "block-causal"),
        ({"model_type": "illada"}, "iLLaDA's config.json and tensor names have not been seen"),
        ({"model_type": "gpt2"}, "model_type 'gpt2' has no record, only llada, Dream, qwen2, llama have"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_the_reason(tmp_path, changes, said):
    source = golden("tiny_untied/checkpoint")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config("tiny_untied/checkpoint"), **changes}))
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("GSAI-ML/iLLaDA-8B-Instruct", "not been seen"),
        ("inclusionAI/LLaDA-MoE-7B-A1B-Base", "mixture of experts"),
        ("inclusionAI/LLaDA2.0-mini", "mixture of experts"),
        ("JetLM/SDAR-8B-Chat", "block-causal"),
        ("ByteDance-Seed/Stable-DiffCoder-8B-Instruct", "block-causal"),
    ],
)
def test_models_known_not_to_work_are_refused_by_name_before_anything_is_fetched(monkeypatch, name, said):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(UserError, match=said):
        load_backbone(name)


@pytest.mark.parametrize("name", backbones.KNOWN)
def test_no_known_model_is_refused(name):
    backbones.refuse(name)


def test_biases_are_loaded_and_their_absence_is_an_error(tmp_path):
    source = golden("tiny_untied/checkpoint")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias is missing"):
        load_backbone(str(tmp_path))


def test_every_position_sees_every_other_whatever_the_blocks():
    for name, kind in (("qwen2", {"pad_token_id": 1}), ("llama", {})):
        made = {**backbones.QWEN_05B, "model_type": name, "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 50}
        made |= {"num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
        torch.manual_seed(0)
        model = backbones.random_weights({**made, "rope_theta": 1e6, **kind}, torch.float32, "cpu")
        ids = torch.arange(2, 14)[None]
        other = ids.clone()
        other[0, -1] += 1
        with torch.no_grad():
            one, two = (forward.hidden_states(model, x) for x in (ids, other))
            assert torch.allclose(one, forward.window_states(model, ids, 0, None, None), atol=1e-6)
        assert (one - two)[0, 0].abs().max() > 1e-6


def test_llada_s_own_names_are_the_record_s():
    assert llada.official_name("model.layers.7.mlp.gate_proj.weight") == "model.transformer.blocks.7.ff_proj.weight"


# --- the loss --------------------------------------------------------------------------------------------------------
LOSSES = {
    "original": {"loss_weight": "inverse_p"},
    "cart": {"loss_weight": "cart"},
    "cart_p08": {"loss_weight": "cart", "cart_p": 0.8},
    "none": {"loss_weight": "none"},
    "eos_as_one": {"loss_weight": "inverse_p"},
    "eos_as_one_cart": {"loss_weight": "cart", "cart_p": 0.3},
    "leftpad_original": {"loss_weight": "inverse_p"},
    "leftpad_cart": {"loss_weight": "cart"},
}


def golden_loss(shape: str, case: str):
    """The loss and each token's cross-entropy by our code, on the official code's batch; the model; theirs."""
    g = load_file(golden(f"{shape}/losses.safetensors"))
    said = json.loads(golden(f"{shape}/losses.json").read_text())[case]
    ids, seen = (g[f"batch{said['batch']}.{name}"] for name in ("input_ids", "attention_mask"))
    mask, noisy = g[f"{case}.loss_mask"], g[f"{case}.masked_input_ids"]
    net = Denoiser(load_backbone(str(golden(f"{shape}/checkpoint"))))
    labels = torch.full(ids.shape, tokens.REASONING, dtype=torch.uint8)
    cfg = resolve("paper", **LOSSES[case])
    # Dream's own CART counts padding among the known tokens, whoever may see it.
    weight = batch.loss_weights(cfg, labels, mask, g[f"{case}.t"].double(), torch.ones_like(mask))
    places = mask.flatten().nonzero()[:, 0]
    attended = None if seen.all() or said["batch"] == "A" else seen.bool()
    loss, ce = net(noisy, places, ids[mask], weight[mask], attended)
    return loss, ce, net.backbone, said, g[f"{case}.token_ce"].flatten()[places]


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.parametrize("shape", ["tiny_untied", "tiny_tied"])
def test_dream_s_losses(shape, case):
    loss, ce, _, said, theirs = golden_loss(shape, case)
    assert torch.allclose(ce, theirs, rtol=1e-4, atol=1e-5)
    assert ce.mean().item() == pytest.approx(said["mean_masked_ce_shifted"], rel=1e-5)
    assert loss.item() == pytest.approx(said["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "case"), [("tiny_untied", "original"), ("tiny_untied", "cart"), ("tiny_tied", "original")]
)
def test_dream_s_gradients(shape, case):
    """Of every parameter, biases too; and the embedding of a padding token learns nothing from being read."""
    loss, _, net, _, _ = golden_loss(shape, case)
    loss.backward()
    want = load_file(golden(f"{shape}/grads_{case}.safetensors"))
    found = {net.backbone.official_name(n): p.grad for n, p in net.named_parameters()}
    assert found.keys() == want.keys()
    for name, gradient in want.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, name
    pad = net.official_config.get("pad_token_id")
    if pad is not None:
        assert not net.model.embed_tokens.weight.grad[pad].any()


@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_cart_is_the_sum_over_known_tokens(length, p, seed):
    known = torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    each = torch.where(apart > 0, p * (1 - p) ** (apart - 1).double() / 2, 0.0)
    assert torch.allclose(batch.nearness(known, p), known.double() @ each, atol=1e-12)


def test_cart_does_not_depend_on_what_a_row_stands_beside():
    """Dream's own counts padding, so that a row's loss changes with the batch's longest: ours counts what is seen."""
    cfg = resolve("paper", loss_weight="cart", normaliser="answer")
    mask, labels = torch.zeros(1, 30, dtype=torch.bool), torch.ones(1, 30, dtype=torch.uint8)
    mask[0, 5:18] = True
    seen = torch.arange(30)[None] < 20
    labels[~seen] = tokens.PROMPT
    wide = batch.loss_weights(cfg, labels, mask, torch.ones(1), seen)
    tight = batch.loss_weights(cfg, labels[:, :20], mask[:, :20], torch.ones(1), seen[:, :20])
    assert torch.equal(wide[:, :20], tight)


def test_the_first_token_of_each_row_is_predicted_at_its_own_place():
    net = load_backbone(str(golden("tiny_untied/checkpoint")))
    places = torch.tensor([0, 1, 6, 7, 8, 13])
    assert forward.predicting(net, places, 7).tolist() == [0, 0, 5, 7, 7, 12]
    net.backbone = backbones.LLADA
    assert forward.predicting(net, places, 7) is places
