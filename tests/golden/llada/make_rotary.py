"""Makes rotary.safetensors: python tests/golden/llada/make_rotary.py

Queries in bf16 and what LLaDA's rotary embedding makes of them, by a float32 twin in NumPy (no torch, no transformers).
Rounding, stated: angle = position * theta^(-2i/d) in float32, each factor and product too; cosines and sines of these
angles to float32; x cos + turned(x) sin in float32, each operation rounded to nearest even; then once to bf16, to
nearest even. Positions reach to the end of LLaDA's canvas, theta and head size are LLaDA-8B's.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

D, THETA = 128, 500000.0
POSITIONS = np.array([0, 1, 2, 3, 17, 255, 1023, 2048, 3071, 4000, 4094, 4095])


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 rounded to the nearest bf16, ties to even, as the upper 16 bits."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def main() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, len(POSITIONS), D)).astype(np.float32)
    bits = to_bf16(drawn)
    x = from_bf16(bits)
    inverse = np.float32(1.0) / np.float32(THETA) ** (np.arange(0, D, 2, dtype=np.float32) / np.float32(D))
    angle = POSITIONS.astype(np.float32)[:, None] * inverse.astype(np.float32)
    angle = np.concatenate([angle, angle], 1)
    cos, sin = np.cos(angle.astype(np.float64)).astype(np.float32), np.sin(angle.astype(np.float64)).astype(np.float32)
    turned = np.concatenate([-x[..., D // 2 :], x[..., : D // 2]], -1)
    out = to_bf16((x * cos).astype(np.float32) + (turned * sin).astype(np.float32))
    tensors = {name: torch.from_numpy(b.view(np.int16)).view(torch.bfloat16) for name, b in (("x", bits), ("out", out))}
    tensors |= {"positions": torch.from_numpy(POSITIONS)}
    save_file(tensors, Path(__file__).with_name("rotary.safetensors"))


if __name__ == "__main__":
    main()
