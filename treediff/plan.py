"""plan"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    total: int
    trained: int
    vocabulary: int

    @classmethod
    def of(cls, net):
        p = list(net.parameters())
        return cls(sum(x.numel() for x in p), sum(x.numel() for x in p if x.requires_grad), net.config.vocab_size)

    @property
    def flops_per_token(self):
        return 4 * self.total


def peak_flops(cfg, world):
    return None
