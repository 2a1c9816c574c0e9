"""Makes the runs of a study, as many at a time as the machine has room for, and writes what they say together.

    facts = run(study)                       # runs/<preset>/study/: see report/study.py
    print(text(plan(study)))                 # hours, memory, power: before anything starts

Each run is a child process that goes through the ordinary stages (train, sample, score) by pipeline.py. Whatever is
finished is kept, so that the same call goes on after kill -9: a child ends by itself when its study does. On a CPU a
run is one process of one thread, on GPUs it has one, or a share of one; its updates have the same rows in any case.
Command: treediff study --preset tiny --seeds 10
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from treediff import pipeline, progress
from treediff.config import Config, runs_root
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.files import read_json, write_json
from treediff.report import study as results
from treediff.report.paper import TASKS
from treediff.report.study import EFFECT, Study
from treediff.scoring import restore, stats
from treediff.scoring import score as scoring
from treediff.training import heartbeat, heldout, launch, memory
from treediff.training import plan as planning

log = logging.getLogger(__name__)

_PROCESS = 2.2e9  # bytes of a run's processes besides its tensors: the interpreters, torch and DeepSpeed in them
_STAGES = ("train", "sample", "score")


# --- how much room there is ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Room:
    """Runs at a time: the GPUs that each place has, as CUDA_VISIBLE_DEVICES names them (empty on a CPU)."""

    places: tuple[str, ...]
    one_process: bool  # whether a run is one process, its accumulation raised so that its updates have the same rows
    said: str


def room(cfg: Config, at_once: int = 0) -> Room:
    """What the machine has room for; `at_once` runs at most, 0 for as many as go."""
    import torch

    cores, gpus = len(os.sched_getaffinity(0)), torch.cuda.device_count()
    shape = planning.shape(cfg)
    one = _one_process(cfg)
    if not gpus:
        need = _PROCESS + sum(memory.per_device(one, shape, cuda=False, flash=False).values())
        fit = max(1, int(_available() // need))
        count = min(cores, fit, at_once or cores)
        return Room(("",) * count, True, f"{cores} cores, memory for {fit} runs of {need / 1e9:.1f} GB")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    names = visible if len(visible) == gpus and all(visible) else [str(i) for i in range(gpus)]
    total = min(torch.cuda.get_device_properties(i).total_memory for i in range(gpus))
    need = sum(memory.per_device(one, shape).values())
    if need <= total:
        each = max(1, int(0.9 * total // need))
        places = [name for _ in range(each) for name in names]
        said = f"{gpus} GPUs of {total / 1e9:.0f} GB, {need / 1e9:.1f} GB a run"
        count = min(len(places), max(cores // 2, gpus), at_once or len(places))
        return Room(tuple(places[:count]), True, said)
    each = cfg.processes
    if each > gpus:
        raise UserError(f"processes: a run needs {each} GPUs (it does not fit one), there are {gpus}.")
    places = [",".join(names[i : i + each]) for i in range(0, gpus - each + 1, each)]
    return Room(tuple(places[: at_once or None]), False, f"{gpus} GPUs, {each} a run")


def _available() -> float:
    """Bytes of memory that new processes can have."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return float("inf")


def _one_process(cfg: Config) -> Config:
    """The same updates by one process: the rows of each are accumulated. A backbone's switches likewise."""
    pretrain = dict(cfg.pretrain)
    if {"accumulation", "processes"} & pretrain.keys():
        both = [pretrain.get(name, getattr(cfg, name)) for name in ("accumulation", "processes")]
        pretrain |= {"accumulation": both[0] * both[1], "processes": 1}
    return cfg.but(processes=1, accumulation=cfg.accumulation * cfg.processes, nodes=1, node_rank=0, pretrain=pretrain)


def fitted(study: Study, where: Room) -> Study:
    """The study with its runs as the machine takes them."""
    if not where.one_process:
        return study
    return Study(_one_process(study.cfg), study.arms, study.seeds, study.backbones)


