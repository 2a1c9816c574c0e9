"""Prompts, answers and programs: what stands around the sampler, and a benchmark's samples as a file.

    path = sample(cfg, "tinycode", 64)            # runs/.../samples/tinycode-T64.jsonl, made or completed
    rows = read_samples(path)                     # by task id
    torchrun --nproc-per-node 8 -m treediff.cli sample --preset paper     # any number of processes and nodes

Holes (infill.py) are filled in the same way: `length` None and a hole set's name for the benchmark's.

The prompts of a benchmark are cut into shares by (task, process), each process batches its share by length and memory,
and appends every answer to a part file of its own, whole lines only. When all answers are there, they become the
samples file in one rename. So a killed call goes on where it stopped, with any number of processes.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import uuid
from collections import Counter, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from treediff import progress, usage
from treediff.config import SWITCHES, Config
from treediff.data import benchmarks, holes
from treediff.errors import UserError
from treediff.files import read_jsonl, whole, write_json
from treediff.runs import open_run, provenance
from treediff.sampling import autoregressive, diffusion, infill
from treediff.sampling.prompts import Prompt, extract
from treediff.training import heartbeat, launch

log = logging.getLogger(__name__)


def samples_path(cfg: Config, benchmark: str, length: int | None) -> Path:
    """runs/<preset>/<run>/samples/<benchmark>-T<length>.jsonl, or <hole set>-<tier>-H<hole_length>.jsonl: `name`."""
    return cfg.run_dir / "samples" / f"{name(cfg, benchmark, length)}.jsonl"


def name(cfg: Config, benchmark: str, length: int | None) -> str:
    """What samples and ledger of a benchmark and T are called, or of a hole set at the run's `hole_length`; behind it
    the name of the sampling switches (`decoding`, `protocol`), if they have one."""
    return cfg.named(f"{benchmark}-T{length}" if length is not None else f"{benchmark}-{cfg.tier}-H{cfg.hole_length}")


_SETTINGS = (
    *("seed", "precision", "model", "block_length", "tokens_per_step", "temperature", "guidance", "remasking"),
    *("threshold", "cache", "early_exit", "prompt_style", "think", "eos_suppression", "extract"),
)


_HOLE_SETTINGS = (
    *("seed", "precision", "block_length", "tokens_per_step", "temperature", "guidance", "remasking", "threshold"),
    *("cache", "prompt_style", "eos_suppression", "tier", "holes_per_program", "hole_seed", "hole_length"),
    *("hole_lengths", "hole_context"),
)


_LATER = (
    "sample_compile",
    "schedule",
    "top_p",
    "top_k",
)  # told where they are not the default: samples were made before


def settings(cfg: Config, length: int | None) -> dict[str, Any]:
    """What is written into every sample, so that two harnesses' numbers can be told apart."""
    later = {n: getattr(cfg, n) for n in _LATER if getattr(cfg, n) != SWITCHES[n].default}
    told = cfg.label | later
    if length is None:
        return {**told, **{n: getattr(cfg, n) for n in _HOLE_SETTINGS}}
    return {"T": length, **told, **{n: getattr(cfg, n) for n in _SETTINGS}}


def _wanted(cfg: Config, benchmark: str, length: int | None) -> list[tuple[str, int]]:
    """(task, number) of each sample to be made; of holes, (program, number of the hole in it)."""
    if length is None:
        return list(numbered(holes.load(cfg, benchmark)))
    return [(task, k) for task in benchmarks.benchmark_problems(cfg, benchmark) for k in range(cfg.samples_per_task)]


def numbered(every: list[holes.Hole]) -> dict[tuple[str, int], holes.Hole]:
    """Holes by (program, their number in it)."""
    counts: Counter[str] = Counter()
    out = {}
    for hole in every:
        out[hole.task, counts[hole.task]] = hole
        counts[hole.task] += 1
    return out


def sample(cfg: Config, benchmark: str, length: int | None) -> Path:
    """`samples_per_task` samples per problem of `benchmark` with `length` generated tokens, or (None) one completion
    per hole of the set `benchmark`; see `sample_all`."""
    return sample_all(cfg, [(benchmark, length)])[0]


