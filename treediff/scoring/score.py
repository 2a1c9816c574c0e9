"""Programs -> verdicts: EvalPlus's tests and comparisons on programs that run in a sandbox (client.py).

    ledger = score("humaneval", Path("HumanEvalPlus-v0.1.10.jsonl.gz"), Path("samples.jsonl"), Path("ledger.json"))
    passes(ledger)                            # {"n": 164, "base": 72, "plus": 60}

Each worker (verdicts.py) is a clean process that knows the expected outputs, hands a program and the inputs to its
sandbox, and compares what comes back, with EvalPlus's rules, oracles and time limits.
The expected outputs are what the benchmark's own solutions return in the same sandbox; they are kept under
`runs/cache`. A scoring that was killed goes on from its journal; the ledger is written whole or not at all. It holds
one verdict per task, or, where a task has several samples, a list of verdicts, and marks those that EvalPlus would not
give (departures.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from treediff.config import runs_root
from treediff.data import benchmarks
from treediff.data.benchmarks import PARTS
from treediff.errors import UserError
from treediff.files import whole, write_json
from treediff.sandbox import isolation
from treediff.sandbox.runner import MEMORY
from treediff.sandbox.values import pack
from treediff.scoring import departures, stats
from treediff.scoring.verdicts import MIN_SECONDS, MOST_SECONDS, TIME_FACTOR, Job, decided

log = logging.getLogger(__name__)


def read_samples(samples: Path, problems: dict[str, dict[str, Any]]) -> tuple[dict[str, list[str]], str, int]:
    """Programs by task id, the file's SHA-256, and how many rows are of tasks that this release does not have.

    A row holds task_id and `solution`, or `completion`, which the prompt is put before. Several samples of a task are
    numbered from 0 by `sample`, which may be missing from the first. Rows of unknown tasks are left out, as EvalPlus
    does (MBPP+ lost 21 tasks from v0.1 to v0.2.0), unless they are of another benchmark.
    """
    path = Path(samples)
    raw = benchmarks.unpack(path)
    families = {task.split("/")[0] for task in problems}
    programs: dict[str, dict[int, str]] = {}
    unknown = 0
    for row, sample in benchmarks.rows(path, raw):
        task = sample.get("task_id")
        if not isinstance(task, str) or task.split("/")[0] not in families:
            raise UserError(
                f"{path}, row {row}: the benchmark has no task {task!r}; score it on the one it was made for."
            )
        field, number = "solution" if "solution" in sample else "completion", sample.get("sample", 0)
        if not isinstance(sample.get(field), str):
            raise UserError(f"{path}, row {row}: {field} is missing or no text; give a completion or a solution.")
        if type(number) is not int or number < 0:
            raise UserError(f"{path}, row {row}: sample is {number!r}; number a task's samples 0, 1, 2 and so on.")
        if task not in problems:
            unknown += 1
            continue
        if number in programs.setdefault(task, {}):
            raise UserError(
                f"{path}, row {row}: task {task} has a sample {number} already; delete one, or number further samples "
                'of a task by a field "sample": 1, 2 and so on.'
            )
        programs[task][number] = sample[field] if field == "solution" else problems[task]["prompt"] + sample[field]
    for task, of in programs.items():
        if max(of) >= len(of):
            missing = next(n for n in range(len(of)) if n not in of)
            raise UserError(f"{path}: task {task} has a sample {max(of)} but no {missing}; sample it, or renumber.")
    if not programs:
        raise UserError(f"{path}: there is no sample of this benchmark in it; sample the model first.")
    if unknown:
        log.warning("%s: %d samples are of tasks that this release does not have; left out.", path, unknown)
    ordered = {task: [of[n] for n in range(len(of))] for task, of in programs.items()}
    return ordered, hashlib.sha256(raw).hexdigest(), unknown


# --- scoring --------------------------------------------------------------------------------------------------------
def score(
    benchmark: str,
    data: Path | None,
    samples: Path,
    out: Path,
    *,
    workers: int = 0,
    limit_to: Iterable[str] | None = None,
    without: Iterable[str] = (),
    label: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The ledger of `samples`, written to `out`. A finished ledger of the same samples, data and settings is reused.

    `workers`: programs at a time, 0 for one per core. `limit_to`: the only task ids to score. `without`: layers of
    the sandbox to leave off (for tests; verdicts are the same). `label`: the name of the sampling switches.
    """
    import evalplus

    out = Path(out)
    found = _earlier(out)
    problems, data_hash = benchmarks.load_benchmark(benchmark, data)
    programs, samples_hash, unknown_tasks = read_samples(samples, problems)
    wanted = set(problems if limit_to is None else limit_to)
    if strange := sorted(wanted - set(problems)):
        raise UserError(
            f"limit_to: {benchmark} has no task {strange[0]!r}; the first it has is {next(iter(problems))}."
        )
    programs = {task: programs[task] for task in problems if task in programs and task in wanted}
    rules = {
        "evalplus": evalplus.__version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        "data_sha256": data_hash,
        "data_release": benchmarks.RELEASES.get(data_hash),
        "min_seconds": MIN_SECONDS,
        "time_factor": TIME_FACTOR,
        "most_seconds": MOST_SECONDS,
        "memory_bytes": _memory(),
    }
    settings = {
        "samples": sum(map(len, programs.values())),
        "samples_sha256": samples_hash,
        "samples_of_unknown_tasks": unknown_tasks,
        "tasks_in_benchmark": len(problems),
        "limited": limit_to is not None,
        **(label or {}),
        **rules,
    }
    if benchmark != "tinycode" and data_hash not in benchmarks.RELEASES:
        log.warning(
            "%s: the data (SHA-256 %s) are none of %s: figures are not comparable with published ones.",
            benchmark,
            data_hash[:16],
            " or ".join(benchmarks.RELEASES.values()),
        )
    tasks = list(programs)
    if found and found["settings"] == settings and list(found["tasks"]) == tasks:
        log.info("%s: already scored, reused.", out)
        out.with_name(f".{out.name}.journal").unlink(missing_ok=True)
        if (ledger := departures.marked(found, programs)) != found:
            write_json(out, ledger)
        return ledger
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, settings["samples"]))
    oracle = references(benchmark, problems, data_hash, workers, list(without))
    keys = {
        (task, n): hashlib.sha256(
            json.dumps([benchmark, task, program, rules]).encode("utf-8", "surrogatepass")
        ).hexdigest()
        for task, of in programs.items()
        for n, program in enumerate(of)
    }
    journal = out.with_name(f".{out.name}.journal")
    with _journal(journal) as (done, write):
        jobs: dict[str, Job] = {}  # by key: samples of a task that are the same program are run once
        for task in oracle:
            for n, program in enumerate(programs.get(task, ())):
                if keys[task, n] not in done:
                    name = f"{task} sample {n}" if n else task
                    jobs.setdefault(keys[task, n], (name, {"program": program}, oracle[task]))
        key_of, sandbox = {name: key for key, (name, _, _) in jobs.items()}, done.get("sandbox", {})
        known = len({*keys.values()}) - len(jobs)
        for which, result in decided(list(jobs.values()), workers, list(without), f"score {benchmark}", known):
            if which is None:
                sandbox = result = isolation.weakest(sandbox, result)
            key = "sandbox" if which is None else key_of[which]
            done[key] = result
            write(key, result)
        several = any(len(of) > 1 for of in programs.values())
        verdicts = {task: [done[keys[task, n]] for n in range(len(programs[task]))] for task in tasks}
        ledger = {
            "benchmark": benchmark,
            "settings": settings,
            "sandbox": isolation.in_words(sandbox),
            "tasks": verdicts if several else {task: of[0] for task, of in verdicts.items()},
        }
        ledger = departures.marked(ledger, programs)
        write_json(out, ledger)
        journal.unlink()
    found = passes(ledger)
    log.info("%s: %d/%d base, %d/%d plus.", out, found["base"], found["n"], found["plus"], found["n"])
    return ledger


