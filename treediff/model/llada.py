"""LLaDA's shape with weights of our own: made on the spot for a run, or at random for measuring.

model = new_backbone(cfg, vocab_size, eos_id, mask_id)  # saved and loaded in LLaDA's checkpoint format
model = random_backbone(shape, torch.bfloat16, "cuda")
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from treediff.config import Config
from treediff.model import backbones

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

empty, finish = backbones.empty, backbones.finish
official_name = backbones.LLADA.official_name


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
        **backbones.LLADA.required,
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
    config = {"max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, **shape}
    return backbones.random_weights({**backbones.LLADA.required, **config}, dtype, device)
