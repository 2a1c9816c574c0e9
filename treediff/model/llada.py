"""The LLaDA backbone: a bidirectional Llama from transformers' blocks, in LLaDA's checkpoint format; LoRA.

    model = load_backbone(folder, dtype=torch.bfloat16)     # official GSAI-ML/LLaDA files, by tensor name
    hidden = encode(model, ids)                             # (B, L, d)
    logits = model.lm_head(hidden[mask])                    # only where they are needed
    save_backbone(model, folder)                            # the same format back, sharded where it is large

No remote code: LLaDA's blocks are Llama's without the causal mask. A tensor that is missing, left over or of another
shape is an error that names it. A backbone made on the spot (`new_backbone`) is saved and loaded the same way.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from treediff.config import Config
from treediff.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


_NAMES = (  # official -> transformers; `N` is the block's number
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
)
_TO_OFFICIAL = {ours: official for official, ours in _NAMES}

# What a LLaDA config may say without changing the computation below.
_REQUIRED = {
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
}
_SHAPE = (  # what config.json must say
    "d_model",
    "n_layers",
    "n_heads",
    "mlp_hidden_size",
    "vocab_size",
    "max_sequence_length",
    "rms_norm_eps",
    "rope_theta",
)


def _kv_heads(config: dict[str, Any]) -> int:
    return config.get("n_kv_heads") or (1 if config.get("multi_query_attention") else config["n_heads"])


def official_name(name: str) -> str:
    """A parameter's name in LLaDA's checkpoints."""
    block = re.search(r"\.layers\.(\d+)\.", name)
    if not block:
        return _TO_OFFICIAL[name]
    return _TO_OFFICIAL[name.replace(block[0], ".layers.N.")].replace(".N.", f".{block[1]}.")


def empty(config: dict[str, Any], dtype: torch.dtype) -> LlamaForCausalLM:
    """A model of a LLaDA config's shape on the meta device: no memory, no weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from treediff.model.attention import Attention

    for key, value in _REQUIRED.items():
        if config.get(key, value) not in (value, None):
            raise UserError(f"backbone: {key} = {config[key]!r} is not supported, only {value!r}.")
    if missing := [k for k in _SHAPE if not config.get(k)]:
        raise UserError(f"backbone: its config.json has no {missing[0]}; is it a LLaDA checkpoint's?")
    if config["n_heads"] % _kv_heads(config) or config["d_model"] % config["n_heads"]:
        raise UserError(
            f"backbone: {config['n_heads']} heads cannot share {_kv_heads(config)} key and value heads, or do not "
            f"divide d_model {config['d_model']} (config.json)."
        )
    llama = LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config["mlp_hidden_size"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=_kv_heads(config),
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
        tie_word_embeddings=config.get("weight_tying", False),
        use_cache=False,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=config.get("eos_token_id"),
    )
    llama.is_causal = False
    # SDPA's backward on a CPU takes twice the time of plain matmul and softmax; on a GPU it is the flash path.
    llama._attn_implementation = "sdpa" if torch.cuda.is_available() else "eager"
    with torch.device("meta"):
        model = LlamaForCausalLM(llama).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
        layer.self_attn.__class__ = Attention
    model.llada_config = dict(config)
    return model


def finish(model: LlamaForCausalLM, device: str) -> LlamaForCausalLM:
    """Rebuild what is computed rather than loaded (the rotary table, in float32), tie if asked."""
    from treediff.model.attention import Rotary

    model.model.rotary_emb = Rotary(model.config).to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def new_backbone(cfg: Config, vocab_size: int, eos_id: int, mask_id: int) -> LlamaForCausalLM:
    """A backbone in LLaDA's shape with fresh weights, drawn from `cfg.seed`, in float32.

    Query and key start out alike, the output projection close to the value's transpose, and the head along the
    embeddings: attention that begins by looking for equal tokens, handing on what it sees, and naming it.
    """
    config = {
        "model_type": "llada",
        "d_model": cfg.d_model,
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_heads,
        "mlp_hidden_size": cfg.mlp_hidden,
        "vocab_size": vocab_size,
        "embedding_size": vocab_size,
        "max_sequence_length": 4 * cfg.max_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "weight_tying": False,
        "eos_token_id": eos_id,
        "pad_token_id": eos_id,
        "mask_token_id": mask_id,
        "torch_dtype": "float32",
        **_REQUIRED,
    }
    model = finish(empty(config, torch.float32).to_empty(device="cpu"), "cpu")
    draw = torch.Generator().manual_seed(cfg.seed)
    d = cfg.d_model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif "embed" in name:
                weight.normal_(0, 1, generator=draw)
            elif "lm_head" in name:
                weight.copy_(0.1 * model.model.embed_tokens.weight)  # not tied: each goes its own way from here
            else:
                weight.normal_(0, weight.shape[1] ** -0.5, generator=draw)
        for layer in model.model.layers:
            attn = layer.self_attn
            noise = torch.randn(2, d, d, generator=draw) * (0.3 * d**-0.5)
            attn.k_proj.weight.copy_(attn.q_proj.weight + noise[0])
            attn.o_proj.weight.copy_(attn.v_proj.weight.T + noise[1])
    return model


def random_backbone(shape: dict[str, int], dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """A backbone of a given shape with weights drawn on the device: for measuring speed, where their values are idle.

    `shape` gives d_model, n_layers, n_heads, mlp_hidden_size and vocab_size, as LLaDA's config.json calls them.
    """
    config = {**_REQUIRED, **shape, "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    model = finish(empty(config, dtype).to_empty(device=device), device)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.dim() == 1 else weight.normal_(0, weight.shape[1] ** -0.5)
    return model
