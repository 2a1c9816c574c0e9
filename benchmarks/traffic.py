"""What a block of LLaDA-8B asks of a device, counted without one: python benchmarks/traffic.py [--tokens 4096]

On the meta device nothing is computed: every operation is seen with its shapes. Per block and token of a training step
(LoRA r 64, dropout, bf16, forward and backward) and per block and step of sampling: kernels, the bytes that elementwise
kernels and matrix products read and write, the bytes kept for the backward pass. Beside it the same with PEFT's layer,
whose scale is on the wide side, and with transformers' rotary embedding, which is not LLaDA's. Attention's kernel is
left out of the bytes, as if it were flash attention. What torch.compile fuses is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from treediff.config import resolve
from treediff.model import forward, llada, lora
from treediff.training import plan

MATRICES = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")


class Flash(torch.autograd.Function):
    """Stands in for an attention kernel: its result's shape, and what flash attention keeps."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@dataclass
class Count(TorchDispatchMode):
    """Counts what every operation that is no view reads and writes."""

    kernels: int = 0
    elementwise: int = 0  # bytes
    matrices: int = 0  # bytes
    names: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        returns = function._schema.returns
        view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        name = function.__name__.split(".")[0]
        if view or name in ("detach", "empty", "empty_like", "_unsafe_view", "_to_copy_view"):
            return out
        tensors = [t for t in _pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        self.kernels += 1
        self.names[name] = self.names.get(name, 0) + 1
        if name in MATRICES:
            self.matrices += moved
        else:
            self.elementwise += moved
        return out


def backbone(blocks: int = 1) -> nn.Module:
    """LLaDA-8B's shape with so many blocks, bf16, on the meta device."""
    config = {**plan.LLADA_8B, "n_layers": blocks, "max_sequence_length": 4096, "rms_norm_eps": 1e-5}
    model = llada.empty({**config, "rope_theta": 500000.0, "vocab_size": 126464}, torch.bfloat16)
    model.config._attn_implementation = "sdpa"
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **_: Flash.apply(q, k, v)
    return llada.finish(model, "meta")


def counted(work: Callable[[int], None]) -> Count:
    """The counts of one block: of `work` with two less of `work` with one."""
    one, two = Count(), Count()
    for blocks, count in ((1, one), (2, two)):
        work(blocks, count)
    names = {k: n for k, v in two.names.items() if (n := v - one.names.get(k, 0))}
    return Count(two.kernels - one.kernels, two.elementwise - one.elementwise, two.matrices - one.matrices, names)


def training(tokens: int, peft: bool = False, theirs: bool = False) -> tuple[Count, int]:
    """Of a block, forward and backward; and the bytes that it keeps for the backward pass.

    `peft` takes PEFT's own layer, `theirs` transformers' own rotary embedding.
    """
    from peft.tuners.lora.layer import Linear
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    kept: list[int] = []

    def work(blocks: int, count: Count) -> None:
        net = lora.add_lora(backbone(blocks), resolve("paper")).to(torch.bfloat16).train()
        for module in net.modules():
            if peft and isinstance(module, Linear):
                module.__class__ = Linear
            if theirs and isinstance(module, (LlamaAttention, LlamaRotaryEmbedding)):
                module.__class__ = type(module).__bases__[0]
        storages: dict[int, int] = {}
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        alive = []

        def pack(t: torch.Tensor) -> torch.Tensor:
            storage = t.untyped_storage()
            if storage._cdata not in weights:
                alive.append(storage)  # else its address is given to another
                storages[storage._cdata] = storage.nbytes()
            return t

        hidden = torch.empty(1, tokens, 4096, dtype=torch.bfloat16, device="meta", requires_grad=True)
        layers = net.get_base_model().model
        rotary = layers.rotary_emb(hidden, torch.arange(tokens, device="meta")[None])
        with count, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = hidden
            for layer in layers.layers:
                out = layer(out, attention_mask=None, position_embeddings=rotary)
            kept.append(sum(storages.values()))
            out.backward(torch.empty_like(out))

    found = counted(work)
    return found, kept[1] - kept[0]


def sampling(rows: int = 1, window: int = 32, canvas: int = 700) -> Count:
    """Of a block in one step with the dual cache."""

    def work(blocks: int, count: Count) -> None:
        net = backbone(blocks)
        with torch.no_grad():
            kept = forward.KeyValues()
            forward.window_states(net, torch.zeros(rows, canvas, dtype=torch.long, device="meta"), 0, None, kept)
            kept.window = slice(300, 300 + window)
            with count:
                ids = torch.zeros(rows, window, dtype=torch.long, device="meta")
                forward.window_states(net, ids, 300, None, kept)

    return counted(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    print("a block of LLaDA-8B, LoRA r 64, bf16, per token    kernels  elementwise kB  matrices kB   kept kB")
    base = 0
    cases = {"training, PEFT's layer, transformers' rotary": (True, True), "training, PEFT's layer": (True, False)}
    for name, case in (cases | {"training": (False, False)}).items():
        c, kept = training(args.tokens, *case)
        base = base or c.elementwise
        per = (c.elementwise / args.tokens / 1e3, c.matrices / args.tokens / 1e3, kept / args.tokens / 1e3)
        print(f"{name:51}{c.kernels:7}{per[0]:16.1f}{per[1]:13.1f}{per[2]:10.1f}  ratio {c.elementwise / base:.3f}")
    c, name = sampling(), "sampling, dual cache, a step of 32 tokens"
    print(f"{name:51}{c.kernels:7}{c.elementwise / 32e3:16.1f}{c.matrices / 32e3:13.1f}")


if __name__ == "__main__":
    main()
