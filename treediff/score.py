"""Programs -> verdicts: EvalPlus's tests and comparisons on programs that run in a cage (sandbox.py).

    ledger = score("humaneval", Path("HumanEvalPlus-v0.1.10.jsonl.gz"), Path("samples.jsonl"), Path("ledger.json"))
    passes(ledger)                            # {"n": 164, "base": 72, "plus": 60}

Each worker is a *judge*: this module run as a script in a clean process. It knows the expected outputs, hands a
program and the inputs to its sandbox, and compares what comes back, with EvalPlus's rules, oracles and time limits.
The expected outputs are what the benchmark's own solutions return in the same sandbox; they are kept under
`runs/cache`. A scoring that was killed goes on from its journal; the ledger is written whole or not at all.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import logging
import os
import queue
import reprlib
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from treediff.config import UserError, read_json, runs_root, whole, write_json
from treediff.sandbox import MEMORY, Broken, Sandbox, Silent, decode, encode

log = logging.getLogger(__name__)

RELEASES = {
    "42526ec0e7d5f3ee0b06d6ced98f8c8bae3d76519151bfb3d36f79010645bd7f": "HumanEvalPlus v0.1.10",
    "b54e762755248ca411b523c917fa9f93c07b5ff2966bf60b3917b853926a3dad": "MbppPlus v0.2.0",
}
"""EvalPlus's data files by the SHA-256 of their unpacked content."""
FIELDS = {"prompt": str, "entry_point": str, "canonical_solution": str, "base_input": list, "plus_input": list}
MIN_SECONDS, TIME_FACTOR, MOST_SECONDS = 1.0, 4.0, 60.0
"""EvalPlus's time limits: a test gets max(1 s, 4 x the reference's time), a set of tests at most 60 s."""
SLACK = 2.0
"""What a program may take beyond its limits before it is killed from outside, as in EvalPlus [s]."""
GIVE_UP = 10.0
"""What a judge may take to read and compare one answer before it is killed over it [s]."""
PARTS = ("base", "plus")

# --- what there is to score -----------------------------------------------------------------------------------------


def load_benchmark(name: str, data: Path | None = None) -> tuple[dict[str, dict], str]:
    """The problems of `humaneval`, `mbpp` or `tinycode` by task id, and the SHA-256 of the unpacked data file.

    `data` is an EvalPlus-format JSONL or .jsonl.gz file; without it, EvalPlus finds or downloads its own.
    """
    if name not in ("humaneval", "mbpp", "tinycode"):
        raise UserError(f"benchmark: there is no {name!r}; choose humaneval, mbpp or tinycode.")
    path = Path(data) if data else _download(name)
    raw = _unpack(path)
    problems: dict[str, dict] = {}
    for row, problem in _rows(path, raw):
        if problem.get("plus_input") == {}:  # how MbppPlus writes that a task has no further tests
            problem["plus_input"] = []
        wrong = [k for k, t in FIELDS.items() if not isinstance(problem.get(k), t)]
        if not isinstance(problem.get("task_id"), str) or wrong:
            raise UserError(
                f"{path}, row {row}: {(wrong or ['task_id'])[0]} is missing or no EvalPlus field; "
                f"give a file in the format of EvalPlus's {name}."
            )
        if not problem["base_input"]:
            raise UserError(f"{path}, row {row}: base_input is empty; every task needs a test.")
        if problem["task_id"] in problems:
            raise UserError(f"{path}, row {row}: task {problem['task_id']} is there twice; delete one.")
        if name == "mbpp":
            from evalplus.data.mbpp import mbpp_deserialize_inputs

            for part in PARTS:
                key = f"{part}_input"
                problem[key] = mbpp_deserialize_inputs(problem["task_id"], problem[key])
        problems[problem["task_id"]] = problem
    if not problems:
        raise UserError(f"{path}: there is no task in it; give a file in the format of EvalPlus's {name}.")
    return problems, hashlib.sha256(raw).hexdigest()


