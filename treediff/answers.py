"""Prompts, answers and programs: what stands around the sampler, and a benchmark's samples as a file.

    path = sampled(cfg, "tinycode", 64)           # runs/.../samples/tinycode-T64.jsonl, made or completed
    rows = read_samples(path)                     # by task id
    torchrun --nproc-per-node 8 -m treediff.cli sample --preset paper     # any number of processes and nodes

The prompts of a benchmark are cut into shares by (task, process), each process batches its share by length and memory,
and appends every answer to a part file of its own, whole lines only. When all answers are there, they become the
samples file in one rename. So a killed call goes on where it stopped, with any number of processes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import textwrap
import uuid
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from treediff import corpus, model, sample, tokens, watch
from treediff.config import Config, UserError, claim, provenance, whole, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger(__name__)

RESPONSE = (
    "Below is a Python script with a self-contained function that solves the problem and passes corresponding tests:"
)
"""What EvalPlus's chat mode lets the assistant begin with."""

# --- prompts and programs ------------------------------------------------------------------------------------------


def message(cfg: Config, problem: str) -> tuple[str, str]:
    """What the user says under `prompt_style`, and how the answer is made to begin under that and `think`."""
    said = problem.strip()
    if cfg.prompt_style != "bare":
        said = f"{corpus.INSTRUCTION}\n```\n{said}\n```"
    begin = {"free": "", "open": "<think>\n", "closed": "<think>\n\n</think>\n\n"}[cfg.think]
    if cfg.prompt_style == "prefill":
        begin += f"{RESPONSE}\n```python\n"
    return said, begin


def prompt_ids(cfg: Config, tok: PreTrainedTokenizerFast, problem: str) -> tuple[list[int], str]:
    """The prompt of a benchmark problem as tokens, and how the answer is made to begin (in the prompt already)."""
    said, begin = message(cfg, problem)
    ids, _ = tokens.encode(tok, corpus.prompt_text(tok, said), special=True)
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
    """The program in an answer: by EvalPlus's `sanitize`, or the `first_fence` after the reasoning."""
    if rule == "sanitize":
        from evalplus.sanitize import sanitize

        return sanitize(text, entry_point)
    return first_fence(text)


def first_fence(text: str) -> str:
    """The content of the first code fence after the last </think>, of backticks or tildes, in any language.

    A fence begins a line; only where none does, one inside a line counts. One that is never closed runs to the end;
    an indented one is dedented. Without any fence, the answer after </think> is the program.
    """
    rest = text.rpartition("</think>")[2]
    opening = re.search(r"^[ \t]*(`{3,}|~{3,})[^`\n]*(?:\n|$)", rest, re.M) or re.search(
        r"(`{3,})[^`\n]*(?:\n|$)", rest
    )
    if not opening:
        return rest.strip("\n")
    body, mark = rest[opening.end() :], opening[1]
    closing = re.search(rf"^[ \t]*{mark[0]}{{{len(mark)},}}[ \t]*$", body, re.M) or re.search(re.escape(mark), body)
    program = body[: closing.start()] if closing else body
    return textwrap.dedent(program).strip("\n") if opening[0][:1] in " \t" else program.strip("\n")


# --- the models that answer ----------------------------------------------------------------------------------------


@dataclass
class Prompt:
    """One sample to be made: sample number `sample` of a task; `uid` names it to the random numbers."""

    task: str
    sample: int
    text: str
    ids: list[int]
    begin: str  # how the answer is made to begin

    @property
    def key(self) -> tuple[str, int]:
        return self.task, self.sample

    @property
    def uid(self) -> int:
        return (zlib.crc32(self.task.encode()) >> 4 << 8) + self.sample


def device() -> str:
    """This process's GPU, or the CPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def load_run(cfg: Config) -> nn.Module:
    """The run's model, ready to sample from: its backbone with its adapter merged, or its own weights."""
    from treediff import train

    dtype = torch.float32 if cfg.precision == "fp32" else torch.bfloat16
    own = cfg.run_dir / "model"
    folder = str(own) if own.is_dir() else train.backbone_folder(cfg)
    net = model.load_backbone(folder, dtype, device(), cfg.revision)
    return net if own.is_dir() or cfg.masking == "base" else model.load_adapter(net, cfg.run_dir / "adapter")


def decoding(cfg: Config, tok: PreTrainedTokenizerFast, length: int) -> sample.Decoding:
    """The decoding switches, for answers of `length` tokens."""
    same = ("block_length", "temperature", "guidance", "remasking", "eos_suppression", "threshold", "cache")
    return sample.Decoding(
        mask_id=tok.mask_token_id,
        ends=tokens.endings(tok),
        gen_length=length,
        steps=length // cfg.tokens_per_step,
        early_exit=cfg.early_exit,
        seed=cfg.seed,
        **{name: getattr(cfg, name) for name in same},
    )