def sample_all(cfg: Config, jobs: Sequence[tuple[str, int | None]]) -> list[Path]:
    """The samples of several (benchmark, generated tokens); made, or completed, by processes that load the model once.

    Under a launcher (torchrun, deepspeed) each process makes its share. Otherwise this call starts `sample_processes`
    of them, one per GPU (a GPU's memory is free again when they end), or does it all here where there is none. Raises
    UserError if the run is not trained, or what is there was made under other settings.
    """
    if not cfg.model:
        open_run(cfg, *launch.TRAINING_STAGES)
    every = {job: _wanted(cfg, *job) for job in jobs}

    def missing() -> list[tuple[str, int | None]]:
        return [j for j in jobs if not _complete(samples_path(cfg, *j), every[j], settings(cfg, j[1]))]

    paths = [samples_path(cfg, *job) for job in jobs]
    if not (todo := missing()):
        return paths
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if not cfg.model and not launch.is_trained(cfg):
        raise UserError(f"{cfg.run_dir}: not trained yet; run `treediff train` with the same switches first.")
    gpus = torch.cuda.device_count()
    processes = 1 if launched else cfg.sample_processes or max(1, gpus)
    taken = (int(os.environ["WORLD_SIZE"]) if launched else processes) if gpus else 0
    # Of a launcher's processes the first keeps account for all.
    with usage.attempt(cfg.run_dir, "sample", taken) if os.environ.get("RANK", "0") == "0" else nullcontext():
        if processes > 1 or (gpus and not launched):

            def made() -> int:
                found = (_made(samples_path(cfg, *j), settings(cfg, j[1])).keys() & set(every[j]) for j in todo)
                return sum(map(len, found))

            launch.sampling(cfg, todo, processes, sum(len(every[j]) for j in todo), made)
        else:
            share(cfg, todo)
    if not launched and (left := missing()):
        raise UserError(f"{samples_path(cfg, *left[0])}: sampling ended before all answers were there; call it again.")
    return paths


def share(cfg: Config, jobs: Sequence[tuple[str, int | None]]) -> None:
    """Make this process's share of the samples that are missing, with one model for all lengths."""
    if torch.cuda.is_available():
        torch.cuda.set_device(diffusion.device())  # else libraries would put their memory on the first GPU
    answerer = None
    for benchmark, length in jobs:
        if length is None:
            _share(cfg, benchmark, length, *_holes(cfg, benchmark))
            continue
        answerer = answerer or (autoregressive.Autoregressive if cfg.model else diffusion.Diffusion)(cfg, length)
        answerer.of_length(length)
        _share(cfg, benchmark, length, answerer, *_problems(cfg, answerer, benchmark))


def _share(
    cfg: Config,
    benchmark: str,
    length: int | None,
    answerer: Any,
    prompts: list[Any],
    line: Callable[..., dict[str, Any]],
) -> None:
    """Every process deals out all samples in the same order and takes its own, so that who makes what does not depend
    on what is there already.
    """
    path, mine = samples_path(cfg, benchmark, length), settings(cfg, length)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    made = _made(path, mine)
    todo = [p for p in prompts[rank::world] if p.key not in made]
    queue: deque[list[Prompt]] = deque()
    while todo:
        rows = min(cfg.sample_batch, answerer.rows(len(todo[0].ids)))
        queue.append(todo[:rows])
        todo = todo[rows:]
    # Tokens of answers, or holes.
    each, unit, what = (1, " holes", benchmark) if length is None else (length, " tokens", f"T={length}")
    total = sum(map(len, queue)) * each
    who = cfg.run_dir.name if world == 1 else f"{cfg.run_dir.name} ({rank + 1} of {world})"
    with progress.bar(total=total, desc=f"sample {who} {what}", unit=unit, unit_scale=True, mininterval=2) as bar:
        ready = 0
        part = None
        while queue:
            batch = queue.popleft()
            at = ready

            def watch(_: torch.Tensor, behind: float, at: int = at, rows: int = len(batch)) -> None:
                bar.update(int(at + behind * rows * each) - bar.n)

            answers = None
            with suppress(torch.OutOfMemoryError):
                answers = answerer.answer(batch, watch)
            if answers is None:  # by now the exception is gone, and with it the frames that hold the tensors
                if len(batch) == 1:
                    raise UserError(f"{batch[0].task}: this prompt alone does not fit into the GPU's memory.")
                gc.collect()
                torch.cuda.empty_cache()
                half = len(batch) // 2
                queue.extendleft([batch[half:], batch[:half]])
                log.warning("%d prompts together do not fit into memory; going on with %d.", len(batch), half)
                continue
            ready += len(batch) * each
            lines = [_line(p, line(p, a), mine) for p, a in zip(batch, answers, strict=True)]
            part = part or _part(path)
            with part.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())


