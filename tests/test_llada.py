"""The backbone against the official code's outputs (tests/golden/llada, made with it)."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SHARED
from peft import PeftModel
from safetensors.torch import load_file, save_file

from treediff.config import resolve
from treediff.errors import UserError
from treediff.model import attention, forward, llada, lora, narrow
from treediff.model.checkpoint import check_tokenizer, load_backbone, save_backbone
from treediff.training import plan

GOLDEN = Path(__file__).parent / "golden" / "llada"
CASES = ["tiny/checkpoint", "tiny/checkpoint_sharded", "real_ids/checkpoint"]


def golden(name: str) -> Path:
    for root in (GOLDEN, SHARED / "golden" / "llada"):
        if (root / name).exists():
            return root / name
    pytest.skip(f"needs golden files of {name}: make oracles FROM=FOLDER")


@pytest.mark.parametrize("checkpoint", CASES)
def test_logits_and_hidden_states_are_the_official_ones(checkpoint):
    model = load_backbone(str(golden(checkpoint)))
    want = load_file(golden(checkpoint.split("/")[0] + "/logits.safetensors"))
    for name in {k.split(".")[0] for k in want if k.endswith(".logits")}:
        ids = want[f"{name}.input_ids"]
        with torch.no_grad():
            got = model.lm_head(forward.hidden_states(model, ids))
        assert (got - want[f"{name}.logits"]).abs().max() < 1e-4, name


def test_padding_is_ignored_where_the_mask_says_so():
    model = load_backbone(str(golden("tiny/checkpoint")))
    want = load_file(golden("tiny/logits.safetensors"))
    seen = want["padmask.attention_mask"].bool()
    with torch.no_grad():
        got = model.lm_head(forward.hidden_states(model, want["padmask.input_ids"], want["padmask.attention_mask"]))
    assert (got - want["padmask.logits_2025_10"])[seen].abs().max() < 1e-4


def test_every_position_sees_every_other():
    model = load_backbone(str(golden("tiny/checkpoint")))
    ids = torch.randint(0, 500, (1, 12), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, -1] += 1
    with torch.no_grad():
        assert (forward.hidden_states(model, ids)[0, 0] - forward.hidden_states(model, other)[0, 0]).abs().max() > 1e-6


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    source = golden("tiny/checkpoint")
    save_backbone(load_backbone(str(source)), tmp_path / "copy")
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
        load_backbone(str(tmp_path))


def test_a_truncated_file_and_an_unsupported_shape_are_refused(tmp_path):
    source = golden("tiny/checkpoint")
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or cut short"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "alibi": True}))
    with pytest.raises(UserError, match="alibi"):
        load_backbone(str(tmp_path))


def changed(tmp_path, config=None, tensors=None):
    """The golden checkpoint with another config.json or other tensors."""
    source = golden("tiny/checkpoint")
    have = load_file(source / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((source / "config.json").read_text()), **(config or {})})
    )
    save_file({k: v.contiguous() for k, v in (tensors or have).items()}, tmp_path / "model.safetensors")
    return str(tmp_path)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("key", ["n_kv_heads", "multi_query_attention"])
def test_grouped_key_and_value_heads_are_shared_as_if_repeated(tmp_path, attention, key):
    tensors = load_file(golden("tiny/checkpoint") / "model.safetensors")
    heads, size = 4, 16
    groups = 2 if key == "n_kv_heads" else 1
    few, many = dict(tensors), dict(tensors)
    for name in [n for n in tensors if "k_proj" in n or "v_proj" in n]:
        few[name] = tensors[name][: groups * size]
        many[name] = few[name].view(groups, 1, size, -1).expand(-1, heads // groups, -1, -1).reshape(heads * size, -1)
    (tmp_path / "few").mkdir()
    (tmp_path / "many").mkdir()
    config = {"n_kv_heads": 2} if key == "n_kv_heads" else {"n_kv_heads": None, "multi_query_attention": True}
    grouped = load_backbone(changed(tmp_path / "few", config, few))
    full = load_backbone(changed(tmp_path / "many", None, many))
    grouped.config._attn_implementation = full.config._attn_implementation = attention
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.allclose(forward.hidden_states(grouped, ids), forward.hidden_states(full, ids), atol=1e-5)


def test_tied_embeddings_load_as_one_matrix_and_come_back(tmp_path):
    tensors = load_file(golden("tiny/checkpoint") / "model.safetensors")
    del tensors["model.transformer.ff_out.weight"]
    (tmp_path / "tied").mkdir()
    net = load_backbone(changed(tmp_path / "tied", {"weight_tying": True}, tensors))
    assert net.lm_head.weight is net.model.embed_tokens.weight
    save_backbone(net, tmp_path / "copy")
    again = load_file(tmp_path / "copy" / "model.safetensors")
    assert again.keys() == tensors.keys()


def test_padded_embeddings_load(tmp_path):
    net = load_backbone(changed(tmp_path, {"vocab_size": 500, "embedding_size": 512}))
    assert net.lm_head.weight.shape == (512, 64)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"include_bias": True}, "include_bias = True is not supported"),
        ({"include_qkv_bias": True}, "include_qkv_bias"),
        ({"block_group_size": 2}, "block_group_size"),
        ({"d_model": None}, "no d_model"),
        ({"n_kv_heads": 3}, "cannot share 3"),
        ({"embedding_size": 640}, r"weight has shape \(512, 64\), config.json says \(640, 64\)"),
        ({"n_layers": 3}, r"blocks.2.* is missing"),
        ({"n_layers": 1}, r"blocks.1.* belongs to no part"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_the_reason(tmp_path, config, said):
    with pytest.raises(UserError, match=said):
        load_backbone(changed(tmp_path, config))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "model-00002-of-00004.safetensors").unlink(), "model-00002-of-00004.*is missing"),
        (lambda f: cut(f / "model-00003-of-00004.safetensors"), "model-00003-of-00004.*damaged or cut short"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json: not valid JSON"),
        (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "lists no tensors"),
        (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), "not a file of"),
        (lambda f: (f / "config.json").write_text("[1"), "config.json: not valid JSON"),
        (lambda f: twice(f), "is in model-00001-of-00004.safetensors already"),
    ],
)
def test_damaged_shards_are_named(tmp_path, damage, said):
    save_backbone(load_backbone(str(golden("tiny/checkpoint"))), tmp_path / "copy", most=200_000)
    damage(tmp_path / "copy")
    with pytest.raises(UserError, match=said):
        load_backbone(str(tmp_path / "copy"))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def twice(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    save_file(load_file(folder / "model-00001-of-00004.safetensors"), folder / "model-00009.safetensors")
    index["weight_map"]["more"] = "model-00009.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_large_model_is_written_in_shards_that_load_bit_for_bit(tmp_path):
    net = load_backbone(str(golden("tiny/checkpoint")))
    save_backbone(net, tmp_path / "copy", most=200_000)
    files = sorted(p.name for p in (tmp_path / "copy").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    back = load_backbone(str(tmp_path / "copy"))
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), back.parameters(), strict=True))


def test_another_model_s_tokenizer_is_refused():
    net = load_backbone(str(golden("tiny/checkpoint")))

    def tok(most, mask, eos):
        return SimpleNamespace(get_vocab=lambda: {"a": 0, "b": most}, mask_token_id=mask, eos_token_id=eos)

    check_tokenizer(net, tok(511, 510, 509))
    with pytest.raises(UserError, match="ids go up to 600, the backbone's embedding has 512 rows"):
        check_tokenizer(net, tok(600, 510, 509))
    with pytest.raises(UserError, match="mask token is 508, the backbone's 510"):
        check_tokenizer(net, tok(511, 508, 509))
    with pytest.raises(UserError, match="end-of-text token is 1, the backbone's 509"):
        check_tokenizer(net, tok(511, 510, 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_and_the_merged_model_come_back_bit_for_bit(tmp_path, dtype):
    cfg, source = resolve("tiny"), str(golden("tiny/checkpoint"))
    wrapped = lora.add_lora(load_backbone(source, getattr(torch, dtype)), cfg)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in wrapped.parameters():
            if p.requires_grad:
                p.normal_(0, 0.05, generator=draw)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    kept = {n: p.detach().clone() for n, p in wrapped.named_parameters() if p.requires_grad}
    again = PeftModel.from_pretrained(load_backbone(source, getattr(torch, dtype)), tmp_path / "adapter")
    loaded = dict(again.named_parameters())
    assert len(kept) == 2 * 7 * 2
    assert all(torch.equal(loaded[n], t) for n, t in kept.items())
    merged = lora.load_adapter(load_backbone(source, getattr(torch, dtype)), tmp_path / "adapter")
    plain = load_backbone(source, getattr(torch, dtype))
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, plain.model.layers[0].mlp.up_proj.weight)
    save_backbone(merged, tmp_path / "merged")
    back = load_backbone(str(tmp_path / "merged"), getattr(torch, dtype))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), back.parameters(), strict=True))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(forward.hidden_states(back, ids), forward.hidden_states(merged, ids))


@pytest.mark.parametrize(("stored", "loaded"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_loading_takes_no_more_than_one_shard_above_the_model(tmp_path, stored, loaded):
    cfg = resolve("tiny", d_model=1024, n_layers=8, n_heads=8, mlp_hidden=2816)
    net = llada.new_backbone(cfg, 4000, 1, 2).to(getattr(torch, stored))
    shard = 90_000_000
    save_backbone(net, tmp_path / "model", most=shard)
    assert len(list((tmp_path / "model").glob("*.safetensors"))) >= 3
    argv = [sys.executable, str(Path(__file__).with_name("load_memory.py")), str(tmp_path / "model"), loaded]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    size, rise = map(int, done.stdout.split()[-2:])
    print(f"model {size / 1e6:.0f} MB, peak {rise / 1e6:.0f} MB above the start, shards of {shard / 1e6:.0f} MB")
    assert size == sum(p.numel() for p in net.parameters()) * 2
    assert rise <= size + shard + 20e6  # and what allocators and the code itself take


def test_lora_sits_on_the_seven_matrices_and_changes_nothing_at_first():
    cfg = resolve("tiny")
    model = load_backbone(str(golden("tiny/checkpoint")))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        before = forward.hidden_states(model, ids)
        wrapped = lora.add_lora(model, cfg)
        assert torch.equal(before, forward.hidden_states(wrapped, ids))
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * model.config.num_hidden_layers
    assert not any("lm_head" in n for n in trained)


def test_a_new_backbone_is_a_function_of_the_seed(tmp_path):
    cfg = resolve("tiny")
    one, two, other = (llada.new_backbone(c, 300, 1, 2) for c in (cfg, cfg, cfg.but(seed=1)))
    same = [torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True)]
    assert all(same)
    assert not torch.equal(one.model.layers[0].mlp.up_proj.weight, other.model.layers[0].mlp.up_proj.weight)
    save_backbone(one, tmp_path / "model")
    back = load_backbone(str(tmp_path / "model"))
    ids = torch.arange(30)[None]
    with torch.no_grad():
        assert torch.equal(one.lm_head(forward.hidden_states(one, ids)), back.lm_head(forward.hidden_states(back, ids)))


def test_a_new_backbones_head_names_the_token_it_is_shown():
    net = llada.new_backbone(resolve("tiny"), 640, 1, 2)
    shown = net.model.embed_tokens.weight
    assert torch.equal(net.lm_head(shown).argmax(-1), torch.arange(640))
    assert net.lm_head.weight.data_ptr() != shown.data_ptr()


# --- rotary embedding in float32 ------------------------------------------------------------------------------------
def test_the_rotary_embedding_of_bf16_is_the_float32_twin_s():
    """Bit for bit but where an angle's last digit decides a rounding to bf16; transformers' own is far off."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    g = load_file(golden("rotary.safetensors"))
    shape = {**plan.LLADA_8B, "n_layers": 1, "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    config = llada.empty({**shape, "vocab_size": shape["embedding_size"]}, torch.bfloat16).config
    x, positions = g["x"][None], g["positions"][None]
    cos, sin = attention.Rotary(config)(x, positions)
    assert cos.dtype == torch.float32
    got = attention.rotate(x, cos[:, None], sin[:, None])[0]
    assert got.dtype == torch.bfloat16
    assert (got != g["out"]).float().mean() < 0.005  # NumPy's and torch's powers differ in the last digit
    assert (got.float() - g["out"].float()).abs().max() < 0.02
    theirs = apply_rotary_pos_emb(x, x, *LlamaRotaryEmbedding(config)(x, positions))[0][0]
    assert (theirs != g["out"]).float().mean() > 0.2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_bf16_model_rotates_in_float32_and_attends_in_bf16(monkeypatch, implementation):
    model = load_backbone(str(golden("tiny/checkpoint")), torch.bfloat16)
    model.config._attn_implementation = implementation
    seen = []
    real = attention.rotate
    monkeypatch.setattr(attention, "rotate", lambda *a: seen.append((*a, real(*a))) or seen[-1][-1])
    ids = torch.randint(0, 500, (1, 90), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = forward.hidden_states(model, ids)
        assert forward.window_states(model, ids, 0, None, forward.KeyValues()).equal(hidden)
    assert hidden.dtype == torch.bfloat16
    assert len(seen) == 2 * 2 * model.config.num_hidden_layers
    for x, cos, sin, out in seen:
        assert cos.dtype == sin.dtype == torch.float32
        half = x.shape[-1] // 2
        pair = torch.complex(x[..., :half].float(), x[..., half:].float())
        turned = pair * torch.complex(cos[..., :half], sin[..., :half])
        want = torch.cat([turned.real, turned.imag], -1)
        assert (out.float() - want).abs().max() <= want.abs().max() * 2**-8


def test_the_adapter_s_scale_on_the_narrow_side_changes_no_bit(tmp_path):
    """The paper's scale is 2; and what PEFT itself loads and merges is the same adapter."""
    from peft.tuners.lora.layer import Linear

    cfg = resolve("tiny", lora_dropout=0.0)
    wrapped = lora.add_lora(load_backbone(str(golden("tiny/checkpoint"))), cfg)
    layers = [m for m in wrapped.modules() if isinstance(m, narrow.NarrowLinear)]
    assert len(layers) == 7 * wrapped.config.num_hidden_layers
    draw = torch.Generator().manual_seed(1)
    for name, p in wrapped.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.05, generator=draw)
    ids, found = torch.arange(40)[None], []
    for kind in (narrow.NarrowLinear, Linear):
        for m in layers:
            m.__class__ = kind
        wrapped.zero_grad()
        out = forward.hidden_states(wrapped, ids)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in wrapped.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
