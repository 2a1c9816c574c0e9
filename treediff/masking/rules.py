"""The noise schedule and the corruption rules (3.2 to 3.4, appendix A.2 and C).

    batch = dict(uid=..., labels=...)                       # int64 (B,), uint8 (B, L)
    p = noise_level(cfg, uid, step, total_steps)            # float64 (B,): P_mask of each sample
    mask = corrupt(cfg, labels, spans, uid, step, p)        # bool (B, L)

Everything is pure: a mask depends on (seed, sample id, optimiser step), never on rank, batch layout or resume,
because its randomness is a hash of those and of the position (`uniform`) instead of a generator's state. The hash is
integer arithmetic, so it is the same on every device. `random` and `ast` run on the device of `labels`;
`ast_span` is sequential by definition (Algorithm 2) and runs on the host, as do `identifier` and `line`, two rules
beyond the paper. A new rule is a function of (cfg, Draw) and a record in strategies.py (docs/rules.md).
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from treediff.config import Config
from treediff.masking.tokens import CODE, PROMPT, REASONING
from treediff.strategies import STRATEGIES

# What a random number is for: streams of one (seed, sample, step) that never meet.
NOISE, TOKENS, SHUFFLE, ACCEPT, FILL = 0, 1, 3, 4, 5
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64: splitmix64's increment
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def _wrap(x: int) -> int:
    """x modulo 2**64, as int64 sees it."""
    return (x + 2**63) % 2**64 - 2**63


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (wrapping arithmetic; `>>` on int64 keeps the sign, hence the masks)."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(seed: int, uid: torch.Tensor, step: int, stream: int, n: int) -> torch.Tensor:
    """U(0, 1) numbers, float64 (B, n), strictly inside: a function of its arguments alone, prefix-stable in n."""
    key = uid
    for part in (seed, step, stream):
        key = _mix(key + _wrap(part * _GOLDEN))
    position = torch.arange(1, n + 1, device=uid.device) * _GOLDEN
    bits = (_mix(key[:, None] + position[None, :]) >> 11) & ((1 << 53) - 1)
    return (bits.double() + 0.5) * 2.0**-53


def eps_at(cfg: Config, step: int, total: int) -> float:
    """eps_t, the floor of the noise level at optimiser step `step` (0-based) of `total` (A.2)."""
    if cfg.noise == "constant":
        return cfg.eps_min
    done = step / max(1, total - 1)
    return cfg.eps_min + 0.5 * (cfg.eps_max - cfg.eps_min) * (1 + math.cos(math.pi * min(1.0, done)))


def noise_level(cfg: Config, uid: torch.Tensor, step: int, total: int) -> torch.Tensor:
    """P_mask = (1 - eps_t) u + eps_t per sample, u ~ U(0, 1): float64 (B,) (A.2)."""
    eps = eps_at(cfg, step, total)
    return (1 - eps) * uniform(cfg.seed, uid, step, NOISE, 1)[:, 0] + eps


def schedule(cfg: Config, total: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For pictures: steps, eps_t at each, and the noise level that one sample draws at each, arrays of `total`."""
    uid = torch.arange(total)
    drawn = [float(noise_level(cfg, uid[i : i + 1], i, total)) for i in range(total)]
    return np.arange(total), np.array([eps_at(cfg, i, total) for i in range(total)]), np.array(drawn)


class Draw(NamedTuple):
    """What a rule masks the code of a batch by. It answers with the code positions to mask, bool (B, L)."""

    labels: torch.Tensor  # uint8 (B, L): `tokens.LABELS` by code
    groups: list[np.ndarray]  # per sample the column that the rule reads, int32 (n, 3): tokens [start, end), number
    uid: torch.Tensor  # int64 (B,): sample ids
    step: int  # of the optimiser
    p: torch.Tensor  # float64 (B,): noise levels
    u: torch.Tensor  # float64 (B, L): uniform numbers, one stream for all rules
    budget: torch.Tensor  # int64 (B,): floor(P L_code), the code tokens to mask

    @property
    def code(self) -> torch.Tensor:
        """The code positions, bool (B, L)."""
        return self.labels >= CODE


def corrupt(
    cfg: Config,
    labels: torch.Tensor,
    groups: list[np.ndarray] | None,
    uid: torch.Tensor,
    step: int,
    p: torch.Tensor,
) -> torch.Tensor:
    """The positions to mask: bool (B, L). Arguments as in `Draw`; p: float64 (B,) from `noise_level`.

    Reasoning is masked token by token with probability P (3.2), the prompt never; code by the rule of `cfg.masking`.
    The backbone itself (`none`) is trained by random masking.
    """
    u = uniform(cfg.seed, uid, step, TOKENS, labels.shape[1])
    # Exact in float64: the largest N with N <= P L.
    budget = torch.floor(p * (labels >= CODE).sum(1)).long()
    draw = Draw(labels, groups if groups is not None else [], uid, step, p, u, budget)
    name = STRATEGIES[cfg.masking].rule or STRATEGIES["random"].rule
    rule: Callable[[Config, Draw], torch.Tensor] = pkgutil.resolve_name(name)
    return (u < p[:, None]) & (labels == REASONING) | rule(cfg, draw)