# --- the plan ------------------------------------------------------------------------------------------------------
def plan(study: Study, at_once: int = 0, deviation: float = 0.0) -> dict[str, Any]:
    """What the study takes and what it can resolve. `deviation`: a pilot's between runs [points]; without it, that of
    the study's own finished runs, if there are two of an arm."""
    where = room(study.cfg, at_once)
    study = fitted(study, where)
    results.refuse_others(study)
    runs = study.runs()
    done = {name for name, cfg in runs.items() if results.finished(cfg)}
    seconds, how = _expected(runs, done, where)
    hours = sum(s for name, s in seconds.items() if name not in done) / 3600
    found = {
        "runs": len(runs),
        "done": len(done),
        "arms": [arm.name for arm in study.arms],
        "seeds": study.seeds,
        "backbones": study.backbones,
        "at_once": len(where.places),
        "room": where.said,
        "seconds": {kind: statistics.fmean(s) for kind, s in _by_kind(runs, seconds).items()},
        "hours_of_work": hours,
        "hours": hours / len(where.places),
        "from": how,
    }
    said = "given, from a pilot"
    if not deviation:
        said = "of the runs that are finished"
        rates = results.pooled(results.collect(study))["rates"] if done else []
        sds = [r["sd"] for r in rates if r["primary"] and r["sd"] is not None]
        deviation = (sum(s * s for s in sds) / len(sds)) ** 0.5 if sds else 0.0
    if deviation:
        found["deviation"], found["deviation_from"] = deviation, said
        found["runs_needed"] = stats.seeds_needed(EFFECT, deviation)
        found["resolved"] = stats.resolved(study.seeds, deviation) if study.seeds > 1 else None
    return found


def _by_kind(runs: dict[str, Config], seconds: dict[str, float]) -> dict[str, list[float]]:
    of: dict[str, list[float]] = {}
    for name, cfg in runs.items():
        of.setdefault("backbone" if cfg.masking == "none" else "fine-tuning", []).append(seconds[name])
    return of


def text(p: dict[str, Any]) -> str:
    """A plan to read."""
    lines = [
        f"{p['runs']} runs, {p['done']} of them finished: {', '.join(p['arms'])}, {p['seeds']} seeds each, "
        f"backbones: {p['backbones']}",
        f"{p['at_once']} at a time ({p['room']})",
        f"{p['hours']:.1f} hours to go ({p['hours_of_work']:.1f} hours of work): "
        + ", ".join(f"a {kind} {s / 60:.1f} min" for kind, s in p["seconds"].items())
        + f" ({p['from']})",
    ]
    if "deviation" not in p:
        lines.append(
            "power: the deviation between runs is not known yet; give a pilot's with --deviation, or ask again when "
            "two runs of a strategy are finished"
        )
        return "\n".join(lines)
    lines.append(
        f"power: runs of one strategy deviate by {p['deviation']:.2f} points ({p['deviation_from']}); to resolve "
        f"{EFFECT} points with 80 % power takes {p['runs_needed']} runs of each strategy"
    )
    if p["resolved"]:
        lines[-1] += f"; {p['seeds']} of each resolve {p['resolved']:.1f} points"
    return "\n".join(lines)


def _expected(runs: dict[str, Config], done: set[str], where: Room) -> tuple[dict[str, float], str]:
    """Seconds of every run, and where they come from: measured runs of the same kind, or the plan."""
    measured: dict[bool, list[float]] = {}
    for name in done:
        if total := sum(_seconds(runs[name]).values()):
            measured.setdefault(runs[name].masking == "none", []).append(total)
    planned, speed, out = set(), 0.0, {}
    for name, cfg in runs.items():
        kind = cfg.masking == "none"
        if kind in measured:
            out[name] = statistics.median(measured[kind])
        else:
            speed = speed or _speed(cfg)
            out[name] = _planned(cfg, speed)
            planned.add("backbone" if kind else "fine-tuning")
    said = "measured on finished runs of this study"
    if planned:
        kinds = " and ".join(sorted(planned))
        said = f"{kinds} by the plan, which is the most: rows of max_length, {speed / 1e9:,.0f} GFLOP/s"
    return out, said


_CPU_SHARE = 0.4
"""Of a core's speed in multiplying matrices, what a training step reaches: a guess, until there are finished runs."""


def _speed(cfg: Config) -> float:
    """FLOP/s that a run may keep up: a share of the GPU's data sheet as the plan has it, or of a product of matrices
    here on one core, measured."""
    import torch

    if torch.cuda.is_available():
        device = planning.device(torch.cuda.get_device_name()) or planning.DEVICES["A100"]
        return device.recomputed * (cfg.peak_flops or device.flops)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x = torch.rand(512, 512)
    _ = x @ x
    started, rounds = time.perf_counter(), 0
    while (taken := time.perf_counter() - started) < 0.2:
        _ = x @ x
        rounds += 1
    torch.set_num_threads(threads)
    return _CPU_SHARE * rounds * 2 * 512**3 / taken


