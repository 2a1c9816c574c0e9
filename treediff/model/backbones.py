"""The backbones: one record each, and a model of transformers' blocks from any of them. No remote code.

    model = finish(empty(config, torch.bfloat16), "cpu")   # config: what the checkpoint's config.json says
    model.backbone.shifted, model.official_config          # its record, and that config
    shape(config)                                          # sizes by transformers' names, without making a model

A record says what a checkpoint's config.json and tensors are called, which blocks carry it and what it predicts.
Whatever differs between models is read from it: docs/backbones.md adds one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from treediff.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    Model = LlamaForCausalLM | Qwen2ForCausalLM


@dataclass(frozen=True)
class Backbone:
    """A family of masked-diffusion models: those whose config.json has one of these `model_types`."""

    title: str
    model_types: tuple[str, ...]
    blocks: str  # transformers' blocks that carry it: `llama` or `qwen2` (which has biases on queries, keys, values)
    shifted: bool  # the logits at position i are for token i + 1; otherwise for token i itself
    mask: str  # the mask token's text
    keys: dict[str, str] = field(default_factory=dict)  # transformers' name of a size -> config.json's, where another
    required: dict[str, Any] = field(default_factory=dict)  # what config.json may say without changing the computation
    names: tuple[tuple[str, str], ...] = ()  # (official, transformers') tensor names, block `N`; none: transformers'
    float32_rotary: bool = False  # the rotary embedding is computed in float32, whatever the dtype

    def official_name(self, name: str) -> str:
        """A parameter's name in this family's checkpoints, from transformers'."""
        if not self.names:
            return name
        named = {ours: official for official, ours in self.names}
        block = re.search(r"\.layers\.(\d+)\.", name)
        if not block:
            return named[name]
        return named[name.replace(block[0], ".layers.N.")].replace(".N.", f".{block[1]}.")

    def key(self, size: str) -> str:
        """What config.json calls one of transformers' sizes."""
        return self.keys.get(size, size)


LLADA = Backbone(
    title="LLaDA",
    model_types=("llada", ""),
    blocks="llama",
    shifted=False,
    mask="<|mdm_mask|>",
    keys={
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
    },
    required={
        "block_type": "llama",
        "layer_norm_type": "rms",
        "activation_type": "silu",
        "rope": True,
        "alibi": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "attention_layer_norm": False,
        "input_emb_norm": False,
        "scale_logits": False,
        "layer_norm_with_affine": True,
        "rope_full_precision": True,
        "block_group_size": 1,
    },
    names=(
        ("model.transformer.wte.weight", "model.embed_tokens.weight"),
        ("model.transformer.ln_f.weight", "model.norm.weight"),
        ("model.transformer.ff_out.weight", "lm_head.weight"),
        ("model.transformer.blocks.N.attn_norm.weight", "model.layers.N.input_layernorm.weight"),
        ("model.transformer.blocks.N.q_proj.weight", "model.layers.N.self_attn.q_proj.weight"),
        ("model.transformer.blocks.N.k_proj.weight", "model.layers.N.self_attn.k_proj.weight"),
        ("model.transformer.blocks.N.v_proj.weight", "model.layers.N.self_attn.v_proj.weight"),
        ("model.transformer.blocks.N.attn_out.weight", "model.layers.N.self_attn.o_proj.weight"),
        ("model.transformer.blocks.N.ff_norm.weight", "model.layers.N.post_attention_layernorm.weight"),
        ("model.transformer.blocks.N.ff_proj.weight", "model.layers.N.mlp.gate_proj.weight"),
        ("model.transformer.blocks.N.up_proj.weight", "model.layers.N.mlp.up_proj.weight"),
        ("model.transformer.blocks.N.ff_out.weight", "model.layers.N.mlp.down_proj.weight"),
    ),
    float32_rotary=True,
)
"""LLaDA-8B-Base, LLaDA-8B-Instruct, LLaDA-1.5."""

