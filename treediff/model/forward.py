"""Forward passes: hidden states of a whole canvas, or of a window of it beside cached keys and values.

    hidden = hidden_states(model, ids)                      # (B, L, d)
    logits = lm_head(model)(hidden[mask])                   # only where they are needed

Attention is bidirectional; padding is hidden, never seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def shifted(model: nn.Module) -> bool:
    """Whether the hidden state at a position predicts the next token, not the one that stands there."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).backbone.shifted


def predicting(model: nn.Module, places: torch.Tensor, length: int) -> torch.Tensor:
    """Where the hidden states lie that predict the tokens at `places`, both int64 (n,) in the flattened (B, length).

    Under shift that is one place before; a row's first token, which has none, is predicted at its own, as in Dream.
    """
    return places - (places % length != 0).long() if shifted(model) else places


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
    They stay where they are in memory, so that a recorded pass finds them; fewer rows use the first of them.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.window: slice | torch.Tensor | None = None  # which tokens, int64 (W,) on a device; None: the whole canvas

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What transformers' attention calls: the keys and values to attend to."""
        if layer not in self.layers:
            self.layers[layer] = (keys, values)
            return keys, values
        held = self.layers[layer]
        both = held[0][: len(keys)], held[1][: len(keys)]
        for kept, new in zip(both, (keys, values), strict=True):
            if self.window is None:
                kept.copy_(new)
            elif isinstance(self.window, slice):
                kept[:, :, self.window] = new
            else:
                kept.index_copy_(2, self.window, new)
        return both

    def keep(self, rows: torch.Tensor) -> None:
        """Keep these rows (int64) of the batch only."""
        for both in self.layers.values():
            for kept in both:
                kept[: len(rows)] = kept[rows]


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


class Replay:
    """`window_states` for one canvas, again and again: on a GPU each shape is recorded once and then replayed.

    LLaDA's 1,500 kernels of a step take longer to launch one by one than to run; a CUDA graph launches them together.
    The result lies where the next call of the same shape puts its own. On a CPU this is `window_states` itself.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorded: dict[Any, tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]] = {}

    def __call__(
        self, ids: torch.Tensor, first: int | torch.Tensor, bias: torch.Tensor | None, kept: KeyValues | None
    ) -> torch.Tensor:
        """Last hidden states (B, W, d): see `window_states`."""
        if ids.device.type != "cuda" or (kept is not None and not kept.layers):  # the first pass makes what is kept
            return window_states(self.model, ids, first, bias, kept)
        if isinstance(first, int):
            first = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
        given = [ids, first]
        if kept is not None:
            window = kept.window or slice(0, ids.shape[1])
            given.append(torch.arange(window.start, window.stop, device=ids.device))
        if bias is not None:
            given.append(bias)
        key = (kept is not None, bias is not None, *(t.shape for t in given))
        if key not in self.recorded:
            self.recorded[key] = self.record(given, bias is not None, kept)
        graph, places, hidden = self.recorded[key]
        for to, new in zip(places, given, strict=True):
            to.copy_(new)
        graph.replay()
        return hidden

    def record(
        self, given: list[torch.Tensor], hides: bool, kept: KeyValues | None
    ) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor], torch.Tensor]:
        """The graph, where its inputs lie, and where its result will."""
        places = [t.clone() for t in given]
        bias = places[-1] if hides else None
        if kept is not None:
            before, kept.window = kept.window, places[2]
        graph, beside, main = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
        pool = next(iter(self.recorded.values()))[0].pool() if self.recorded else None
        beside.wait_stream(main)
        with torch.cuda.stream(beside):
            window_states(self.model, places[0], places[1], bias, kept)  # libraries make their workspaces
            graph.capture_begin(*[p for p in [pool] if p], capture_error_mode="thread_local")
            hidden = window_states(self.model, places[0], places[1], bias, kept)
            graph.capture_end()
        main.wait_stream(beside)
        if kept is not None:
            kept.window = before
        return graph, places, hidden