def _download(name: str) -> Path:
    """EvalPlus's own copy of its data, downloaded if need be."""
    if name == "tinycode":
        raise UserError("data: tinycode has no download; give the file that `treediff prepare` wrote.")
    from evalplus.data import humaneval, mbpp

    ready = {"humaneval": humaneval._ready_human_eval_plus_path, "mbpp": mbpp._ready_mbpp_plus_path}[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(ready())
    except Exception as e:  # whatever urllib, gzip or the file system may raise
        raise UserError(
            f"data: EvalPlus could not download {name} ({type(e).__name__}: {e}); give its .jsonl.gz file with --data."
        ) from None


def _unpack(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (OSError, EOFError) as e:
        raise UserError(f"{path}: cannot be read ({getattr(e, 'strerror', None) or e}); give another file.") from None


def _rows(path: Path, raw: bytes) -> Iterator[tuple[int, dict]]:
    """(row number from 1, object) of each non-blank line."""
    for row, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            raise UserError(f"{path}, row {row}: not a line of JSON; mend or delete it.") from None
        if not isinstance(value, dict):
            raise UserError(f"{path}, row {row}: not a JSON object; mend or delete it.")
        yield row, value


def read_samples(samples: Path, problems: dict[str, dict]) -> tuple[dict[str, str], str, int]:
    """Program by task id, the file's SHA-256, and how many rows are of tasks that this release does not have.

    A row holds task_id and `solution`, or `completion`, which the prompt is put before. Rows of unknown tasks are
    left out, as EvalPlus does (MBPP+ lost 21 tasks from v0.1 to v0.2.0), unless they are of another benchmark.
    """
    path = Path(samples)
    raw = _unpack(path)
    families = {task.split("/")[0] for task in problems}
    programs: dict[str, str] = {}
    unknown = 0
    for row, sample in _rows(path, raw):
        task = sample.get("task_id")
        if not isinstance(task, str) or task.split("/")[0] not in families:
            raise UserError(
                f"{path}, row {row}: the benchmark has no task {task!r}; score it on the one it was made for."
            )
        field = "solution" if "solution" in sample else "completion"
        if not isinstance(sample.get(field), str):
            raise UserError(f"{path}, row {row}: {field} is missing or no text; give a completion or a solution.")
        if task in programs:
            raise UserError(f"{path}, row {row}: task {task} has a sample already; keep one per task.")
        if task not in problems:
            unknown += 1
            continue
        programs[task] = sample[field] if field == "solution" else problems[task]["prompt"] + sample[field]
    if not programs:
        raise UserError(f"{path}: there is no sample of this benchmark in it; sample the model first.")
    if unknown:
        log.warning("%s: %d samples are of tasks that this release does not have; left out.", path, unknown)
    return programs, hashlib.sha256(raw).hexdigest(), unknown


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
) -> dict:
    """The ledger of `samples`, written to `out`. A finished ledger of the same samples, data and settings is reused.

    `workers`: programs at a time, 0 for one per core. `limit_to`: the only task ids to score. `without`: layers of
    the sandbox to leave off (for tests; verdicts are the same).
    """
    import evalplus

    problems, data_hash = load_benchmark(benchmark, data)
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
        "data_release": RELEASES.get(data_hash),
        "min_seconds": MIN_SECONDS,
        "time_factor": TIME_FACTOR,
        "most_seconds": MOST_SECONDS,
        "memory_bytes": MEMORY,
    }
    settings = {
        "samples": len(programs),
        "samples_sha256": samples_hash,
        "samples_of_unknown_tasks": unknown_tasks,
        "tasks_in_benchmark": len(problems),
        "limited": limit_to is not None,
        **rules,
    }
    out, tasks = Path(out), list(programs)
    if out.exists():
        found = read_json(out)
        if found.get("settings") == settings and list(found.get("tasks", ())) == tasks:
            log.info("%s: already scored, reused.", out)
            out.with_name(f".{out.name}.journal").unlink(missing_ok=True)
            return found
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(programs)))
    oracle = _oracle(benchmark, problems, data_hash, workers, list(without))
    keys = {
        task: hashlib.sha256(json.dumps([benchmark, task, program, rules]).encode("utf-8", "surrogatepass")).hexdigest()
        for task, program in programs.items()
    }
    journal = out.with_name(f".{out.name}.journal")
    with _journal(journal) as (done, write):
        results = {task: done[key] for task, key in keys.items() if key in done}
        todo = [
            (task, {"program": programs[task]}, oracle[task])
            for task in oracle
            if task in programs and task not in results
        ]
        sandbox = done.get("sandbox", {})
        for task, result in _judged(todo, workers, list(without), f"score {benchmark}", len(results)):
            if task is None:
                sandbox = result
                write("sandbox", result)
            else:
                results[task] = result
                write(keys[task], result)
        ledger = {
            "benchmark": benchmark,
            "settings": settings,
            "sandbox": sandbox,
            "tasks": {task: results[task] for task in tasks},
        }
        write_json(out, ledger)
        journal.unlink()
    counts = passes(ledger)
    log.info("%s: %d/%d base, %d/%d plus.", out, counts["base"], counts["n"], counts["plus"], counts["n"])
    return ledger