def _problems(cfg: Config, answerer: Any, benchmark: str) -> tuple[list[Prompt], Callable[..., dict[str, Any]]]:
    """The prompts of a benchmark, and what makes a record of an answer."""
    problems = benchmarks.benchmark_problems(cfg, benchmark)
    prompts = []
    for task, problem in problems.items():
        ids, begin = answerer.prompt(problem["prompt"])
        prompts += [Prompt(task, k, problem["prompt"], ids, begin) for k in range(cfg.samples_per_task)]
    prompts.sort(key=lambda p: -len(p.ids))  # the longest first: if memory is short, it shows at once

    def line(p: Prompt, answer: dict[str, Any]) -> dict[str, Any]:
        text = p.begin + answer.pop("text")
        return {"solution": extract(text, problems[p.task]["entry_point"], cfg.extract), "answer": text, **answer}

    return prompts, line


def _holes(cfg: Config, benchmark: str) -> tuple[Any, list[infill.Gap], Callable[..., dict[str, Any]]]:
    """The same for a hole set, after the model that fills them: the holes on their canvas."""
    answerer = infill.Infiller(cfg)
    gaps = [answerer.gap(hole, k) for (_, k), hole in numbered(holes.load(cfg, benchmark)).items()]
    gaps.sort(key=lambda g: (-max(answerer.lengths(g)), -len(g.ids)))  # of like lengths together

    def line(gap: infill.Gap, answer: dict[str, Any]) -> dict[str, Any]:
        text, hole = answer.pop("text"), gap.hole
        head = {"hole": hole.id, "tier": hole.tier, "node": hole.node, "size": gap.size}
        head |= {"exact": infill.exact(hole, text), "completion": text, "solution": hole.program(text)}
        return head | answer

    return answerer, gaps, line


def _line(p: Prompt | infill.Gap, record: dict[str, Any], mine: dict[str, Any]) -> bytes:
    head = {"task_id": p.task, **({"sample": p.sample} if p.sample else {})}
    return json.dumps({**head, **record, "settings": mine}).encode() + b"\n"


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
                    f"give {name} that value, name these switches by --as, or delete the file."
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
        with whole(path) as temporary:
            temporary.write_bytes(b"".join(found[key] + b"\n" for key in [*wanted, *rest]))
        facts = provenance(settings=mine, problems=len({task for task, _ in wanted}), samples=len(wanted))
        write_json(path.with_suffix(".provenance.json"), facts)
        for part in parts:
            part.unlink(missing_ok=True)
    return True


def read_samples(path: Path) -> dict[str, dict[str, Any]]:
    """The first sample of each task of a file by task id, with `ids` and `committed_at` as arrays."""
    out = {}
    for record in read_jsonl(path):
        if record.get("sample", 0):
            continue
        record["ids"] = np.array(record["ids"])
        record["committed_at"] = np.array(record["committed_at"])
        out[record["task_id"]] = record
    return out


def main() -> None:
    """A process that `launch.sampling` started: its switches and jobs come as one argument."""
    task = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if starter := os.environ.get("TREEDIFF_STARTER"):
        heartbeat.follow(starter)
    try:
        share(Config(**task["switches"]), [tuple(job) for job in task["jobs"]])
    except UserError as e:
        sys.exit(f"rank{os.environ.get('RANK', 0)}: {e}")


if __name__ == "__main__":
    main()