class Diffusion:
    """The run's model as it answers prompts."""

    def __init__(self, cfg: Config, length: int) -> None:
        self.cfg, self.tok = cfg, tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
        self.how = decoding(cfg, self.tok, length)
        self.net = load_run(cfg)

    def prompt(self, problem: str) -> tuple[list[int], str]:
        return prompt_ids(self.cfg, self.tok, problem)

    def answer(self, batch: Sequence[Prompt], watch: sample.Watch) -> list[dict[str, Any]]:
        """Per prompt: the answer's text (without what it was made to begin with), ids and how they came about."""
        out = sample.decode(self.net, [p.ids for p in batch], self.how, [p.uid for p in batch], watch)
        return [
            {
                "text": answer_text(self.tok, out.ids[i].tolist()),
                "ids": out.ids[i].tolist(),
                "committed_at": out.committed_at[i].tolist(),
                "confidence": [round(c, 5) for c in out.confidence[i].tolist()],
                "margin": round(m, 6) if math.isfinite(m := out.margin[i].item()) else None,
                "margin_at": out.margin_at[i].item(),
            }
            for i in range(len(batch))
        ]

    def rows(self, longest: int) -> int:
        """Prompts of at most `longest` tokens that fit into the GPU's free memory together; no limit on a CPU."""
        if not torch.cuda.is_available():
            return sys.maxsize
        return rows_that_fit(self.net.config, self.how, longest, torch.cuda.mem_get_info(device())[0])