def _earlier(out: Path) -> dict[str, Any] | None:
    """The ledger in `out`, if there is one. Raises UserError if it is anything else, which the ledger would replace."""
    if not out.exists():
        return None
    try:
        found = json.loads(out.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(k), dict) for k in ("settings", "sandbox", "tasks")):
        raise UserError(f"{out}: there is something that is no ledger; name another file for the ledger, or move it.")
    return found


def _memory() -> int:
    """Address space that a program gets [bytes]: EvalPlus's, or what the caller's hard limits leave of it."""
    hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in ("AS", "DATA", "STACK")}
    lower = {name: value for name, value in hard.items() if 0 <= value < MEMORY}
    for name, value in lower.items():
        log.warning(
            "score: the hard limit RLIMIT_%s of this process, %d MiB, is lower than EvalPlus's %d MiB; programs that "
            "need more fail here and pass there.",
            name,
            value >> 20,
            MEMORY >> 20,
        )
    return min([MEMORY, *(value for name, value in lower.items() if name != "STACK")])


def passes(ledger: dict[str, Any]) -> dict[str, int]:
    """How many programs there are, pass the base tests, and pass both the base and the plus tests (EvalPlus's `+`)."""
    counted = {part: stats.counts(ledger, part).values() for part in PARTS}
    return {"n": sum(n for _, n in counted["base"]), **{part: sum(c for c, _ in of) for part, of in counted.items()}}