def random_mask(cfg: Config, draw: Draw) -> torch.Tensor:
    """The baseline (4.1): each code token with probability P, or exactly `budget` of them (`random_budget`)."""
    if cfg.random_budget == "exact":
        return take(torch.where(draw.code, draw.u, torch.inf), draw.budget)
    return draw.code & (draw.u < draw.p[:, None])


def take(keys: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Per row the `budget` smallest keys, ties by position: bool, like `keys` (B, L), L < 2**20.

    Keys are float32 (compared exactly) or float64 (compared to 32 significant bits, so that a last bit in which two
    devices' logarithms differ does not change a mask).
    """
    bits = keys.double().view(torch.int64)
    bits = bits ^ ((bits >> 63) & (2**63 - 1))  # doubles in order are integers in order
    rank = (bits & -(2**20)) | torch.arange(keys.shape[1], device=keys.device)  # no two alike: any sort will do
    # On a CPU numpy's sort is vectorised and takes a tenth of torch's time.
    on_host = rank.device.type == "cpu"
    ordered = torch.from_numpy(np.sort(rank.numpy(), axis=1)) if on_host else rank.sort(dim=1).values
    last = ordered.gather(1, (budget - 1).clamp(min=0)[:, None])
    return (rank <= last) & (budget > 0)[:, None]


def ast_mask(cfg: Config, draw: Draw) -> torch.Tensor:
    """Algorithm 1: `budget` code tokens of each sample by weighted sampling without replacement, bool (B, L).

    The N smallest of -log(1 - u) / w (exponential keys, Efraimidis and Spirakis) are a weighted sample without
    replacement; with equal weights they are those that exact random masking takes. Tokens of weight 0 come after all
    others in uniform order: the paper's fallback fill. With `budget = bernoulli` each token is drawn alone, with
    probability min(1, c w), c such that they sum to P L.
    """
    by_label = torch.tensor(cfg.weights(), dtype=torch.float64, device=draw.labels.device)
    label, code, u = draw.labels.int(), draw.code, draw.u
    if cfg.budget == "bernoulli":
        return code & (u < _scaled(by_label[label], code, draw.p * code.sum(1)))
    key = torch.log1p(-u) * (-1 / by_label)[label]  # infinite where the weight is 0, as it is outside the code
    if not all(cfg.weights()[CODE:]):
        key = torch.where(code & key.isinf(), 1e300 * (1 + u), key)
    return take(key, draw.budget)


def expected_inclusion(weights: np.ndarray, budget: float) -> np.ndarray:
    """Theory: each token's probability to be among `budget` weighted draws without replacement, float64 like `weights`.

    1 - exp(-w t), t such that they sum to the budget (Rosén 1972): exact in the limit of many tokens.
    """
    from scipy.optimize import brentq

    live = weights > 0
    if budget >= live.sum():  # all of them, and the fill among the rest
        return np.where(live, 1.0, (budget - live.sum()) / max(1, (~live).sum()))
    excess = lambda log_t: -np.expm1(-weights * np.exp(log_t)).sum() - budget  # noqa: E731
    return -np.expm1(-weights * np.exp(brentq(excess, -50, 50))) if budget > 0 else np.zeros(len(weights))


def _scaled(weight: torch.Tensor, code: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """min(1, c w) with the c that makes each row sum to `target` (weights of 0 share what is left). float64 (B, L)."""
    prob = torch.zeros_like(weight)
    live = code & (weight > 0)
    full = torch.zeros_like(live)
    for _ in range(8):  # each round fixes at least one tier at 1, and there are five
        rest = (target - full.sum(1)).clamp(min=0)[:, None]
        part = torch.where(live & ~full, weight, 0)
        prob = torch.where(full, 1.0, part * rest / part.sum(1, keepdim=True).clamp(min=1e-300))
        full = full | (prob >= 1)
    idle = code & ~live
    rest = (target - prob.clamp(max=1).sum(1)).clamp(min=0)[:, None]
    return torch.where(idle, rest / idle.sum(1, keepdim=True).clamp(min=1), prob.clamp(max=1))


def span_mask(cfg: Config, draw: Draw) -> torch.Tensor:
    """Algorithm 2: whole AST spans in random order, each taken with its tier's weight as probability unless it meets
    one taken before, until the budget is reached (the last span may pass it); then uniform fill. bool (B, L).
    """
    rows, width = draw.labels.shape
    code = draw.code.cpu()
    most = max([len(s) for s in draw.groups], default=0)
    host = draw.uid.cpu()
    order = uniform(cfg.seed, host, draw.step, SHUFFLE, most).numpy()
    accept = uniform(cfg.seed, host, draw.step, ACCEPT, most).numpy()
    probability = np.array(cfg.weights()[CODE:])
    mask = np.zeros((rows, width), np.uint8)
    for row, (span, n) in enumerate(zip(draw.groups, draw.budget.tolist(), strict=True)):
        if n == 0:
            continue  # the pseudo-code tests its budget after the first span; a budget of 0 must mask nothing
        # Acceptance is independent of everything else, so it can be drawn for all spans before the loop.
        shuffled = np.argsort(order[row, : len(span)], kind="stable")
        kept = span[shuffled[accept[row, shuffled] < probability[span[shuffled, 2]]]]
        mask[row] = np.frombuffer(_take_spans(kept, n, width), np.uint8)
    chosen = torch.from_numpy(mask).bool()
    fill = uniform(cfg.seed, host, draw.step, FILL, width)
    missing = (draw.budget.cpu() - chosen.sum(1)).clamp(min=0)
    chosen |= take(torch.where(code & ~chosen, fill, torch.inf), missing)
    return chosen.to(draw.labels.device)


def _take_spans(spans: np.ndarray, budget: int, width: int) -> bytearray:
    """Mask spans in the given order, skipping any that meets an earlier one, until `budget` tokens are masked."""
    mask, ones, count = bytearray(width), b"\1" * width, 0
    for start, end in spans[:, :2].tolist():
        if mask.find(1, start, end) < 0:
            mask[start:end] = ones[: end - start]
            count += end - start
            if count >= budget:
                break
    return mask


def group_mask(cfg: Config, draw: Draw) -> torch.Tensor:
    """Groups of code tokens that are masked together or not at all, in random order, as long as they fit: bool (B, L).

    `identifier`: all occurrences of a name (the cross-tree links R of 3.2). `line`: all tokens of a line. A group too
    large for what is left of the budget is passed over; the rest is filled uniformly, so that the budget is exact.
    """
    chosen = torch.zeros(draw.labels.shape, dtype=torch.bool)
    most = max([len(g) for g in draw.groups], default=0)
    order = uniform(cfg.seed, draw.uid.cpu(), draw.step, SHUFFLE, most).numpy()
    for row, (group, left) in enumerate(zip(draw.groups, draw.budget.tolist(), strict=True)):
        spans = group[np.argsort(group[:, 2], kind="stable")]  # each group's spans side by side
        first = np.flatnonzero(np.diff(spans[:, 2], prepend=-1))
        sizes = np.add.reduceat(spans[:, 1] - spans[:, 0], first) if len(first) else first
        ends = np.append(first, len(spans))[1:]
        for i in np.argsort(order[row, : len(first)], kind="stable"):
            if sizes[i] <= left:
                left -= sizes[i]
                for start, end in spans[first[i] : ends[i], :2]:
                    chosen[row, start:end] = True
    chosen = chosen.to(draw.labels.device)
    missing = draw.budget - chosen.sum(1)
    return chosen | take(torch.where(draw.code & ~chosen, draw.u, torch.inf), missing)


def node_mask(cfg: Config, draw: Draw) -> torch.Tensor:
    """One AST node of each sample, the one whose size is nearest to the budget, of several a random one: bool (B, L).

    Beyond the paper: training for holes (sampling/infill.py). The noise level decides how large the node is, so that
    nodes of all sizes are learnt, and masks no other code; the reasoning is masked as under every other rule.
    """
    mask = torch.zeros(draw.labels.shape, dtype=torch.bool)
    most = max([len(s) for s in draw.groups], default=0)
    tie = uniform(cfg.seed, draw.uid.cpu(), draw.step, SHUFFLE, most).numpy()
    for row, (span, n) in enumerate(zip(draw.groups, draw.budget.tolist(), strict=True)):
        if len(span):
            start, end, _ = span[np.argmin(np.abs(span[:, 1] - span[:, 0] - n) + tie[row, : len(span)])].tolist()
            mask[row, start:end] = True
    return mask.to(draw.labels.device)


def apply_mask(ids: torch.Tensor, mask: torch.Tensor, mask_id: int) -> torch.Tensor:
    """x_t: `ids` (B, L) with the mask token wherever `mask` is set."""
    return torch.where(mask, mask_id, ids)


assert PROMPT < REASONING < CODE  # what the comparisons above rely on
