"""The semi-autoregressive sampler (A.1, after LLaDA) and the samples of a benchmark, with their trajectories.

    out = decode(net, prompts, Decoding(gen_length=256, ...))     # ids, committed_at, confidence: (B, gen_length)
    path = sampled(cfg, "tinycode", 64)                           # runs/.../samples/tinycode-T64.jsonl

The canvas is prompt + gen_length masks. Blocks are decoded left to right; at each denoising step every masked position
up to the block's end proposes its most likely token, and the most confident proposals are committed for good.
`committed_at` holds the step at which each token was committed: the state at any step follows from it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from treediff import corpus, model, tokens
from treediff.config import Config, UserError, claim, provenance, write_json
from treediff.masking import take, uniform

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
"""What EvalPlus's chat mode lets the assistant begin with."""

NEVER = -1
"""committed_at of a token that was never decoded because its row had ended before it."""


@dataclass(frozen=True)
class Decoding:
    """How to decode. Lengths in tokens, `steps` in denoising steps over the whole canvas."""

    mask_id: int
    eos_id: int
    gen_length: int
    steps: int
    block_length: int
    temperature: float = 0.0
    suppressed: tuple[int, ...] = ()  # tokens (EOS, EOT) committed only when nothing else is left
    official: bool = False  # LLaDA's loop to the letter: may commit the mask token, never ends early
    seed: int = 0

    def __post_init__(self) -> None:
        if self.gen_length % self.block_length:
            raise UserError(f"block_length: {self.block_length} does not divide the length {self.gen_length}.")
        if self.steps % (self.gen_length // self.block_length):
            blocks = self.gen_length // self.block_length
            raise UserError(f"steps: {self.steps} steps cannot be shared evenly by {blocks} blocks.")


@dataclass
class Decoded:
    """Answers (B, gen_length): token ids int64, the step that committed each (NEVER: none), its confidence float32."""

    ids: torch.Tensor
    committed_at: torch.Tensor
    confidence: torch.Tensor
    forwards: int  # forward passes of the model

    def state(self, row: int, step: int, mask_id: int) -> torch.Tensor:
        """The answer of `row` before denoising step `step`: ids with masks where nothing was committed yet."""
        at = self.committed_at[row]
        return torch.where((at >= 0) & (at < step), self.ids[row], mask_id)


def commits_per_step(masked: int, steps: int) -> list[int]:
    """Tokens to commit at each of `steps` steps for `masked` positions: the floor share, the remainder first."""
    share, rest = divmod(masked, steps)
    return [share + (i < rest) for i in range(steps)]


def canvas(prompts: Sequence[Sequence[int]], gen_length: int, mask_id: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompts, padded on the left to one length, each followed by masks: int64 (B, L), and what is no padding."""
    longest = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), longest + gen_length), mask_id, dtype=torch.long)
    seen = torch.ones_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) : longest] = torch.tensor(prompt)
        seen[i, : longest - len(prompt)] = 0
    return ids, None if seen.all() else seen


@torch.no_grad()
def decode(
    net: nn.Module,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    tick: Callable[[int], None] = lambda steps: None,
) -> Decoded:
    """Decode one answer per prompt (token ids). Prompts of any lengths together give what each gives alone."""
    device = next(net.parameters()).device
    ids, seen = canvas(prompts, how.gen_length, how.mask_id)
    ids, seen = ids.to(device), seen if seen is None else seen.to(device)
    start = ids.shape[1] - how.gen_length
    at = torch.full((len(prompts), how.gen_length), NEVER, device=device)
    sure = torch.zeros((len(prompts), how.gen_length), device=device)
    live = torch.arange(len(prompts), device=device)  # rows that have not ended
    blocks = how.gen_length // how.block_length
    per_block = how.steps // blocks
    forwards = 0
    for block in range(blocks):
        first, end = start + block * how.block_length, start + (block + 1) * how.block_length
        plans = [commits_per_step(int(n), per_block) for n in (ids[live, first:end] == how.mask_id).sum(1)]
        plan = torch.tensor(plans, device=device).reshape(len(live), per_block)
        for i in range(per_block):
            step = block * per_block + i
            tick(1)
            if not len(live) or not plan[:, i].any():
                continue
            x = ids[live]
            open_ = torch.zeros_like(x, dtype=torch.bool)
            # From the canvas's start: under `official` a mask committed in an earlier block is open again.
            open_[:, start:end] = x[:, start:end] == how.mask_id
            hidden = model.encode(net, x, None if seen is None else seen[live])
            forwards += 1
            logits = model.head(net)(hidden[open_]).float()
            token, confidence = propose(logits, how, step, open_, live)
            ranking = torch.full(x.shape, torch.inf, device=device)
            ranking[open_] = -confidence
            chosen = take(ranking, plan[:, i]) & open_
            proposals = torch.full_like(x, how.mask_id)
            proposals[open_] = token
            ids[live] = torch.where(chosen, proposals, x)
            answer = chosen[:, start:]
            at[live] = torch.where(answer, step, at[live])
            sure[live] = torch.where(answer, -ranking[:, start:], sure[live])
            if not how.official:
                going = ~_ended(ids[live, start:], how)
                live, plan = live[going], plan[going]
    answers = ids[:, start:].clone()
    if not how.official:
        answers[at == NEVER] = how.eos_id
    return Decoded(answers.cpu(), at.cpu(), sure.cpu(), forwards)


def propose(
    logits: torch.Tensor, how: Decoding, step: int, open_: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each open position's token and confidence, int64 and float32 (n,), from its logits float32 (n, V).

    The confidence is the token's softmax probability, before any noise. Suppressed tokens rank below all others.
    """
    if not how.official:
        logits[:, how.mask_id] = -torch.inf
    if how.temperature > 0:
        # Gumbel-max in float64 (LLaDA): argmax of logits / temperature + Gumbel noise.
        where = open_.nonzero()
        sample = rows[where[:, 0]] * 2**20 + where[:, 1]
        u = uniform(how.seed, sample, step, 0, logits.shape[1])
        token = (logits.double() / how.temperature - torch.log(-torch.log(u))).argmax(1)
    else:
        token = logits.argmax(1)
    picked = logits.gather(1, token[:, None])[:, 0]
    confidence = torch.exp(picked - logits.logsumexp(1))
    if how.suppressed:
        confidence -= 2.0 * torch.isin(token, torch.tensor(how.suppressed, device=token.device))
    return token, confidence


def _ended(answers: torch.Tensor, how: Decoding) -> torch.Tensor:
    """Rows whose text is settled: an EOS is committed and nothing before it is masked. bool (B,)."""
    eos, masked = answers == how.eos_id, answers == how.mask_id
    position = torch.arange(answers.shape[1], device=answers.device)
    far = answers.shape[1]
    first_eos = torch.where(eos, position, far).amin(1)
    first_mask = torch.where(masked, position, far).amin(1)
    return (first_eos < far) & (first_eos < first_mask)


# --- prompts and programs ------------------------------------------------------------------------------------------


def prompt_ids(cfg: Config, tok: PreTrainedTokenizerFast, problem: str) -> tuple[list[int], str]:
    """The prompt of a benchmark problem under `prompt_style` and `think`, and how the answer is made to begin."""
    message = problem.strip()
    if cfg.prompt_style != "bare":
        message = f"{corpus.INSTRUCTION}\n```\n{message}\n```"
    begin = {"free": "", "open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}[cfg.think]
    if cfg.prompt_style == "prefill":
        begin += f"{RESPONSE}\n```python\n"
    ids, _ = tokens.encode(tok, corpus.prompt_text(tok, message), special=True)
    start, _ = tokens.encode(tok, begin)
    return [*ids.tolist(), *start.tolist()], begin


def answer_text(tok: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of an answer up to its first EOS or end of turn."""
    table = tokens.byte_table(tok)
    ends = tokens.endings(tok)
    out = []
    for i in ids:
        if i in ends:
            break
        out.append(table.spelling[i] if i < len(table.spelling) else b"")
    return b"".join(out).decode("utf-8", errors="replace")


def extract(text: str, entry_point: str, rule: str) -> str:
    """The program in an answer: by EvalPlus's `sanitize`, or the first code fence after the reasoning.

    A fence that is never closed runs to the end; without any fence the answer after </think> is the program.
    """
    if rule == "sanitize":
        from evalplus.sanitize import sanitize

        return sanitize(text, entry_point)
    rest = text.rpartition("</think>")[2]
    _, fence, after = rest.partition("```")
    if not fence:
        return rest.strip("\n")
    return after.partition("\n")[2].partition("```")[0].rstrip("\n")


# --- a benchmark's samples -----------------------------------------------------------------------------------------


def load_run(cfg: Config) -> nn.Module:
    """The run's model, ready to sample from: its backbone with its adapter merged, or its own weights."""
    from treediff import train

    cuda = torch.cuda.is_available()
    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    own = cfg.run_dir / "model"
    folder = str(own) if own.is_dir() else train.backbone_folder(cfg)
    net = model.load_backbone(folder, dtype, "cuda" if cuda else "cpu", cfg.revision)
    return net if own.is_dir() or cfg.masking == "base" else model.load_adapter(net, cfg.run_dir / "adapter")


def benchmark_problems(cfg: Config, benchmark: str) -> dict[str, dict[str, Any]]:
    """The problems to sample, by task id: all, or `limit` of them spread evenly."""
    from treediff import score

    problems, _ = score.load_benchmark(benchmark, corpus.benchmark_file(cfg, benchmark))
    ids = list(problems)
    if cfg.limit and cfg.limit < len(ids):
        ids = [ids[i * len(ids) // cfg.limit] for i in range(cfg.limit)]
    return {i: problems[i] for i in ids}


def samples_path(cfg: Config, benchmark: str, length: int) -> Path:
    return cfg.run_dir / "samples" / f"{benchmark}-T{length}.jsonl"


def settings(cfg: Config, length: int) -> dict[str, Any]:
    """What is written into every sample, so that two harnesses' numbers can be told apart."""
    names = ("block_length", "tokens_per_step", "temperature", "prompt_style", "think", "eos_suppression", "extract")
    return {"T": length, "seed": cfg.seed, "precision": cfg.precision, **{n: getattr(cfg, n) for n in names}}


def sampled(cfg: Config, benchmark: str, length: int) -> Path:
    """One sample per problem of `benchmark` with `length` generated tokens; made, or completed, if missing.

    Trains the run first if need be. A line is appended per answer, so a killed call goes on where it stopped. Raises
    UserError if the file there was made under other settings.
    """
    from tqdm import tqdm

    from treediff import launch

    claim(cfg, *launch.TRAINING_STAGES)
    path = samples_path(cfg, benchmark, length)
    problems = benchmark_problems(cfg, benchmark)
    mine = settings(cfg, length)
    done = _kept(path, mine)
    todo = {i: p for i, p in problems.items() if i not in done}
    if not todo:
        return path
    launch.trained(cfg)
    tok = tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    net = load_run(cfg)
    how = Decoding(
        mask_id=tok.mask_token_id,
        eos_id=tok.eos_token_id,
        gen_length=length,
        steps=length // cfg.tokens_per_step,
        block_length=cfg.block_length,
        temperature=cfg.temperature,
        suppressed=tokens.endings(tok) if cfg.eos_suppression else (),
        seed=cfg.seed,
    )
    prompts = {i: prompt_ids(cfg, tok, p["prompt"]) for i, p in todo.items()}
    order = sorted(todo, key=lambda i: len(prompts[i][0]))
    batches = [order[k : k + cfg.sample_batch] for k in range(0, len(order), cfg.sample_batch)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(
        total=len(batches) * how.steps, desc=f"sample {cfg.masking} T={length}", unit=" steps", mininterval=2
    ) as bar:
        for batch in batches:
            out = decode(net, [prompts[i][0] for i in batch], how, bar.update)
            lines = []
            for row, task in enumerate(batch):
                text = prompts[task][1] + answer_text(tok, out.ids[row].tolist())
                record = {
                    "task_id": task,
                    "solution": extract(text, todo[task]["entry_point"], cfg.extract),
                    "answer": text,
                    "ids": out.ids[row].tolist(),
                    "committed_at": out.committed_at[row].tolist(),
                    "confidence": [round(c, 5) for c in out.confidence[row].tolist()],
                    "settings": mine,
                }
                lines.append(json.dumps(record) + "\n")
            with path.open("a") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
    write_json(path.with_suffix(".provenance.json"), provenance(settings=mine, problems=len(problems)))
    return path


def _kept(path: Path, mine: dict[str, Any]) -> set[str]:
    """Task ids already in `path`. A last line that a kill cut short is dropped; other settings are refused."""
    if not path.exists():
        return set()
    whole_lines = path.read_bytes().rpartition(b"\n")[0]
    kept = set()
    for line in whole_lines.splitlines():
        record = json.loads(line)
        for name, value in record["settings"].items():
            if mine.get(name) != value:
                raise UserError(
                    f"{path}: sampled with {name} = {value!r}, not {mine.get(name)!r}; "
                    f"give {name} that value, or delete the file."
                )
        kept.add(record["task_id"])
    if len(whole_lines) + 1 < path.stat().st_size:
        os.truncate(path, len(whole_lines) + 1 if whole_lines else 0)
    return kept


def read_samples(path: Path) -> dict[str, dict[str, Any]]:
    """The samples of a file by task id, with `ids` and `committed_at` as arrays."""
    out = {}
    for record in corpus.read_jsonl(path):
        record["ids"] = np.array(record["ids"])
        record["committed_at"] = np.array(record["committed_at"])
        out[record["task_id"]] = record
    return out
