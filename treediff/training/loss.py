"""The loss of a micro-batch (Eq. 1), its sums by noise level and tier, and the held-out denoising accuracy.

    net = Denoiser(backbone)
    loss, ce = net(m.noisy, m.places, m.targets, m.weight, m.attention_mask)   # m: a Micro on the device

Nothing in here makes the host wait for the device: what a mask picks was worked out when the batch was made.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from treediff.masking import tokens
from treediff.model.forward import hidden_states, lm_head, predicting
from treediff.training.batch import NOISE_BUCKETS, Micro
from treediff.training.memory import LOGIT_ROWS

CELLS = len(NOISE_BUCKETS) - 1 + len(tokens.LABELS) + 1
"""Columns of a step's sums: noise buckets, labels, all."""


def masked_cross_entropy(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log p(x0 | x_t) at masked positions only: float32 (n,) from hidden (n, d) and targets int64 (n,).

    Chunk by chunk and recomputed in the backward pass, so that never more than CHUNK rows of logits exist.
    """

    def chunk(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(h).float(), t, reduction="none")

    if len(targets) <= LOGIT_ROWS:
        return chunk(hidden, targets)
    parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    # Nothing random happens in a chunk; saving the generator's state would make the host wait for the device.
    return torch.cat([checkpoint(chunk, h, t, use_reentrant=False, preserve_rng_state=False) for h, t in parts])


class Denoiser(nn.Module):
    """Backbone (and adapter) with the loss, in one module, so that DeepSpeed sees one forward pass."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(
        self,
        noisy: torch.Tensor,
        places: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The weighted sum of the masked tokens' cross-entropies, and each of them: scalar, float32 (n,).

        Shapes and types are Micro's. Without weights: whether each token is restored, bool (n,), and its cross-entropy.
        """
        places = predicting(self.backbone, places, noisy.shape[1])
        hidden = hidden_states(self.backbone, noisy, attention_mask).flatten(0, 1).index_select(0, places)
        head = lm_head(self.backbone)
        if weight is None:
            return _restored(head, hidden, targets)
        ce = masked_cross_entropy(head, hidden, targets)
        return (ce * weight).sum(), ce.detach()


def _restored(head: nn.Linear, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    right, ce = [], []
    for h, t in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
        logits = head(h).float()
        right.append(logits.argmax(-1) == t)
        ce.append(cross_entropy(logits, t, reduction="none"))
    return torch.cat(right), torch.cat(ce)


def no_sums(device: torch.device) -> torch.Tensor:
    """The sums of a step without any token: float64 (2, CELLS), row 0 cross-entropy, row 1 tokens."""
    return torch.zeros(2, CELLS, device=device, dtype=torch.float64)


def tally(sums: torch.Tensor, loss: torch.Tensor, ce: torch.Tensor, m: Micro) -> None:
    """Add a micro-batch to the step's sums, by noise bucket and by label; the last column holds the loss and n."""
    for row, value in enumerate((ce.double(), torch.ones_like(ce, dtype=torch.float64))):
        sums[row].index_add_(0, m.bucket, value)
        sums[row].index_add_(0, m.label + len(NOISE_BUCKETS) - 1, value)
    sums[0, -1] += loss.detach().double()
    sums[1, -1] += len(ce)