_QWEN2 = {"hidden_act": "silu", "use_sliding_window": False, "rope_scaling": None}
DREAM = Backbone(
    title="Dream",
    model_types=("Dream",),
    blocks="qwen2",
    shifted=True,
    mask="<|mask|>",
    required={**_QWEN2, "use_mrope": False},
)
"""Dream-v0-7B (Base, Instruct), Dream-Coder-v0-7B, DiffuCoder-7B."""

QWEN2 = Backbone("Qwen2", ("qwen2",), "qwen2", shifted=True, mask="<M>", required=_QWEN2)
"""Open-dCoder-0.5B; and Qwen2 and Qwen2.5, from which a diffusion model is made (`adapt`)."""

LLAMA = Backbone(
    title="Llama",
    model_types=("llama",),
    blocks="llama",
    shifted=True,
    mask="<M>",
    required={"hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False},
)
"""Causal models of Llama's shape, from which a diffusion model is made (`adapt`)."""

BACKBONES = (LLADA, DREAM, QWEN2, LLAMA)

LLADA_8B = {
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 32,
    "mlp_hidden_size": 12288,
    "embedding_size": 126464,
    "weight_tying": False,
}
"""The shape of GSAI-ML's 8B checkpoints (8,015,581,184 parameters), as their config.json has it."""
DREAM_7B = {
    "model_type": "Dream",
    "hidden_size": 3584,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "intermediate_size": 18944,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
"""The shape of Dream-v0-7B (7,615,616,512 parameters) and of what was made from it."""
QWEN_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
"""The shape of Qwen2.5-Coder-0.5B and of Open-dCoder-0.5B, which was made from it (494,032,768 parameters)."""
KNOWN: dict[str, dict[str, Any]] = {
    "GSAI-ML/LLaDA-8B-Instruct": LLADA_8B,
    "GSAI-ML/LLaDA-8B-Base": LLADA_8B,
    "GSAI-ML/LLaDA-1.5": LLADA_8B,
    "Dream-org/Dream-v0-Instruct-7B": DREAM_7B,
    "Dream-org/Dream-v0-Base-7B": DREAM_7B,
    "Dream-org/Dream-Coder-v0-Instruct-7B": DREAM_7B,
    "Dream-org/Dream-Coder-v0-Base-7B": DREAM_7B,
    "apple/DiffuCoder-7B-Base": DREAM_7B,
    "apple/DiffuCoder-7B-Instruct": DREAM_7B,
    "apple/DiffuCoder-7B-cpGRPO": DREAM_7B,
    "fredzzp/open-dcoder-0.5B": QWEN_05B,
    "Qwen/Qwen2.5-Coder-0.5B": QWEN_05B,
    "Qwen/Qwen2.5-Coder-0.5B-Instruct": QWEN_05B,
}
"""Sizes of checkpoints by hub id, so that a run can be planned before anything is downloaded."""

_REFUSED = (  # (what a name, model_type or architecture contains, why)
    (
        "illada",
        "iLLaDA's config.json and tensor names have not been seen, and are not guessed: with them it is one record",
    ),
    (
        r"(\b|_|llada|\d)moe|llada-?2",
        "its feed-forward layers are a mixture of experts, which no blocks here compute or train",
    ),
    (
        "sdar|diffcoder",
        "it is block-causal: a block of tokens sees those before it only, and attention here sees all",
    ),
)
_EXPERTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")


def refuse(name: str) -> None:
    """Raises UserError if a hub id, model_type or architecture is of a model that is known not to work, with why."""
    for pattern, reason in _REFUSED:
        if re.search(pattern, name, re.IGNORECASE):
            raise UserError(f"backbone: {name} is not supported: {reason} (docs/backbones.md).")


def of(config: dict[str, Any]) -> Backbone:
    """The record of a checkpoint, from its config.json. Raises UserError that says what cannot be carried, and why."""
    for name in (config.get("model_type") or "", *(config.get("architectures") or ())):
        refuse(str(name))
    if found := [k for k in _EXPERTS if config.get(k)]:
        raise UserError(
            f"backbone: its config.json has {found[0]}: a mixture of experts, which no blocks here compute or train "
            "(docs/backbones.md)."
        )
    kind = config.get("model_type") or ""
    record = next((b for b in BACKBONES if kind in b.model_types), None)
    if record is None:
        known = ", ".join(t for b in BACKBONES for t in b.model_types if t)
        raise UserError(f"backbone: its model_type {kind!r} has no record, only {known} have; see docs/backbones.md.")
    for key, value in record.required.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"backbone: {key} = {config[key]!r} is not supported, only {value!r}.")
    return record


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def shape(config: dict[str, Any]) -> SimpleNamespace:
    """The sizes that config.json gives, by transformers' names, and `biases`: whether q, k and v have them.

    Raises UserError as `of` does, or naming the size that is missing or does not fit.
    """
    record = of(config)
    sizes = {size: config.get(record.key(size)) for size in _SIZES}
    rows = config.get("embedding_size") or config.get("vocab_size")
    if missing := [record.key(size) for size, n in {**sizes, "vocab_size": rows}.items() if not n]:
        raise UserError(f"backbone: its config.json has no {missing[0]}; is it a {record.title} checkpoint's?")
    heads, d = sizes["num_attention_heads"], sizes["hidden_size"]
    shared = config.get(record.key("num_key_value_heads")) or (1 if config.get("multi_query_attention") else heads)
    if heads % shared or d % heads:
        raise UserError(
            f"backbone: {heads} heads cannot share {shared} key and value heads, or do not divide "
            f"{record.key('hidden_size')} {d} (config.json)."
        )
    if (size := config.get("head_dim")) and size != d // heads:
        raise UserError(f"backbone: head_dim = {size} is not supported, only {d // heads}.")
    tied = bool(config.get(record.key("tie_word_embeddings")))
    more = {"num_key_value_heads": shared, "vocab_size": rows, "tie_word_embeddings": tied}
    return SimpleNamespace(**sizes, **more, biases=record.blocks == "qwen2")


def empty(config: dict[str, Any], dtype: torch.dtype) -> Model:
    """A model of a config.json's shape on the meta device: no memory, no weights. Raises UserError as `shape` does."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    from treediff.model.attention import Attention

    record, sizes = of(config), vars(shape(config))
    del sizes["biases"]
    rope = config.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise UserError(f"backbone: rope_type = {kind!r} is not supported, only 'default'.")
    further = {name: config.get(record.key(name)) for name in ("max_position_embeddings", "rms_norm_eps")}
    further["rope_theta"] = config.get("rope_theta") or rope.get("rope_theta")
    if missing := [record.key(name) for name, value in further.items() if not value]:
        raise UserError(f"backbone: its config.json has no {missing[0]}; is it a {record.title} checkpoint's?")
    made, kind = (LlamaConfig, LlamaForCausalLM) if record.blocks == "llama" else (Qwen2Config, Qwen2ForCausalLM)
    # nn.Embedding gives the padding's row no gradient, as in the official Dream; LLaDA's own code names none.
    pad = config.get("pad_token_id") if record.blocks == "qwen2" else None
    llama = made(
        **sizes,
        max_position_embeddings=further["max_position_embeddings"],
        rms_norm_eps=further["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": further["rope_theta"]},
        use_cache=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=pad,
    )
    llama.is_causal = False
    # SDPA's backward on a CPU takes twice the time of plain matmul and softmax; on a GPU it is the flash path.
    llama._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    with torch.device("meta"):
        model = kind(llama).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        if record.float32_rotary:
            layer.self_attn.__class__ = Attention
    model.backbone, model.official_config = record, dict(config)
    return model


def finish(model: Model, device: str) -> Model:
    """Rebuild what is computed rather than loaded (the rotary table, in float32), tie if asked."""
    from treediff.model.attention import Rotary

    table = Rotary if model.backbone.float32_rotary else type(model.model.rotary_emb)
    model.model.rotary_emb = table(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def random_weights(config: dict[str, Any], dtype: torch.dtype, device: str) -> Model:
    """A model of a config.json's shape with weights drawn on the device, from torch's generator."""
    model = finish(empty(config, dtype).to_empty(device=device), device)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias"):
                weight.normal_(0, 0.1)
            elif weight.dim() == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0, weight.shape[1] ** -0.5)
    return model
