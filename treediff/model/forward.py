"""Forward passes: hidden states of a whole canvas, or of a window of it beside cached keys and values.

    hidden = hidden_states(model, ids)                      # (B, L, d)
    logits = lm_head(model)(hidden[mask])                   # only where they are needed

Attention is bidirectional; padding is hidden, never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from treediff.config import Config


def hidden_states(model: nn.Module, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Last hidden states (B, L, d) of token ids (B, L); `attention_mask` (B, L) is 0 at padding, None without any."""
    llama = model.get_base_model() if hasattr(model, "get_base_model") else model
    if attention_mask is not None:
        # transformers would look into the mask, which makes the host wait for the device; one of four axes it takes as
        # it is. It broadcasts over heads and queries, so that (B, 1, L, L) never exists.
        seen = attention_mask.bool()[:, None, None, :]
        if llama.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = llama.dtype
            seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
        attention_mask = seen
    return llama.model(input_ids=ids, attention_mask=attention_mask).last_hidden_state


def cudnn_serves(cfg: Config) -> bool:
    """Whether cuDNN's attention may serve a training: where no mask can occur, and few shapes do.

    It makes a plan for each new shape (up to 0.9 s), and with a mask its gradients may be NaN (pytorch issue 196678).
    Rows of a multiple of 128 tokens, one to a micro-batch, have at most max_length / 128 shapes and no mask.
    """
    return cfg.eos_padding == "multiple" and cfg.micro_batch == 1


@contextmanager
def cudnn(on: bool) -> Iterator[None]:
    """Allow or forbid cuDNN's attention meanwhile. Without it a GPU uses flash attention, or a mask's own kernel."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def lm_head(model: nn.Module) -> nn.Linear:
    """The projection from hidden states to logits."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).lm_head


class KeyValues:
    """Keys and values (B, heads, L, d_head) of every block for a canvas of L tokens.

    A pass over the whole canvas fills them; a later pass over a window of it rewrites the window's and sees the rest.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.window: slice | None = None  # None: the whole canvas

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers' attention calls: the keys and values to attend to."""
        if self.window is None:
            self.layers[layer] = (keys, values)
        else:
            for kept, new in zip(self.layers[layer], (keys, values), strict=True):
                kept[:, :, self.window] = new
        return self.layers[layer]

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64) of the batch only."""
        self.layers = {i: (keys[rows], values[rows]) for i, (keys, values) in self.layers.items()}


def padding_bias(model: nn.Module, attention_mask: torch.Tensor) -> torch.Tensor:
    """What is added to attention scores to hide padding: (B, 1, 1, L), from (B, L) with 0 at padding."""
    bias = torch.zeros(attention_mask.shape, dtype=lm_head(model).weight.dtype, device=attention_mask.device)
    return bias.masked_fill(attention_mask == 0, torch.finfo(bias.dtype).min)[:, None, None]


def window_states(
    model: nn.Module, ids: torch.Tensor, first: int | torch.Tensor, bias: torch.Tensor | None, kept: KeyValues | None
) -> torch.Tensor:
    """Last hidden states (B, W, d) of the window `ids` (B, W) of a canvas, which begins at position `first`.

    Where the canvas is not in the order of the text, `first` are the tokens' places in the text, int64 (B, W).

    Without `kept` the window is the whole canvas. `bias`: see `padding_bias`. For sampling: where `encode` builds its
    mask anew and reads it on the host, this only queues work on the device.
    """
    llama = (model.get_base_model() if hasattr(model, "get_base_model") else model).model
    hidden = llama.embed_tokens(ids)
    if isinstance(first, int):
        first = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    rotary = llama.rotary_emb(hidden, first)
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary, past_key_values=kept)
    return llama.norm(hidden)