def passes(ledger: dict) -> dict[str, int]:
    """How many tasks there are, pass the base tests, and pass both the base and the plus tests (EvalPlus's `+`)."""
    tasks = ledger["tasks"].values()
    base = [t["base"] == "pass" for t in tasks]
    plus = [t["base"] == t["plus"] == "pass" for t in tasks]
    return {"n": len(base), "base": sum(base), "plus": sum(plus)}


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


def _oracle(
    benchmark: str, problems: dict[str, dict], data_hash: str, workers: int, without: list[str]
) -> dict[str, bytes]:
    """For each task, a line of JSON: inputs, expected outputs and reference times of both parts. Cached by data."""
    import evalplus
    from evalplus.eval._special_oracle import MBPP_OUTPUT_NOT_NONE_TASKS

    version = f"{sys.version_info[0]}.{sys.version_info[1]}-{evalplus.__version__}"
    path = runs_root() / "cache" / f"oracle3-{benchmark}-{data_hash[:16]}-{version}.jsonl"
    if path.exists():
        lines = path.read_bytes().splitlines()
        return dict(zip(json.loads(lines[0]), lines[1:], strict=True))  # the slowest first
    todo = []
    for task, problem in problems.items():
        line: dict[str, Any] = {"kind": "mbpp" if benchmark == "mbpp" else "humaneval", "task": task}
        line |= {"entry": problem["entry_point"], "atol": problem.get("atol", 0)}
        line |= {part: {"inputs": encode(problem[f"{part}_input"])} for part in PARTS}
        program = problem["prompt"] + problem["canonical_solution"]
        todo.append((task, {"program": program, "record": True}, json.dumps(line).encode()))
    lines, slow, given = {}, {}, {task: line for task, _, line in todo}
    for task, result in _judged(todo, workers, without, f"reference {benchmark}", 0):
        if task is None:
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
    with whole(path) as spot:
        spot.write_bytes(b"\n".join([json.dumps(order).encode(), *[lines[task] for task in order]]) + b"\n")
        spot.chmod(0o600)  # not for a program that runs as another user
    return {task: lines[task] for task in order}


Job = tuple[str, dict, bytes]