def rows_that_fit(shape: Any, how: sample.Decoding, longest: int, free: int) -> int:
    """How many prompts of at most `longest` tokens can be decoded together in `free` bytes, at least 1; an estimate.

    `shape` is the model's transformers configuration. Counted in bf16: the widest moment of a block (the residual, its
    copies and three feed-forward activations), the keys and values that a cache keeps, and once the logits of a chunk.
    """
    width = longest + how.gen_length
    d_kv = shape.hidden_size * shape.num_key_value_heads // shape.num_attention_heads
    row = 2 * width * (8 * shape.hidden_size + 3 * shape.intermediate_size)
    row += 0 if how.cache == "none" else 4 * width * shape.num_hidden_layers * d_kv
    row *= 2 if how.guidance > 0 else 1
    logits = sample.CHUNK * shape.vocab_size * (12 if how.temperature == 0 else 44)
    return max(1, int((0.85 * free - logits) // row))


# --- a benchmark's samples -----------------------------------------------------------------------------------------


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


_SETTINGS = (
    *("seed", "precision", "model", "block_length", "tokens_per_step", "temperature", "guidance", "remasking"),
    *("threshold", "cache", "early_exit", "prompt_style", "think", "eos_suppression", "extract"),
)


def settings(cfg: Config, length: int) -> dict[str, Any]:
    """What is written into every sample, so that two harnesses' numbers can be told apart."""
    return {"T": length, **{n: getattr(cfg, n) for n in _SETTINGS}}


def sampled(cfg: Config, benchmark: str, length: int) -> Path:
    """`samples_per_task` samples per problem of `benchmark` with `length` generated tokens; made, or completed.

    Trains the run first if need be. Under a launcher (torchrun, deepspeed) each process makes its share; otherwise
    this call starts `sample_processes` of them, or does it all. Raises UserError if what is there was made under
    other settings.
    """
    from treediff import launch

    if not cfg.model:
        claim(cfg, *launch.TRAINING_STAGES)
    path = samples_path(cfg, benchmark, length)
    problems = benchmark_problems(cfg, benchmark)
    mine = settings(cfg, length)
    wanted = [(task, k) for task in problems for k in range(cfg.samples_per_task)]
    if _complete(path, wanted, mine):
        return path
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and not cfg.model and not launch.is_trained(cfg):
        raise UserError(f"{cfg.run_dir}: not trained yet; train it first, without this launcher.")
    if not cfg.model:
        launch.trained(cfg)
    processes = 1 if launched else cfg.sample_processes or max(1, torch.cuda.device_count())
    if processes > 1:
        launch.sampling(
            cfg, benchmark, length, processes, len(wanted), lambda: len(_made(path, mine).keys() & set(wanted))
        )
    else:
        share(cfg, benchmark, length)
    if not _complete(path, wanted, mine) and not launched:
        raise UserError(f"{path}: sampling ended before all answers were there; call it again.")
    return path


def share(cfg: Config, benchmark: str, length: int) -> None:
    """Make this process's share of the samples that are missing.

    Every process deals out all samples in the same order and takes its own, so that who makes what does not depend on
    what is there already.
    """
    from tqdm import tqdm

    path, mine = samples_path(cfg, benchmark, length), settings(cfg, length)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    problems = benchmark_problems(cfg, benchmark)
    if cfg.model:
        from treediff.causal import Causal as Kind
    else:
        Kind = Diffusion
    if torch.cuda.is_available():
        torch.cuda.set_device(device())  # else libraries would put theirs on the first GPU
    answerer = Kind(cfg, length)
    prompts = []
    for task, problem in problems.items():
        ids, begin = answerer.prompt(problem["prompt"])
        prompts += [Prompt(task, k, problem["prompt"], ids, begin) for k in range(cfg.samples_per_task)]
    prompts.sort(key=lambda p: -len(p.ids))  # the longest first: if memory is short, it shows at once
    made = _made(path, mine)
    todo = [p for p in prompts[rank::world] if p.key not in made]
    queue: deque[list[Prompt]] = deque()
    while todo:
        rows = min(cfg.sample_batch, answerer.rows(len(todo[0].ids)))
        queue.append(todo[:rows])
        todo = todo[rows:]
    total = sum(map(len, queue)) * length
    name = cfg.run_dir.name if world == 1 else f"{cfg.run_dir.name} ({rank + 1} of {world})"
    with tqdm(total=total, desc=f"sample {name} T={length}", unit=" tokens", unit_scale=True, mininterval=2) as bar:
        ready = 0
        part = None
        while queue:
            batch = queue.popleft()
            at = ready

            def watch(_: torch.Tensor, behind: float, at: int = at, rows: int = len(batch)) -> None:
                bar.update(int(at + behind * rows * length) - bar.n)

            try:
                answers = answerer.answer(batch, watch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise UserError(f"{batch[0].task}: this prompt alone does not fit into the GPU's memory.") from None
                torch.cuda.empty_cache()
                half = len(batch) // 2
                queue.extendleft([batch[half:], batch[:half]])
                log.warning("%d prompts together do not fit into memory; going on with %d.", len(batch), half)
                continue
            ready += len(batch) * length
            lines = [_line(cfg, problems[p.task], p, a, mine) for p, a in zip(batch, answers, strict=True)]
            part = part or _part(path)
            with part.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())


def _line(cfg: Config, problem: dict[str, Any], p: Prompt, answer: dict[str, Any], mine: dict[str, Any]) -> bytes:
    text = p.begin + answer.pop("text")
    record = {
        "task_id": p.task,
        **({"sample": p.sample} if p.sample else {}),
        "solution": extract(text, problem["entry_point"], cfg.extract),
        "answer": text,
        **answer,
        "settings": mine,
    }
    return json.dumps(record).encode() + b"\n"


def _part(path: Path) -> Path:
    """A new part file's name. One process writes it and nobody goes on with it, so only its last line can be cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def _made(path: Path, mine: dict[str, Any]) -> dict[tuple[str, int], bytes]:
    """The samples that are there, in parts and in the file itself, as lines by (task, sample).

    The last line of a part is left out if a kill cut it short. Raises UserError on other settings.
    """
    found: dict[tuple[str, int], bytes] = {}
    # The parts before the file: if another process makes the file of them meanwhile, it is in place before they go.
    for source in [*sorted(path.parent.glob(f".{path.name}.*.part")), path]:
        try:
            raw = source.read_bytes()
        except FileNotFoundError:
            continue
        for line in raw[: raw.rfind(b"\n") + 1].splitlines():
            try:
                record = json.loads(line)
                theirs = record["settings"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{source}: this file holds a line that is no sample; delete that line.") from None
            if theirs != mine:
                name = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
                raise UserError(
                    f"{source}: sampled with {name} = {theirs.get(name)!r}, not {mine.get(name)!r}; "
                    f"give {name} that value, or delete the file."
                )
            found.setdefault((record["task_id"], record.get("sample", 0)), line)
    return found


def _complete(path: Path, wanted: list[tuple[str, int]], mine: dict[str, Any]) -> bool:
    """Whether all samples are there; if so, the file holds them afterwards, and no part is left."""
    parts = list(path.parent.glob(f".{path.name}.*.part"))
    found = _made(path, mine)
    if not found.keys() >= set(wanted):
        return False
    if parts:
        rest = [key for key in found if key not in set(wanted)]
        with whole(path) as spot:
            spot.write_bytes(b"".join(found[key] + b"\n" for key in [*wanted, *rest]))
        facts = provenance(settings=mine, problems=len({task for task, _ in wanted}), samples=len(wanted))
        write_json(path.with_suffix(".provenance.json"), facts)
        for part in parts:
            part.unlink(missing_ok=True)
    return True


def read_samples(path: Path) -> dict[str, dict[str, Any]]:
    """The first sample of each task of a file by task id, with `ids` and `committed_at` as arrays."""
    out = {}
    for record in corpus.read_jsonl(path):
        if record.get("sample", 0):
            continue
        record["ids"] = np.array(record["ids"])
        record["committed_at"] = np.array(record["committed_at"])
        out[record["task_id"]] = record
    return out


def main() -> None:
    """A process that `launch.sampling` started: its switches, benchmark and length come as one argument."""
    task = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if starter := os.environ.get("TREEDIFF_STARTER"):
        watch.follow(starter)
    try:
        share(Config(**task["switches"]), task["benchmark"], task["length"])
    except UserError as e:
        sys.exit(f"rank{os.environ.get('RANK', 0)}: {e}")


if __name__ == "__main__":
    main()