def passes_at(ledger: dict[str, Any]) -> Iterator[str]:
    """A ledger of several samples in words: pass@1, 10 and 100 as far as each task has as many. None for one sample."""
    most = min(n for _, n in stats.counts(ledger, "base").values())
    for k in (k for k in (1, 10, 100) if 1 < most >= k):
        rates = []
        for part in PARTS:
            values = list(stats.pass_at(stats.counts(ledger, part), k).values())
            low, high = stats.interval(values, most / k)
            rates.append(f"{part} {100 * sum(values) / len(values):.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        yield f"pass@{k} over {len(values)} tasks, in percent: {', '.join(rates)}"


@contextlib.contextmanager
def _journal(path: Path) -> Iterator[tuple[dict[str, Any], Any]]:
    """What a killed scoring had finished, by key, and a function that appends to it."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another scoring is writing this ledger; wait for it.") from None
        file.seek(0)
        raw = file.read()
        whole_lines = raw[: raw.rfind(b"\n") + 1]
        file.truncate(len(whole_lines))  # a line that a kill cut short
        done: dict[str, Any] = {}
        for line in whole_lines.splitlines():
            with contextlib.suppress(ValueError, TypeError):
                key, value = json.loads(line)
                done[key] = value

        def write(key: str, value: Any) -> None:
            file.write(json.dumps([key, value]).encode() + b"\n")
            file.flush()

        yield done, write


def references(
    benchmark: str, problems: dict[str, dict[str, Any]], data_hash: str, workers: int, without: list[str]
) -> dict[str, bytes]:
    """For each task, a line of JSON: inputs, expected outputs and reference times of both parts. Cached by data."""
    import evalplus
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS

    version = f"{sys.version_info[0]}.{sys.version_info[1]}-{evalplus.__version__}"
    path = runs_root() / "cache" / f"oracle5-{benchmark}-{data_hash[:16]}-{version}.jsonl"
    if path.exists():
        first, *kept = path.read_bytes().splitlines()
        return dict(zip(json.loads(first), kept, strict=True))  # the slowest first
    todo = []
    for task, problem in problems.items():
        line: dict[str, Any] = {"kind": "mbpp" if benchmark == "mbpp" else "humaneval", "task": task}
        line |= {"entry": problem["entry_point"], "atol": problem.get("atol", 0)}
        line |= {part: {"inputs": pack(problem[f"{part}_input"])} for part in PARTS}
        program = problem["prompt"] + problem["canonical_solution"]
        todo.append((task, {"program": program, "record": True}, json.dumps(line).encode()))
    given = {task: line for task, _, line in todo}
    lines: dict[str, bytes] = {}
    slow: dict[str, float] = {}
    for name, result in decided(todo, workers, without, f"reference {benchmark}", 0):
        if (task := name or "") not in given:
            continue
        if "error" in result:
            raise UserError(f"{benchmark}, task {task}: its own solution fails ({result['error']}); give sound data.")
        line = json.loads(given[task])
        for part in PARTS:
            line[part] |= result[part]
            if line["entry"] in MBPP_OUTPUT_NOT_NONE_TASKS:
                line[part]["expected"] = [v is not None for v in line[part]["expected"]]
        lines[task] = json.dumps(line).encode()
        slow[task] = sum(sum(line[part]["times"]) for part in PARTS)
    order = sorted(problems, key=lambda task: -slow[task])
    with whole(path) as temporary:
        temporary.write_bytes(b"\n".join([json.dumps(order).encode(), *[lines[task] for task in order]]) + b"\n")
        temporary.chmod(0o600)  # not for a program that runs as another user
    return {task: lines[task] for task in order}
