"""LLaDA's attention in transformers' blocks: the rotary embedding in float32, as its `rope_full_precision` says.

    layer.self_attn.__class__ = Attention           # backbones.empty does it
    model.model.rotary_emb = Rotary(model.config)   # its table of sines and cosines stays in float32

transformers rounds the table and every product to the model's dtype. In float32 both give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.llama.modeling_llama import (
    ALL_ATTENTION_FUNCTIONS,
    LlamaAttention,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)


class Rotary(LlamaRotaryEmbedding):
    """Cosines and sines of positions int64 (1, L), float32 (1, L, d_head) each, whatever the dtype of `x`."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Computed in float32, as the class says."""
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries or keys (B, heads, L, d_head), rotated in float32 and rounded once, to their own dtype."""
    wide = x.float()
    half = wide.shape[-1] // 2
    turned = torch.cat((-wide[..., half:], wide[..., :half]), dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)


@torch.compiler.disable  # else torch.compile would compile each layer anew, for its number
def _kept(layer: LlamaAttention, kept: Any, keys: torch.Tensor, values: torch.Tensor) -> Any:
    return kept.update(keys, values, layer.layer_idx)


class Attention(LlamaAttention):
    """Llama's attention with `rotate`."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Output (B, L, d) and the attention weights, if the implementation has any, from hidden states (B, L, d)."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        queries, keys, values = (project(hidden_states).view(shape).transpose(1, 2) for project in projections)
        cos, sin = (t[:, None] for t in position_embeddings)
        queries, keys = rotate(queries, cos, sin), rotate(keys, cos, sin)
        if past_key_values is not None:
            keys, values = _kept(self, past_key_values, keys, values)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(self, queries, keys, values, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights
