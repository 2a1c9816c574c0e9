"""In which order a diffusion model writes: sampled answers step by step, and the paper's "structure first" in numbers.

    found = commitments(cfg, "tinycode", 96, ["random", "ast"])   # per strategy, tier and task: when, in which place
    comparison(found, "random", "ast")                            # a table: paired, with intervals
    python -m treediff.report.trajectory docs/denoising.gif       # the README's animation, of a scored run

A trajectory is one array, the step at which each token of an answer was committed; all else follows from it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from treediff.config import Config, resolve
from treediff.data import sources
from treediff.errors import UserError
from treediff.figures import plots, views
from treediff.files import read_json, whole
from treediff.masking import tokens
from treediff.masking.tokens import CODE, LABELS
from treediff.report.tables import Table
from treediff.sampling.run import read_samples, samples_path
from treediff.scoring import stats
from treediff.scoring.run import ledger_path
from treediff.strategies import STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)

TIERS = LABELS[CODE:]


class Answer(NamedTuple):
    """A sampled answer for drawing: its text; per token a box coloured by tier, its step and its label (uint8)."""

    text: str
    boxes: list[tuple[int, int, str]]
    at: np.ndarray
    labels: np.ndarray


def load(cfg: Config, benchmark: str, length: int, task: str) -> Answer:
    """The answer of the run of `cfg` to one task. Raises UserError if there is none."""
    path = samples_path(cfg, benchmark, length)
    rows = read_samples(path)
    if task not in rows:
        raise UserError(f"{path}: there is no answer to {task}; sample it first.")
    return drawable(cfg, rows[task])


def drawable(cfg: Config, record: Mapping[str, Any]) -> Answer:
    """A sample's record as it is drawn."""
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    text, runs, at, labels = views.answer_tokens(cfg, tok, record["ids"], record["committed_at"])
    boxes = [(a, b, plots.COLOURS[LABELS[i]]) for (a, b), i in zip(runs, labels, strict=True)]
    return Answer(text, boxes, at, labels)


def part_way(cfg: Config, length: int, share: float = 110 / 256) -> tuple[int, int]:
    """The step that is `share` of the way (the paper's figure 3: step 110 of 256), and all steps."""
    steps = length // cfg.tokens_per_step
    return round(share * steps), steps


def states(
    cfg: Config, benchmark: str, length: int, task: str, strategies: Sequence[str], share: float = 110 / 256
) -> Figure:
    """The strategies' answers to one task side by side, `share` of the way."""
    step, steps = part_way(cfg, length, share)
    panels = []
    for strategy in strategies:
        shown = load(cfg.with_masking(strategy), benchmark, length, task)
        panels.append((f"{STRATEGIES[strategy].title}, step {step} of {steps}", *shown[:2], shown.at >= step))
    return plots.states(panels)


# --- structure first? ----------------------------------------------------------------------------------------------
Found = dict[str, dict[str, dict[str, tuple[float, float]]]]
"""By strategy, tier and task: the step at which the tier's first token was committed, and the mean place of its tokens
in the order of their blocks, 0 for the first of a block's answer tokens and 1 for the last."""


def commitments(cfg: Config, benchmark: str, length: int, strategies: Sequence[str]) -> Found:
    """When each strategy's answers committed each tier, over all tasks of a benchmark that have a token of it.

    Blocks are decoded from left to right, so a step tells mostly where a token stands; the place within the block does
    not.
    """
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    found: Found = {}
    for strategy in strategies:
        by_tier = found.setdefault(strategy, {tier: {} for tier in TIERS})
        path = samples_path(cfg.with_masking(strategy), benchmark, length)
        for task, record in read_samples(path).items():
            _, _, at, labels = views.answer_tokens(cfg, tok, record["ids"], record["committed_at"])
            place = places(at, cfg.of(benchmark).block_length)
            for i, tier in enumerate(TIERS, start=CODE):
                if (labels == i).any():
                    by_tier[tier][task] = (float(at[labels == i].min()), float(place[labels == i].mean()))
    return found


def places(at: np.ndarray, block_length: int) -> np.ndarray:
    """Each token's place in the order of its block, from 0 (first) to 1 (last), among the tokens given."""
    out = np.full(len(at), 0.5)
    for first in range(0, len(at), block_length):
        block = at[first : first + block_length]
        if len(block) > 1:
            # Tokens of one step share their place.
            ranks = (block[:, None] > block).sum(1) + ((block[:, None] == block).sum(1) - 1) / 2
            out[first : first + block_length] = ranks / (len(block) - 1)
    return out


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its percentile bootstrap interval over tasks (nan without two values)."""
    if len(values) < 2:
        return (float(values[0]) if len(values) else np.nan), np.nan, np.nan
    return float(np.mean(values)), *stats.bootstrap(values, level)


def summary(found: Found) -> tuple[dict[str, dict[str, tuple[float, float, float]]], ...]:
    """Mean and interval by strategy and tier: of the step of first commitment, and of the place in the block."""
    return tuple(
        {s: {tier: interval([v[i] for v in by.values()]) for tier, by in tiers.items()} for s, tiers in found.items()}
        for i in (0, 1)
    )


def comparison(found: Found, one: str, two: str) -> Table:
    """`two` minus `one` per tier, over the tasks where both answers have the tier.

    The intervals hold together at 95 % (Bonferroni over tiers and measures). A difference is named only outside zero;
    it is one between these two runs.
    """
    level = 1 - 0.05 / (2 * len(TIERS))
    rows = []
    for tier in TIERS:
        a, b = found[one][tier], found[two][tier]
        both = [task for task in a if task in b]
        cells, named = [], []
        for i, name in enumerate(("first commitment", "place")):
            mean, low, high = interval([b[t][i] - a[t][i] for t in both], level)
            cells.append(f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            if low > 0 or high < 0:
                named.append(f"{name} {'later' if low > 0 else 'earlier'}")
        rows.append([tier, len(both), *cells, ", ".join(named) or "no difference told"])
    head = ["tier", "tasks", "first commitment [steps]", "place in the block [0 to 1]", "these two runs"]
    caption = f"{STRATEGIES[two].title} minus {STRATEGIES[one].title}, paired over tasks"
    return Table(head, rows, caption)


# --- the animation -------------------------------------------------------------------------------------------------
def animation(shown: Answer, title: str, path: Path, every: int = 1, milliseconds: int = 110) -> Path:
    """Write an answer's denoising as a GIF: one frame per `every` steps, the newest tokens framed, the end held."""
    from PIL import Image

    last = int(shown.at.max()) + 1
    frames = []
    for step in [*range(0, last, every), last]:
        new = (shown.at < step) & (shown.at >= step - every)
        figure = plots.frame(shown.text, shown.boxes, shown.at >= step, new, f"{title}, step {step} of {last}")
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]))
    palette = frames[-1].quantize(96, dither=Image.Dither.NONE)
    shades = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    with whole(path) as temporary:
        shades[0].save(
            temporary,
            format="GIF",
            save_all=True,
            append_images=shades[1:],
            duration=[milliseconds] * (len(shades) - 1) + [3000],
            loop=0,
            optimize=True,
        )
    return path


def main() -> None:
    """The README's animation: AST masking's longest answer with control flow that passes, at the longest T."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path, cfg = Path(sys.argv[1]), resolve("tiny", masking="ast")
    benchmark, length = cfg.benchmarks[0], cfg.lengths[-1]
    passed = stats.passed(read_json(ledger_path(cfg, benchmark, length)), "plus")
    rows = read_samples(samples_path(cfg, benchmark, length))
    task = max((t for t in rows if passed.get(t)), key=lambda t: len(rows[t]["solution"]))
    animation(drawable(cfg, rows[task]), f"{task}, {STRATEGIES['ast'].title}", path)
    log.info("%s: %d bytes", path, path.stat().st_size)


if __name__ == "__main__":
    main()
