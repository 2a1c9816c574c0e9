"""The semi-autoregressive sampler (A.1, after LLaDA): blocks, steps, commitment; and its fast modes. Nothing else.

    out = decode(net, prompts, Decoding(mask_id=126336, ends=(126081, 126348), gen_length=256, steps=256,
                                        block_length=32))
    out.ids, out.committed_at, out.confidence           # (B, gen_length)
    out.state(row=0, step=110, mask_id=126336)          # the answer before step 110

The canvas is prompt + gen_length masks. Blocks are decoded from left to right; at each denoising step every mask of the
block proposes its most likely token, and some proposals are committed for good: as many as the schedule says, the
most confident first (`exactly`), or all that are confident enough (`confidently`). Each of the two reads the whole
canvas at each step, or keeps what it knows of the tokens outside the block until the block is done (`cache`).

Holes of a text are decoded in the same way (infill.py). A bidirectional model knows a token's place by its number
alone, so the canvas holds the known text first and the masks after it, and `places` says where each token belongs.

Dream's algorithms are values of `remasking` and `schedule`. A backbone whose logits are for the next token is read one
place before each (`_Run.before`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from treediff.errors import UserError
from treediff.masking.rules import uniform
from treediff.model import forward

NEVER = -1
"""committed_at of a token that was never decoded because its row had ended before it."""
GUMBEL, ORDER = 0, 1  # streams of random numbers
LOGIT_ROWS = 512
"""Positions whose logits over the vocabulary are held at a time: 260 MB in float32 at LLaDA's vocabulary."""