def _planned(cfg: Config, speed: float) -> float:
    """Seconds of training and sampling by their FLOPs, and a minute for starting and scoring."""
    p = planning.plan(cfg)
    sampled = 0.0
    for benchmark in cfg.benchmarks:
        problems = cfg.limit or (TASKS | {"tinycode": 600}).get(benchmark, 500)
        for length in cfg.lengths:
            window = cfg.block_length if cfg.cache == "dual" else min(cfg.max_length, 2 * length)
            steps = length / cfg.tokens_per_step
            sampled += problems * cfg.samples_per_task * steps * window * 2.0 * p["parameters"]
    if results.NODES in results.ledgers(cfg):  # some three forward passes a node
        sampled += 4 * restore.PER_TIER * 3 * cfg.max_length * 2.0 * p["parameters"]
    trained = 0.0 if cfg.masking == "none" and cfg.backbone != "pretrain" else p["flops"] + p["recomputation"]
    return 60 + (trained + sampled) / speed


def _seconds(cfg: Config) -> dict[str, float]:
    path = cfg.run_dir / "seconds.json"
    return read_json(path) if path.exists() else {}


# --- running -------------------------------------------------------------------------------------------------------
def run(study: Study, at_once: int = 0) -> dict[str, Any]:
    """Make every run of the study that is not finished, then write its results; the facts of results.analysed.

    A run that fails does not stop the others: `missing` names it. Raises UserError if another study runs in this
    folder, if a run that is there was made with other switches, or if an earlier results.json was edited.
    """
    folder = study.cfg.preset_dir / "study"
    with _alone(folder):
        if (folder / "results.json").exists():
            results.load(folder / "results.json")
        where = room(study.cfg, at_once)
        study = fitted(study, where)
        results.refuse_others(study)
        runs = study.runs()
        done = {name for name, cfg in runs.items() if results.finished(cfg)}
        expected, _ = _expected(runs, done, where)
        why: dict[str, str] = {}
        todo = {name: cfg for name, cfg in runs.items() if name not in done}
        total = sum(expected.values())
        shown = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}"
        with progress.bar(total=total, desc="study", bar_format=shown, smoothing=0, mininterval=2) as bar:
            bar.update(sum(expected[name] for name in done))
            bar.initial = bar.n  # the time left is reckoned from what this call does

            def follow(running: list[str]) -> None:
                finished = len(runs) - len(todo) - len(running)
                bar.set_postfix_str(f"{finished} of {len(runs)} runs", refresh=False)
                behind = [n for n in runs if n not in todo and n not in running]
                part = sum(expected[n] * _share(runs[n]) for n in running)
                bar.update(max(0.0, sum(expected[n] for n in behind) + part - bar.n))

            _all(study, todo, where, folder, why, follow)
        return results.write(study, why)


def collect(study: Study) -> dict[str, Any]:
    """The results of the runs that are finished, nothing started."""
    study = fitted(study, room(study.cfg))
    return results.write(study)