def _judged(
    jobs: list[Job], workers: int, without: list[str], title: str, before: int
) -> Iterator[tuple[str | None, dict]]:
    """Results as judges finish them; once, under the name None, the sandbox's layers. A progress bar meanwhile."""
    from tqdm import tqdm

    if not jobs:
        return
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str | None, Any]] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    stop, judges = threading.Event(), []
    threads = [
        threading.Thread(target=_serve, args=(todo, done, stop, judges, without), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    left, layers = len(jobs), None
    try:
        with tqdm(total=before + left, initial=before, desc=title, unit=" tasks", mininterval=1) as bar:
            while left:
                task, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                if task is None:
                    layers, told = result, layers
                    if told is None:
                        yield None, result
                    continue
                left -= 1
                bar.update()
                yield task, result
    finally:
        stop.set()
        for judge in judges if left else ():  # interrupted: do not wait for the programs that run
            judge.process.kill()
        for thread in threads:
            thread.join()


def _serve(
    todo: queue.SimpleQueue, done: queue.SimpleQueue, stop: threading.Event, judges: list[_Judge], without: list[str]
) -> None:
    """One worker: a judge, and another when it dies."""
    judge = None
    try:
        while not stop.is_set():
            try:
                task, header, oracle = todo.get_nowait()
            except queue.Empty:
                return
            for _ in range(2):
                if judge is None:
                    judge = _Judge(without)
                    judges.append(judge)
                    done.put((None, judge.layers))
                result = judge.ask(header, oracle)
                if result is None and stop.is_set():
                    return
                if result is None:  # it hung or died: over this answer, unless another judge does not
                    judge.close()
                    judge = None
                elif "broken" not in result:
                    break
            if result is None:
                why = "killed: the answer could not be compared"
                result = {"base": "fail", "plus": "fail", "reason": why, "seconds": 0.0}
                result = {"error": why} if header.get("record") else result
            if "broken" in result:
                raise RuntimeError(f"sandbox: a program's process cannot be set up ({result['broken']})")
            done.put((task, result))
    except BaseException as e:
        done.put((None, e))
    finally:
        if judge:
            judge.close()


class _Judge:
    """The caller's end of a judge process."""

    def __init__(self, without: list[str]) -> None:
        root = str(Path(__file__).resolve().parents[1])
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "treediff.score", json.dumps(without), str(GIVE_UP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**keep, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        hello = self.process.stdout.readline()
        if not hello:
            self.close()
            raise RuntimeError("score: the judge did not start; its message is above.")
        self.layers: dict[str, str] = json.loads(hello)

    def ask(self, header: dict, oracle: bytes) -> dict | None:
        """The judge's result, or None if it died or hung."""
        seconds = 3600.0 if header.get("record") else 4 * (2 * MOST_SECONDS + GIVE_UP)
        watch = threading.Timer(seconds, self.process.kill)
        watch.daemon = True
        watch.start()
        try:
            self.process.stdin.write(json.dumps(header).encode() + b"\n" + oracle + b"\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            return None
        finally:
            watch.cancel()

    def close(self) -> None:
        """End the judge; its sandbox ends with it."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


# --- the judge, in its own process ----------------------------------------------------------------------------------


def _judge(without: list[str]) -> None:
    """Two lines of JSON a job, in (program; oracle) and one out, until stdin ends."""
    import ctypes

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the caller
    libc.prctl(4, 0, 0, 0, 0)  # no process of the same user may look into this one, which knows what is expected
    warnings.simplefilter("ignore")  # numpy's, over what it is asked to compare
    with Sandbox(without) as box:
        # After the sandbox has started, lest it inherit the limit: an answer may decode to many times its length.
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (8 << 30 if hard < 0 else min(8 << 30, hard), hard))
        answers.write(json.dumps(box.layers).encode() + b"\n")
        answers.flush()
        for line in sys.stdin.buffer:
            header, oracle = json.loads(line), json.loads(sys.stdin.buffer.readline())
            try:
                result = _record(box, header, oracle) if header.get("record") else _verdict(box, header, oracle)
            except Broken as e:
                result = {"broken": str(e)}
            answers.write(json.dumps(result).encode() + b"\n")
            answers.flush()


def _record(box: Sandbox, header: dict, oracle: dict) -> dict:
    """What the benchmark's own solution returns, still encoded, and how long each test and its sending takes."""
    parts: dict[str, Any] = {}
    for part in PARTS:
        inputs = oracle[part]["inputs"]
        run = box.run(header["program"], oracle["entry"], inputs, [600.0] * len(inputs), seconds=1200.0)
        expected, times, extras, last = [], [], [], time.perf_counter()
        for frame in run:
            now = time.perf_counter()
            if frame.kind != b"o":
                return {"error": f"{part} test {len(expected)}: {frame.value[0]}: {frame.value[1]}"}
            expected.append(frame.value[1])
            times.append(frame.value[0])
            extras.append(round(max(0.0, now - last - frame.value[0]), 3))
            last = now
        if len(expected) != len(inputs):
            return {"error": f"{part} test {len(expected)}: {box.status}"}
        parts[part] = {"expected": expected, "times": times, "extras": extras}
    return parts


def _verdict(box: Sandbox, header: dict, oracle: dict) -> dict:
    """Both parts of one task, as in the ledger; the reason is that of the first part that fails."""
    start = time.perf_counter()
    found = {part: _examine(box, header["program"], oracle, part) for part in PARTS}
    reasons = [reason for _, reason in found.values() if reason]
    return {
        **{part: status for part, (status, _) in found.items()},
        "reason": reasons[0].encode("utf-8", "backslashreplace").decode() if reasons else "",
        "seconds": round(time.perf_counter() - start, 3),
    }


def _examine(box: Sandbox, program: str, oracle: dict, part: str) -> tuple[str, str]:
    """(pass, fail or timeout; reason) of one part's tests, as EvalPlus's `untrusted_check` has them.

    As there, a test that overruns its own limit fails; `timeout` is a program that had to be killed. A program that
    ran out of time while the machine gave it less than three quarters of a core gets a second chance,
    unless the first took half a minute.
    """
    for _ in range(2):
        start = time.perf_counter()
        verdict = _run(box, program, oracle, part)
        wall = time.perf_counter() - start
        if not verdict[1].startswith("time-out") or wall > MOST_SECONDS / 2 or box.status["cpu"] > 0.75 * wall:
            break
    return verdict


def _run(box: Sandbox, program: str, oracle: dict, part: str) -> tuple[str, str]:
    """One attempt of `_examine`."""
    from evalplus.eval._special_oracle import MBPP_OUTPUT_SET_EQ_TASKS

    tests, entry, kind = oracle[part], oracle["entry"], oracle["kind"]
    inputs, expected, n = tests["inputs"], tests["expected"], len(tests["inputs"])
    limits = [max(MIN_SECONDS, TIME_FACTOR * t) for t in tests["times"]]
    # What it takes to send an output is not the program's time; bulky outputs take seconds.
    extras = [TIME_FACTOR * t for t in tests["extras"]]
    waits = [limit + extra + SLACK for limit, extra in zip(limits, extras, strict=True)]
    seconds = min(MOST_SECONDS, sum(limits)) + SLACK + min(MOST_SECONDS, sum(extras))
    as_set = kind == "mbpp" and entry in MBPP_OUTPUT_SET_EQ_TASKS
    atol, i = oracle["atol"], 0
    run = box.run(program, entry, inputs, limits, seconds=seconds, as_set=as_set, waits=waits)
    try:
        with contextlib.closing(run):
            for frame in run:
                if frame.kind != b"o":
                    where = f"{part} test {i}: {_call(entry, inputs, i)}" if frame.kind == b"e" else "the definition"
                    return "fail", _exception(*frame.value, where, limits[min(i, n - 1)])
                if i == n:
                    return "fail", "killed: more answers than tests"
                said, atol = _compare(kind, entry, inputs[i], frame.value[1], expected[i], atol)
                if said:
                    return "fail", said.format(where=f"{part} test {i}", call=_call(entry, inputs, i))
                i += 1
                if i == n:
                    return "pass", ""
    except Silent:
        return "timeout", f"time-out: {part} test {i}: {_call(entry, inputs, i)} held out against {limits[i]:g} s"
    if n == 0 and box.status["exit"] == 0:
        return "pass", ""
    if box.status["late"]:
        return "timeout", f"time-out: {part} test {i}: killed after {seconds:g} s"
    exit_code = box.status["exit"]
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        what = "memory: killed by SIGKILL, most likely for memory" if name == "SIGKILL" else f"killed: by {name}"
        return "fail", f"{what}, in {part} test {i}"
    return "fail", f"killed: the program ended its own process (exit code {exit_code}) in {part} test {i}"


def _compare(kind: str, entry: str, inp: Any, answer: Any, expected: Any, atol: float) -> tuple[str, float]:
    """Why an encoded answer is not the expected one (a text with {where} and {call}; empty if it is); the tolerance.

    Some answers, numbers of one hash in a set, hold the interpreter in a loop. The alarm's default action, death,
    ends that; the caller of this judge gives the program a failure and starts another judge.
    """
    signal.setitimer(signal.ITIMER_REAL, GIVE_UP)
    try:
        try:
            out = decode(answer)
        except Exception:  # whatever hostile data makes of numpy, Decimal, ...
            return "killed: the answer is not what the sandbox writes, in {where}", atol
        exp = decode(expected)
        same, atol = agrees(kind, entry, inp, out, exp, atol)
        texts = (_show(v).replace("{", "{{").replace("}", "}}") for v in (out, exp))
        return "" if same else "wrong answer: {{where}}: {{call}} gave {}, expected {}".format(*texts), atol
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _exception(name: str, text: str, where: str, limit: float) -> str:
    """The reason for an exception of this type and text."""
    name, text = str(name)[:80], " ".join(str(text).split())[:160]
    if name in ("SyntaxError", "IndentationError", "TabError") and where == "the definition":
        return f"syntax: {name}: {text}"
    if name == "TimeoutException":
        return f"time-out: {where} took more than {limit:g} s"
    if name == "MemoryError":
        return f"memory: in {where}"
    if name in ("Forged", "OutputTooLong"):
        return f"killed: {text}, in {where}"
    return f"exception: {name}: {text}, in {where}"


def _call(entry: str, inputs: list, i: int) -> str:
    """The i-th call as Python text, shortened."""
    try:
        return f"{entry}({', '.join(map(_show, decode(inputs[i])))})"
    except (ValueError, IndexError, TypeError):
        return f"{entry}(...)"


def _show(value: Any) -> str:
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 12
    try:
        return short.repr(value)[:200]
    except Exception:  # an integer too long to print
        return f"<{type(value).__name__}>"


def agrees(kind: str, entry: str, inp: Any, out: Any, exp: Any, atol: float) -> tuple[bool, float]:
    """Whether `out` passes for `exp`, and the tolerance from here on, as in EvalPlus 0.3.1's `unsafe_execute`.

    `inp`: the (encoded) arguments, as they were before the program had them. One departure: EvalPlus does not count
    a test of find_zero (HumanEval/32) that passes, so that no program, its own solution included, ever passes it.
    """
    import numpy as np
    from evalplus.eval import _special_oracle as special
    from evalplus.eval import is_floats

    try:
        exact = out == exp
        if kind == "mbpp":
            if entry == "are_equivalent":
                exact = exact or True
            elif entry == "sum_div":
                exact = exact or out == 0
            elif entry == "surface_Area":
                exact = exact or abs(out - special._surface_Area(*decode(inp))) <= atol
            elif entry == "digit_distance_nums":
                exact = exact or out == special._digit_distance_nums(*decode(inp))
            elif entry in special.MBPP_OUTPUT_SET_EQ_TASKS:
                exact = set(out) == set(exp)
            elif entry in special.MBPP_OUTPUT_NOT_NONE_TASKS:
                exact = out == exp if isinstance(out, bool) else exp == (out is not None)
        elif entry == "find_zero":
            return bool(abs(special._poly(*decode(inp), out)) <= atol), atol
        if atol == 0 and is_floats(exp):
            atol = 1e-6
        if not exact and atol != 0:
            same = type(out) is type(exp) and (not isinstance(exp, (list, tuple)) or len(out) == len(exp))
            return bool(same and np.allclose(out, exp, rtol=1e-07, atol=atol)), atol
        return bool(exact), atol
    except Exception:
        return False, atol


if __name__ == "__main__":
    GIVE_UP = float(sys.argv[2])
    _judge(json.loads(sys.argv[1]))
