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

To use it with another model, give it what it takes from llada.py: `encode_window`, `head`, `padding_bias`.
"""

from __future__ import annotations

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
    remasking: str = "low_confidence"  # what is committed first: the most confident, or `random`
    eos_suppression: str = "off"  # `logits`: EOS is never proposed; `confidence`: EOS and EOT are committed last
    threshold: float = 0.0  # > 0: commit all proposals of at least this confidence, and one at the least
    cache: str = "none"  # keys and values kept during a block: of the tokens before it (prefix), or all others (dual)
    early_exit: bool = True  # a row whose text has ended leaves the batch
    holes: int = 0  # > 0: holes of any length are decoded, so many tokens a step, and no end of text ends them
    official: bool = False  # LLaDA's loop to the letter: may commit the mask token, never ends early
    seed: int = 0

    def __post_init__(self) -> None:
        if self.holes:
            if self.official or self.early_exit:
                raise UserError("holes: LLaDA's own loop has none, and nothing ends early in one.")
            return
        if self.gen_length % self.block_length:
            raise UserError(f"block_length: {self.block_length} does not divide the length {self.gen_length}.")
        if self.steps % (self.gen_length // self.block_length):
            blocks = self.gen_length // self.block_length
            raise UserError(f"steps: {self.steps} steps cannot be shared evenly by {blocks} blocks.")
        if self.official and (self.threshold or self.cache != "none"):
            raise UserError("official: LLaDA's own loop has neither a threshold nor a cache.")

    @property
    def blocks(self) -> int:
        """Blocks of the canvas. The last block of holes may be a short one."""
        return -(-self.gen_length // self.block_length)

    def commits(self, masked: int) -> list[int]:
        """Tokens to commit at each step of a block of `masked` tokens.

        In holes the same number at each step, so that a short one is decoded beside a long one as it is alone.
        """
        if self.holes:
            return [min(self.holes, masked - done) for done in range(0, masked, self.holes)]
        return commits_per_step(masked, self.steps // self.blocks)


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
    left = run.end - run.first
    for number in how.commits(left):
        if number:
            # Under `official` a mask token that was committed is open still: all slots are looked at, always.
            run.step(run.slots if how.official else left, partial(most_confident, number=number))
        left -= number
        run.tick()


def confidently(run: _Run) -> None:
    """Fast-dLLM's parallel decoding: steps of all sure tokens until the block is full; the host looks at each."""
    left = run.end - run.first
    while True:
        run.step(left, partial(sure_enough, threshold=run.how.threshold))
        run.tick()
        still = run.still_open()
        left = max(still)
        if not left:
            return
        if sum(map(bool, still)) <= 0.75 * len(still):  # else the copying costs more than the idle rows
            run.narrow([i for i, n in enumerate(still) if n])


def most_confident(odds: torch.Tensor, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `number` proposals of each row with the least `odds` (B, n) against them, ties by position: bool (B, n).

    And by how much the last of them was preferred to the next [nats], (B,).
    """
    ranked, order = torch.sort(odds, dim=1, stable=True)
    first = torch.arange(odds.shape[1], device=odds.device) < number
    chosen = torch.zeros_like(odds, dtype=torch.bool).scatter_(1, order, first.expand_as(order))
    if number == odds.shape[1]:
        return chosen, torch.full_like(ranked[:, 0], torch.inf)
    return chosen, (ranked[:, number].log() - ranked[:, number - 1].log()).nan_to_num(0.0, posinf=torch.inf)


def sure_enough(odds: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The proposals whose confidence 1 / (1 + odds) is at least `threshold`, and the best of each row: bool (B, n).

    And how far the nearest proposal is from the threshold [nats], (B,).
    """
    limit = torch.tensor(1 / threshold - 1)
    chosen = (odds <= limit).scatter_(1, odds.argmin(1, keepdim=True), True)
    return chosen, (odds.log() - limit.log()).abs().amin(1)


def propose(
    logits: torch.Tensor, how: Decoding, ends: torch.Tensor, u: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each position's token, int64 (n,), and the odds against it, float32 (n,), from logits float32 (n, V).

    The logits are overwritten. The odds are (1 - p) / p for its softmax probability p, before any noise: the sum of
    exp(other - own). Near p = 1, where p itself runs out of digits, they still tell which of two tokens is surer.
    `u` float64 (n, V) are U(0, 1).
    """
    if not how.official:
        logits[:, how.mask_id] = -torch.inf
    if how.eos_suppression == "logits":
        logits[:, how.ends[0]] = -torch.inf
    # Gumbel-max: the argmax of logits / temperature + noise is a sample of the softmax at that temperature.
    token = (logits if u is None else logits.double() / how.temperature - torch.log(-torch.log(u))).argmax(1)
    if how.eos_suppression == "confidence":
        logits.index_fill_(1, ends, -torch.inf)
    own = logits.gather(1, token[:, None])
    others = logits.sub_(own).exp_().scatter_(1, token[:, None], 0.0)
    return token, torch.where(own[:, 0] == -torch.inf, torch.inf, others.sum(1))


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
        # From the canvas's start under `official`: a mask token committed in an earlier block is open again.
        self.low = self.start if how.official else self.first
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

    def step(self, slots: int, commit: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One denoising step: read, propose at the (at most `slots`) open positions of each row, commit."""
        how, rows = self.how, self.rows
        x = self.ids[rows]
        hidden, begin = self.read(x)
        shut = x[:, self.low : self.end] != how.mask_id
        place = torch.sort(shut.byte(), dim=1, stable=True).indices[:, :slots] + self.low  # the open ones, in order
        at = (place - begin)[..., None].expand(-1, -1, hidden.shape[2])
        if how.guidance > 0:  # the head is linear, so guidance may as well come before it
            seeing, blind = (h.float().gather(1, at) for h in hidden.chunk(2))
            hidden = (blind + (how.guidance + 1) * (seeing - blind)).to(hidden.dtype)
        else:
            hidden = hidden.gather(1, at)
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
        if how.remasking == "random":
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