@dataclass(frozen=True)
class Decoding:
    """How to decode. Lengths in tokens, `steps` in denoising steps over the whole canvas."""

    mask_id: int
    ends: tuple[int, ...]  # tokens that end an answer; the first is EOS
    gen_length: int
    steps: int
    block_length: int
    temperature: float = 0.0  # > 0: Gumbel noise in float64
    guidance: float = 0.0  # > 0: classifier-free guidance away from what the model says without the prompt
    remasking: str = "low_confidence"  # what is committed first: see `propose`; `random`; `origin`: each by chance
    schedule: str = "even"  # tokens a step: as many at each, or by Dream's `timestep`
    eps: float = 1e-3  # the time at which Dream's schedule ends
    top_p: float = 1.0  # < 1: only the likeliest tokens that have this share of the probability together
    top_k: int = 0  # > 0: only so many tokens, the likeliest
    eos_suppression: str = "off"  # `logits`: EOS is never proposed; `confidence`: EOS and EOT are committed last
    threshold: float = 0.0  # > 0: commit all proposals of at least this confidence, and one at the least
    cache: str = "none"  # keys and values kept during a block: of the tokens before it (prefix), or all others (dual)
    early_exit: bool = True  # a row whose text has ended leaves the batch
    holes: int = 0  # > 0: holes of any length are decoded, so many tokens a step, and no end of text ends them
    official: bool = False  # the model's own loop to the letter: may commit the mask token, never ends early
    seed: int = 0

    def __post_init__(self) -> None:
        if self.remasking == "origin" and self.schedule != "timestep":
            raise UserError("remasking: origin commits by the chance that the timestep schedule gives; set schedule.")
        if self.threshold and self.remasking in ("entropy", "origin"):
            raise UserError(f"threshold: it is a probability, and {self.remasking} goes by none; take maskgit.")
        if self.holes:
            if self.official or self.early_exit:
                raise UserError("holes: LLaDA's own loop has none, and nothing ends early in one.")
            return
        if self.gen_length % self.block_length:
            raise UserError(f"block_length: {self.block_length} does not divide the length {self.gen_length}.")
        if self.steps % (self.gen_length // self.block_length):
            blocks = self.gen_length // self.block_length
            raise UserError(f"steps: {self.steps} steps cannot be shared evenly by {blocks} blocks.")

    @property
    def blocks(self) -> int:
        """Blocks of the canvas. The last block of holes may be a short one."""
        return -(-self.gen_length // self.block_length)

    def steps_for(self, masked: int) -> int:
        """Denoising steps of a block of `masked` tokens."""
        return -(-masked // self.holes) if self.holes else self.steps // self.blocks

    def commits(self, masked: int, done: int = 0) -> list[int]:
        """Tokens to commit at each step of a block of `masked` tokens, of which `done` steps are over.

        In holes the same number at each step, so that a short one is decoded beside a long one as it is alone.
        """
        steps = self.steps_for(masked)
        if self.schedule == "timestep":
            return timestep_commits(masked, shares(steps, self.eps)[done:])
        if self.holes:
            return [min(self.holes, masked - over) for over in range(0, masked, self.holes)]
        return commits_per_step(masked, steps)


@dataclass
class Decoded:
    """Answers (B, gen_length): token ids int64, the step that committed each (NEVER: none), its confidence float32.

    Steps are counted per row, from 0. `margin` float32 (B,) says by how much [nats of a token's log-odds] the order of
    commitment was decided where that was closest, at step `margin_at` int64 (B,): inf and NEVER if there never was a
    choice. An error of that size in the logits could have changed the order.
    """

    ids: torch.Tensor
    committed_at: torch.Tensor
    confidence: torch.Tensor
    margin: torch.Tensor
    margin_at: torch.Tensor
    forwards: int  # forward passes of the model, each over the rows that were left

    def state(self, row: int, step: int, mask_id: int) -> torch.Tensor:
        """The answer of `row` before denoising step `step`: ids with masks where nothing was committed yet."""
        at = self.committed_at[row]
        return torch.where((at >= 0) & (at < step), self.ids[row], mask_id)


def commits_per_step(masked: int, steps: int) -> list[int]:
    """Tokens to commit at each of `steps` steps for `masked` positions: the floor share, the remainder first."""
    share, rest = divmod(masked, steps)
    return [share + (i < rest) for i in range(steps)]


def shares(steps: int, eps: float) -> torch.Tensor:
    """Dream's schedule, float32 (steps,): which share of the masks each step commits, the last step all.

    Its times fall from 1 to eps, so that less is committed at first than evenly, and more at last.
    """
    times = torch.linspace(1, eps, steps + 1)
    return torch.cat([1 - times[1:-1] / times[:-2], torch.ones(1)])


def timestep_commits(masked: int, share: torch.Tensor) -> list[int]:
    """Whole tokens to commit at each step for `masked` positions: the floor of the step's share of those left."""
    numbers = []
    for s in share:
        numbers.append(int(masked * s))
        masked -= numbers[-1]
    return numbers


def canvas(
    prompts: Sequence[Sequence[int]], gen_length: int, mask_id: int, lengths: Sequence[int] | None = None, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts, padded on the left to one length, each followed by masks: int64 (B, L), and what is no padding.

    With `lengths` row i has only so many masks, and after them the token `pad`.
    """
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest + gen_length), mask_id, dtype=torch.long)
    attention_mask = torch.ones_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) : longest] = torch.tensor(prompt)
        attention_mask[i, : longest - len(prompt)] = 0
        if lengths is not None:
            ids[i, longest + lengths[i] :] = pad
            attention_mask[i, longest + lengths[i] :] = 0
    return ids, None if attention_mask.all() else attention_mask


Watch = Callable[[torch.Tensor, float], None]


@torch.no_grad()
def decode(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    uids: Sequence[int] | None = None,
    watch: Watch | None = None,
    places: Sequence[Sequence[int]] | None = None,
) -> Decoded:
    """Decode one answer per prompt (token ids). Prompts of any lengths together give what each gives alone.

    `uids` (below 2**36) name the prompts: what is drawn at random for one depends on its uid and `how.seed` alone; by
    default they are numbered. `watch` is called after each step with the answers so far (B, gen_length) on the device
    and the share of the canvas that lies behind. `places`, where holes are decoded, are the places in the text of each
    prompt's tokens and then of those to be decoded, of which a row may have fewer than gen_length.
    """
    run = _Run(net, prompts, how, range(len(prompts)) if uids is None else uids, watch, places)
    rows = torch.arange(len(prompts), device=run.ids.device)
    with forward.cudnn(False):  # canvases have masks, and each its own length
        for block in range(how.blocks):
            if places is not None:  # those whose holes reach so far
                mine = [i for i, n in enumerate(run.lengths or []) if n > block * how.block_length]
                rows = torch.tensor(mine, device=run.ids.device)
                if not mine:
                    break
            run.enter(rows, block)
            (confidently if how.threshold else exactly)(run)
            if how.early_exit and not how.official:
                rows = rows[~run.ended(rows)]  # the one time per block that the host waits for the device
                if not len(rows):
                    break
    if watch:
        watch(run.answers, 1.0)
    return run.result()


def exactly(run: _Run) -> None:
    """LLaDA's schedule: at each step a number of tokens known beforehand, so the host never waits for the device."""
    how = run.how
    left, done = run.end - run.first, int(run.first_alone())
    left -= done
    if how.remasking == "origin":  # by chance: nobody knows how many
        for share in shares(how.steps_for(left), how.eps).tolist():
            run.step(left, partial(by_chance, share=share))
            run.tick()
        return
    if how.holes and how.schedule == "timestep":  # each row's own number
        each = [how.commits(n) if n else [] for n in run.still_open()]
        columns = itertools.zip_longest(*each, fillvalue=0)
        numbers: list[int | torch.Tensor] = [
            torch.tensor(column, device=run.device)[:, None] if any(column) else 0 for column in columns
        ]
    else:
        numbers = [*how.commits(left, done)]
    for number in numbers:
        # Under `official` a mask token that was committed is open still: all slots are looked at, always.
        if isinstance(number, torch.Tensor) or number:
            run.step(run.slots if how.official else left, partial(most_confident, number=number))
        left -= number if isinstance(number, int) else 0
        run.tick()


def confidently(run: _Run) -> None:
    """Fast-dLLM's parallel decoding: steps of all sure tokens until the block is full; the host looks at each."""
    how = run.how
    left = run.end - run.first - run.first_alone()
    # Without a cache Fast-dLLM's own loop for Dream looks at a step's share of the tokens only, and at what it left.
    share = left // how.steps if how.official and run.before is not None and not run.kept else 0
    limit, step = share or None, 0
    while True:
        run.step(run.slots if how.official else left, partial(sure_enough, threshold=how.threshold, most=limit))
        run.tick()
        still, before, step = run.still_open(), left, step + 1
        left = max(still)
        if not left:
            return
        if limit:
            limit += left - before + (share if step < how.steps else 0)
        if sum(map(bool, still)) <= 0.75 * len(still):  # else the copying costs more than the idle rows
            run.narrow([i for i, n in enumerate(still) if n])


def most_confident(odds: torch.Tensor, number: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `number` proposals of each row with the least `odds` (B, n) against them, ties by position: bool (B, n).

    `number` may be each row's own, int64 (B, 1). And by how much the last of them was preferred to the next [nats],
    (B,).
    """
    ranked, order = torch.sort(odds, dim=1, stable=True)
    first = torch.arange(odds.shape[1], device=odds.device) < number
    chosen = torch.zeros_like(odds, dtype=torch.bool).scatter_(1, order, first.expand_as(order))
    if isinstance(number, int):
        if number == odds.shape[1]:
            return chosen, torch.full_like(ranked[:, 0], torch.inf)
        last, following = ranked[:, number - 1], ranked[:, number]
    else:
        last, following = (ranked.gather(1, i.clamp(0, odds.shape[1] - 1))[:, 0] for i in (number - 1, number))
    gap = (following.log() - last.log()).nan_to_num(0.0, posinf=torch.inf)
    return chosen, gap if isinstance(number, int) else gap.where(first.any(1) & ~first.all(1), torch.inf)


def the_first(odds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first slot of each row, whatever its `odds` (B, n): bool (B, n); no choice was made."""
    chosen = torch.zeros_like(odds, dtype=torch.bool)
    chosen[:, 0] = True
    return chosen, torch.full_like(odds[:, 0], torch.inf)


def by_chance(odds: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each proposal with probability `share`, where 1 / (1 + odds) are U(0, 1): bool (B, n); no choice was made."""
    return 1 / (1 + odds) >= 1 - share, torch.full_like(odds[:, 0], torch.inf)


def sure_enough(odds: torch.Tensor, threshold: float, most: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The proposals whose confidence 1 / (1 + odds) is at least `threshold`, and the best of each row: bool (B, n).

    With `most` only so many of the best are looked at. And how far the nearest proposal is from the threshold [nats],
    (B,).
    """
    limit = torch.tensor(1 / threshold - 1)
    chosen = (odds <= limit).scatter_(1, odds.argmin(1, keepdim=True), True)
    if most is not None:
        chosen &= most_confident(odds, most)[0]
    return chosen, (odds.log() - limit.log()).abs().amin(1)


def propose(
    logits: torch.Tensor, how: Decoding, ends: torch.Tensor, u: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's token, int64 (n,), and the odds against it, float32 (n,), from logits float32 (n, V).

    The logits are overwritten. Of `low_confidence` (LLaDA) the odds are (1 - p) / p for the token's softmax probability
    p, before any noise: the sum of exp(other - own). Near p = 1, where p itself runs out of digits, they still tell
    which of two tokens is surer. Dream's are those of p after temperature, top_p and top_k (`maskgit`), of p less the
    second token's (`margin`), or the entropy [nats] in their place (`entropy`). `u` float64 (n, V) are U(0, 1).
    """
    if not how.official:
        logits[:, how.mask_id] = -torch.inf
    if how.eos_suppression == "logits":
        logits[:, how.ends[0]] = -torch.inf
    cut = logits
    if how.top_p < 1 or how.top_k or (u is not None and how.remasking in DREAM):
        cut = likeliest(logits if u is None else logits / how.temperature, how.top_p, how.top_k)
    # Gumbel-max: the argmax of logits / temperature + noise is a sample of the softmax at that temperature.
    warm = None if u is None else (logits.double() / how.temperature if cut is logits else cut.double())
    token = (cut if warm is None or u is None else warm - torch.log(-torch.log(u))).argmax(1)
    if how.remasking in DREAM:
        odds = DREAM[how.remasking](cut, token)
        if how.eos_suppression == "confidence":
            odds = odds.masked_fill((token[:, None] == ends).any(1), torch.inf)
        return token, odds
    if how.eos_suppression == "confidence":
        logits.index_fill_(1, ends, -torch.inf)
    return token, against(logits, token)


def likeliest(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """Logits (n, V) with -inf where a token is not among the likeliest: those with the share `top_p` < 1 of the
    probability together, the one that passes it included, and of these the first `top_k` > 0, with all that tie."""
    if top_p < 1:
        ranked, order = torch.sort(logits, dim=1, descending=True)
        out = ranked.softmax(1).cumsum(1) > top_p
        out = torch.cat([torch.zeros_like(out[:, :1]), out[:, :-1]], 1)
        logits = logits.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, 1).values[:, -1:], -torch.inf)
    return logits


def against(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The odds against each token (n,): the sum of exp(other - own). The logits (n, V) are overwritten."""
    own = logits.gather(1, token[:, None])
    others = logits.sub_(own).exp_().scatter_(1, token[:, None], 0.0)
    return torch.where(own[:, 0] == -torch.inf, torch.inf, others.sum(1))


def margin(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """(1 - m) / m for the likeliest token's probability less the second's, m, (n,). The logits are overwritten."""
    best = logits.topk(2, 1)
    second = (best.values[:, 1] - best.values[:, 0]).exp()
    return (against(logits, best.indices[:, 0]) + second) / (1 - second)


def entropy(logits: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The distribution's entropy [nats], (n,)."""
    spread: torch.Tensor = torch.special.entr(logits.softmax(1)).sum(1)
    return spread


DREAM = {"maskgit": against, "margin": margin, "entropy": entropy}
"""What Dream's algorithms rank proposals by, the least first."""


def predecessors(
    prompts: Sequence[Sequence[int]], width: int, gen_length: int, places: Sequence[Sequence[int]] | None
) -> torch.Tensor:
    """Where on the canvas the token lies that stands before each in the text; of the first token, itself. (B, L)."""
    before = torch.arange(width).repeat(len(prompts), 1)
    for row, prompt in enumerate(prompts):
        begin = width - gen_length - len(prompt)
        text = torch.arange(width - begin) if places is None else torch.tensor(places[row])
        where = torch.empty_like(text).scatter_(0, text, torch.arange(len(text)))  # on the canvas, by place in the text
        before[row, begin : begin + len(text)] = begin + where[(text - 1).clamp(min=0)]
    return before


def taken(hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """The rows (B, n, d) of hidden states (B, W, d) at the positions (B, n)."""
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))


class _Run:
    """One call of `decode`: the canvas, the record, and the step that all modes share."""

    def __init__(
        self,
        net: nn.Module,
        prompts: Sequence[Sequence[int]],
        how: Decoding,
        uids: Sequence[int],
        watch: Watch | None,
        places: Sequence[Sequence[int]] | None,
    ) -> None:
        self.net, self.how, self.watch = net, how, watch
        self.device = next(net.parameters()).device
        self.lengths = None if places is None else [len(at) - len(p) for at, p in zip(places, prompts, strict=True)]
        ids, attention_mask = canvas(prompts, how.gen_length, how.mask_id, self.lengths, how.ends[0])
        self.places = None
        if places is not None:
            at = torch.zeros_like(ids)
            for i, (prompt, of) in enumerate(zip(prompts, places, strict=True)):
                begin = ids.shape[1] - how.gen_length - len(prompt)
                at[i, begin : begin + len(of)] = torch.tensor(of)
            self.places = at.to(self.device)
        self.ids = ids.to(self.device)
        self.start = ids.shape[1] - how.gen_length
        self.bias = None
        if attention_mask is not None:
            self.bias = forward.padding_bias(net, attention_mask.to(self.device))
        self.uids = torch.tensor(list(uids), device=self.device)
        self.ends = torch.tensor(how.ends, device=self.device)
        self.before = None  # where on the canvas the token lies that stands before each in the text, int64 (B, L)
        if forward.shifted(net):
            self.before = predecessors(prompts, ids.shape[1], how.gen_length, places).to(self.device)
        elif how.official and (how.threshold or how.cache != "none"):
            raise UserError("official: LLaDA's own loop has neither a threshold nor a cache.")
        self.kept = None if how.cache == "none" else forward.KeyValues()
        self.pass_ = forward.Replay(net)
        rows = len(prompts)
        self.clock = torch.zeros(rows, dtype=torch.long, device=self.device)  # steps that each row has seen
        self.at = torch.full((rows, how.gen_length), NEVER, device=self.device)
        self.sure = torch.zeros((rows, how.gen_length), device=self.device)
        self.margin = torch.full((rows,), torch.inf, device=self.device)
        self.margin_at = torch.full((rows,), NEVER, device=self.device)
        self.forwards = 0

    @property
    def answers(self) -> torch.Tensor:
        """The part of the canvas behind the prompts, int64 (B, gen_length)."""
        return self.ids[:, self.start :]

    def enter(self, rows: torch.Tensor, block: int) -> None:
        """Begin block number `block` with these rows of the batch."""
        how = self.how
        self.behind = block * how.block_length / how.gen_length
        self.rows, self.going = rows, torch.ones_like(rows, dtype=torch.bool)
        self.first = self.start + block * how.block_length
        self.end = min(self.first + how.block_length, self.ids.shape[1])
        # From the canvas's start under LLaDA's own loop: a mask token committed in an earlier block is open again.
        self.low = self.start if how.official and self.before is None else self.first
        if how.official:
            self.slots = int((self.ids[:, self.low : self.end] == how.mask_id).sum(1).max())
        self.whole = True  # the block's first step reads everything

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        """Hidden states of the canvas `x` (B, L), or of the window that is not kept, and where they begin."""
        bias, places = (None if t is None else t[self.rows] for t in (self.bias, self.places))
        if self.how.guidance > 0:
            blind = x.clone()
            blind[:, : self.start] = self.how.mask_id
            x = torch.cat([x, blind])
            bias, places = (None if t is None else torch.cat([t, t]) for t in (bias, places))
        begin, stop = 0, x.shape[1]
        if self.kept:
            if not self.whole:
                begin, stop = self.first, self.end if self.how.cache == "dual" else stop
            self.kept.window = None if self.whole else slice(begin, stop)
            self.whole = False
        self.forwards += 1
        at = begin if places is None else places[:, begin:stop]
        return self.pass_(x[:, begin:stop], at, bias, self.kept), begin

    def first_alone(self) -> bool:
        """Fast-dLLM's own loop for Dream with a cache: the pass over everything commits the block's first token."""
        if not (self.how.official and self.kept):
            return False
        self.step(self.slots, the_first)
        self.tick()
        return True

    def predictors(self, hidden: torch.Tensor, begin: int, place: torch.Tensor) -> torch.Tensor:
        """Of hidden states (B, W, d) from `begin` on those that predict the tokens at `place` (B, n): (B, n, d).

        Under shift they are those of the tokens before. Where such a token lies outside the window, its state is that
        of the block's pass over everything: it is as old as the keys and values beside it.
        """
        twice = len(hidden) // len(place)  # under guidance
        if self.before is None:
            return taken(hidden, (place - begin).repeat(twice, 1))
        before = self.before[self.rows]
        if self.kept and hidden.shape[1] == before.shape[1]:
            self.edge = taken(hidden, before[:, self.first : self.end].repeat(twice, 1))
        at = before.gather(1, place).repeat(twice, 1) - begin
        found = taken(hidden, at.clamp(0, hidden.shape[1] - 1))
        if hidden.shape[1] == before.shape[1]:
            return found
        outside = (at < 0) | (at >= hidden.shape[1])
        return torch.where(outside[..., None], taken(self.edge, (place - self.first).repeat(twice, 1)), found)

    def step(self, slots: int, commit: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One denoising step: read, propose at the (at most `slots`) open positions of each row, commit."""
        how, rows = self.how, self.rows
        x = self.ids[rows]
        hidden, begin = self.read(x)
        shut = x[:, self.low : self.end] != how.mask_id
        place = torch.sort(shut.byte(), dim=1, stable=True).indices[:, :slots] + self.low  # the open ones, in order
        hidden = self.predictors(hidden, begin, place)
        if how.guidance > 0:  # the head is linear, so guidance may as well come before it
            seeing, blind = (h.float() for h in hidden.chunk(2))
            hidden = (blind + (how.guidance + 1) * (seeing - blind)).to(hidden.dtype)
        token, odds = self.propose(hidden.flatten(0, 1), place)
        odds = odds.where(~shut.gather(1, place - self.low), torch.inf)
        chosen, gap = commit(odds)
        open_ = x.gather(1, place) == how.mask_id
        chosen &= open_ & self.going[:, None]
        every = rows[:, None]
        self.ids[every, place] = torch.where(chosen, token, x.gather(1, place))
        clock, answer = self.clock[rows], place - self.start
        self.at[every, answer] = torch.where(chosen, clock[:, None], self.at[every, answer])
        self.sure[every, answer] = torch.where(chosen, 1 / (1 + odds), self.sure[every, answer])
        closer = (gap < self.margin[rows]) & self.going
        if how.holes:  # a row whose holes are shorter than the batch's longest has nothing more to choose from
            closer &= open_.any(1) if how.threshold else chosen.sum(1) < open_.sum(1)
        self.margin[rows] = torch.where(closer, gap, self.margin[rows])
        self.margin_at[rows] = torch.where(closer, clock, self.margin_at[rows])
        if self.watch:
            self.watch(self.answers, self.behind)

    def tick(self) -> None:
        """Count a step for the rows that are not done with the block."""
        self.clock[self.rows] += self.going

    def propose(self, hidden: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and the odds against them, (B, slots) each, at the places (B, slots), from hidden (B * slots, d)."""
        how = self.how
        parts = []
        for i in range(0, len(hidden), LOGIT_ROWS):
            logits = forward.lm_head(self.net)(hidden[i : i + LOGIT_ROWS]).float()
            u = None
            if how.temperature > 0:
                u = self.draw(GUMBEL, place, logits.shape[1], slice(i, i + LOGIT_ROWS))
            parts.append(propose(logits, how, self.ends, u))
        token, odds = (torch.cat(p).view_as(place) for p in zip(*parts, strict=True))
        if how.remasking in ("random", "origin"):
            odds = (1 / self.draw(ORDER, place, 1).view_as(place) - 1).float()
        return token, odds

    def draw(self, stream: int, place: torch.Tensor, width: int, part: slice = slice(None)) -> torch.Tensor:
        """U(0, 1), float64 (n, width), for a `part` of the places: a function of seed, uid, step and position alone."""
        row = (self.uids[self.rows] * 2**14 + self.clock[self.rows])[:, None] * 2**13
        return uniform(self.how.seed, (row + place - self.start).flatten()[part], 0, stream, width)

    def still_open(self) -> list[int]:
        """Masks left in the block, by row; 0 for a row that has ended. Waits for the device."""
        left = (self.ids[self.rows, self.first : self.end] == self.how.mask_id).sum(1)
        if self.how.early_exit:
            left = left.masked_fill(self.ended(self.rows), 0)
        self.going = left > 0
        return left.tolist()

    def narrow(self, keep: list[int]) -> None:
        """Go on with these of the block's rows only."""
        index = torch.tensor(keep, device=self.device)
        if self.kept:
            both = torch.cat([index, index + len(self.rows)]) if self.how.guidance > 0 else index
            self.kept.keep(both)
            if self.before is not None:
                self.edge = self.edge[both]
        self.rows, self.going = self.rows[index], self.going[index]

    def ended(self, rows: torch.Tensor) -> torch.Tensor:
        """Whose text is settled: an end is committed and nothing before it is masked. bool (B,)."""
        answers = self.answers[rows]
        end = (answers[..., None] == self.ends).any(-1).int()
        mask = (answers == self.how.mask_id).int()
        return (end.cumsum(1) > 0).logical_and(mask.cumsum(1) == 0).any(1)

    def result(self) -> Decoded:
        """The finished answers, on the CPU."""
        answers = self.answers  # under `official` masks may be left
        if not self.how.official:
            answers = torch.where(self.at == NEVER, self.how.ends[0], answers)
        parts = (answers, self.at, self.sure, self.margin, self.margin_at)
        return Decoded(*(p.cpu() for p in parts), self.forwards)  # type: ignore[call-arg, arg-type]