def _all(
    study: Study,
    todo: dict[str, Config],
    where: Room,
    folder: Path,
    why: dict[str, str],
    progress: Callable[[list[str]], None],
) -> None:
    """Prepare what runs share, then start each run when there is a place and its backbone is there; empties `todo`.

    `why` takes the reason of each run that did not end well.
    """
    if not todo:
        return
    places = list(where.places)
    workers = max(1, len(os.sched_getaffinity(0)) // len(places))
    running: dict[str, tuple[subprocess.Popen, str, Config, Path]] = {}
    try:
        sets = {json.dumps([c.as_dict("data"), c.masking == "none"]): c for c in study.runs().values()}
        process = _start([{"prepare": c.as_dict()} for c in sets.values()], folder / "jobs" / "prepare.log", places[0])
        running["prepare"] = (process, places[0], study.cfg, folder / "jobs" / "prepare.log")
        while todo or running:
            for name, (process, place, cfg, path) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if name == "prepare":
                    if process.returncode:
                        why |= dict.fromkeys(todo, f"preparing failed: {_last_words(path)}")
                        todo.clear()
                    continue
                places.append(place)
                if process.returncode or not results.finished(cfg):
                    why[name] = _last_words(path)
                    log.warning("%s failed: %s (%s)", name, why[name], path)
                else:
                    log.info("%s: finished in %.0f s.", name, sum(_seconds(cfg).values()))
            for name, cfg in list(todo.items()) if "prepare" not in running else ():
                backbone = cfg.with_masking("none")
                its = backbone.run_dir.name
                if cfg.masking != "none" and not launch.is_trained(backbone):
                    if its in why:
                        why[name] = f"its backbone {its} is missing"
                        del todo[name]
                    if its in todo or its in running or its in why:
                        continue
                if places:
                    place = places.pop(0)
                    path = folder / "jobs" / f"{name}.log"
                    switches = cfg.as_dict() | {"workers": cfg.workers or workers}
                    running[name] = (_start([{"run": switches}], path, place), place, cfg, path)
                    del todo[name]
            progress([name for name in running if name != "prepare"])
            time.sleep(0.5)
    finally:
        for process, *_ in running.values():
            launch.stop(process)


def _start(tasks: list[dict[str, Any]], path: Path, place: str) -> subprocess.Popen:
    """A child process that does `tasks` and keeps its words in `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ, TREEDIFF_STARTER=heartbeat.starter(), TREEDIFF_RUNS=str(runs_root().resolve()))
    env |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    if place:
        env["CUDA_VISIBLE_DEVICES"] = place
    else:
        env["OMP_NUM_THREADS"] = "1"
    with path.open("ab") as out:
        out.write(f"\n--- {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        out.flush()
        return subprocess.Popen(
            _command(tasks),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )


def _command(tasks: list[dict[str, Any]]) -> list[str]:
    return [sys.executable, "-m", "treediff.jobs", json.dumps(tasks)]


def _last_words(path: Path) -> str:
    lines = [x for x in path.read_text(errors="replace").splitlines() if x.strip()]
    return lines[-1].strip() if lines and not lines[-1].startswith("---") else "ended without a word"


def _share(cfg: Config) -> float:
    """About how much of a run is done, from 0 to 1."""
    done = 0.0
    if launch.is_trained(cfg):
        ledgers = [path.exists() for path in results.ledgers(cfg).values()]
        return 0.7 + 0.3 * sum(ledgers) / max(1, len(ledgers))
    path = cfg.run_dir / "log.jsonl"
    with suppress(OSError, ValueError, IndexError, UserError):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 20_000))
            lines = [x for x in file.read().split(b"\n") if x.startswith(b'{"step"') and x.endswith(b"}")]
        done = 0.7 * (json.loads(lines[-1])["step"] + 1) / planning.plan(cfg)["steps"]
    return min(done, 0.7)


@contextmanager
def _alone(folder: Path) -> Iterator[IO[str]]:
    """Hold the folder's lock. Raises UserError if another study has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise UserError(
                f"{folder}: another study runs here ({lock.read().strip()}); wait for it, or set TREEDIFF_RUNS to "
                "another folder."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        lock.flush()
        yield lock


# --- a child -------------------------------------------------------------------------------------------------------
def _timed(cfg: Config, stage: str, what: Callable[[], Any]) -> None:
    """Do it, and add the seconds that it took to the run's seconds.json."""
    started = time.monotonic()
    what()
    kept = _seconds(cfg)
    write_json(
        cfg.run_dir / "seconds.json", kept | {stage: round(kept.get(stage, 0.0) + time.monotonic() - started, 1)}
    )


def make(cfg: Config) -> None:
    """All stages of one run; what is there is kept."""
    _timed(cfg, "train", lambda: pipeline.trained(cfg))
    for benchmark in cfg.benchmarks:
        for length in cfg.lengths:
            _timed(cfg, "sample", lambda b=benchmark, t=length: pipeline.sampled(cfg, b, t))
            _timed(cfg, "score", lambda b=benchmark, t=length: pipeline.scored(cfg, b, t))
    if results.NODES in results.ledgers(cfg):
        _timed(cfg, "score", lambda: pipeline.restored(cfg))


def prepare(cfg: Config) -> None:
    """What runs share and would otherwise all make at once."""
    pipeline.prepared(cfg)
    if cfg.masking != "none":
        pipeline.prepared(cfg.with_masking("none"))
        heldout.rows(cfg)
    if "tinycode" in cfg.benchmarks:
        benchmarks.write_tinycode(cfg)
    for name in cfg.benchmarks:
        problems, digest = benchmarks.load_benchmark(name, benchmarks.benchmark_file(cfg, name))
        scoring.references(name, problems, digest, cfg.workers or len(os.sched_getaffinity(0)), [])


def main() -> None:
    """A child's entry point: its tasks come as one argument."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    heartbeat.follow(os.environ.pop("TREEDIFF_STARTER"))
    # Held until this process and all that it starts are gone: a study that is started again waits for them here.
    fcntl.flock(sys.stdout, fcntl.LOCK_EX)
    try:
        for task in json.loads(sys.argv[1]):
            for kind, switches in task.items():
                {"run": make, "prepare": prepare}[kind](Config(**switches))
    except UserError as e:
        sys.exit(str(e))


if __name__ == "__main__":
    main()
