"""Verdicts: what a program returned beside what it should have, in clean processes of their own.

    for name, result in decided(jobs, workers=2, without=[], title="score", before=0): ...

`decided` starts workers as `python -m treediff.scoring.verdicts`, and writes them two lines of JSON a job: the program,
and the task's *oracle* (inputs, expected outputs, reference times). A worker has its sandbox run the program on the
inputs, compares by EvalPlus's rules, oracles and time limits, and writes one line: the verdict for the ledger.
"""

from __future__ import annotations

import contextlib
import json
import numbers
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treediff import progress
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.sandbox.client import FORGED, Broken, Sandbox, Silent
from treediff.sandbox.isolation import processor_time, weakest
from treediff.sandbox.runner import PATIENCE
from treediff.sandbox.values import unpack

MIN_SECONDS, TIME_FACTOR, MOST_SECONDS = 1.0, 4.0, 60.0
"""EvalPlus's time limits: a test gets max(1 s, 4 x the reference's time), a set of tests at most 60 s."""
SLACK = 2.0
"""What a program may take in all beyond its limits before it is killed from outside, as in EvalPlus [s]."""
GRACE = 1.0
"""What one test may take beyond its limit by our own clock: EvalPlus's timer, inside, is in the program's hands [s]."""
GIVE_UP = 10.0
"""Processor time a worker may take to read and compare one answer before it is killed over it [s]."""
START = 600.0
"""Longest that a worker may take to start: it tries out which layers hold [s]."""
ROOM = 2 << 30
"""Address space for what a worker reads and compares [bytes]: an answer unpacks to many times its size."""


def main(without: list[str]) -> None:
    """Two lines of JSON a job, in (program; oracle) and one out, until stdin ends."""
    import ctypes

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # die with the caller
    libc.prctl(4, 0, 0, 0, 0)  # no process of the same user may look into this one, which knows what is expected
    warnings.simplefilter("ignore")  # numpy's, over what it is asked to compare

    def say(result: dict[str, Any]) -> None:
        answers.write(json.dumps(result).encode() + b"\n")
        answers.flush()

    try:
        box = Sandbox(without)
    except Broken as e:
        say({"broken": str(e)})
        return
    with box:
        say(box.layers)
        for line in sys.stdin.buffer:
            header, oracle = json.loads(line), json.loads(sys.stdin.buffer.readline())
            _bound()
            try:
                say(_record(box, header, oracle) if header.get("record") else _verdict(box, header, oracle))
            except Broken as e:
                say({"broken": str(e)})


def _bound() -> None:
    """`ROOM` beyond the address space of this process now; softly, as its programs have limits of their own."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = pages * os.sysconf("SC_PAGE_SIZE") + ROOM, resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard < 0 else min(soft, hard), hard))


def _record(box: Sandbox, header: dict[str, Any], oracle: dict[str, Any]) -> dict[str, Any]:
    """What the benchmark's own solution returns, still packed, and how long each test and its sending takes."""
    parts: dict[str, Any] = {}
    for part in benchmarks.PARTS:
        inputs = oracle[part]["inputs"]
        run = box.run(header["program"], oracle["entry"], inputs, [600.0] * len(inputs), seconds=1200.0)
        expected: list[Any] = []
        times: list[float] = []
        extras: list[float] = []
        last = time.perf_counter()
        for frame in run:
            now = time.perf_counter()
            if frame.kind == b"r":
                last = now
                continue
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


def _verdict(box: Sandbox, header: dict[str, Any], oracle: dict[str, Any]) -> dict[str, Any]:
    """Both parts of one task, as in the ledger; the reason is that of the first part that fails."""
    start = time.perf_counter()
    parts = [part for part in benchmarks.PARTS if part in oracle]  # a check of the benchmark's own is one part
    found = {part: _examine(box, header["program"], oracle, part) for part in parts}
    reasons = [reason for _, reason in found.values() if reason]
    return {
        **{part: status for part, (status, _) in found.items()},
        "reason": reasons[0].encode("utf-8", "backslashreplace").decode() if reasons else "",
        "seconds": round(time.perf_counter() - start, 3),
    }


def _examine(box: Sandbox, program: str, oracle: dict[str, Any], part: str) -> tuple[str, str]:
    """(pass, fail or timeout; reason) of one part's tests, as EvalPlus's `untrusted_check` has them.

    As there, a test that overruns its own limit fails; `timeout` is a program that had to be killed.
    """
    from evalplus.eval._special_oracle import MBPP_OUTPUT_SET_EQ_TASKS

    tests, entry, kind = oracle[part], oracle["entry"], oracle["kind"]
    inputs, expected, n = tests["inputs"], tests["expected"], len(tests["inputs"])
    limits = [max(MIN_SECONDS, TIME_FACTOR * t) for t in tests["times"]]
    # What it takes to send an output is not the program's time; bulky outputs take seconds.
    extras = [TIME_FACTOR * t for t in tests["extras"]]
    waits = [limit + extra + GRACE for limit, extra in zip(limits, extras, strict=True)]
    seconds = min(MOST_SECONDS, sum(limits)) + SLACK + min(MOST_SECONDS, sum(extras))
    as_set = kind == "mbpp" and entry in MBPP_OUTPUT_SET_EQ_TASKS
    atol, i = oracle["atol"], 0
    run = box.run(program, entry, inputs, limits, seconds=seconds, as_set=as_set, waits=waits)
    defined = False
    try:
        with contextlib.closing(run):
            for frame in run:
                if frame.kind not in (b"e", b"d") and (frame.kind == b"o") is not defined:
                    frame = FORGED  # out of turn
                if frame.kind in (b"e", b"d"):
                    where = f"{part} test {i}: {_call(entry, inputs, i)}" if frame.kind == b"e" else "the definition"
                    name, text = frame.value
                    return "fail", _exception(name, text, where, limits[i] if i < n else seconds)
                if defined:
                    said, atol = _compare(kind, entry, inputs[i], frame.value[1], expected[i], atol)
                    if said:
                        return "fail", said.format(where=f"{part} test {i}", call=_call(entry, inputs, i))
                    i += 1
                defined = True
                if i == n:
                    return "pass", ""
    except Silent:
        if not defined:
            return "timeout", f"time-out: the definition took more than {seconds:g} s"
        return "timeout", f"time-out: {part} test {i}: {_call(entry, inputs, i)} held out against {limits[i]:g} s"
    exit_code, where = box.status["exit"], f"{part} test {i}" if defined else "the definition"
    if box.status["late"]:
        return "timeout", f"time-out: {where}: killed after {seconds:g} s"
    if exit_code is None:
        return "fail", f"killed: with the process that watched over it, in {where}"
    if exit_code == -signal.SIGKILL and box.status["cpu"] > processor_time(seconds) - 1:
        return (
            "timeout",
            f"time-out: {where}: killed after {box.status['cpu']:.0f} s of processor time in all its threads",
        )
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        what = "memory: killed by SIGKILL, most likely for memory" if name == "SIGKILL" else f"killed: by {name}"
        return "fail", f"{what}, in {where}"
    return "fail", f"killed: the program ended its own process (exit code {exit_code}) in {where}"


def _compare(kind: str, entry: str, inp: Any, answer: Any, expected: Any, atol: float) -> tuple[str, float]:
    """Why a packed answer is not the expected one (a text with {where} and {call}; empty if it is); the tolerance.

    Some answers, numbers of one hash in a set, hold the interpreter in a loop. The alarm's default action, death,
    ends that; `decided` gives the program a failure and starts another worker.
    """
    signal.setitimer(signal.ITIMER_PROF, GIVE_UP)
    try:
        try:
            out = unpack(answer)
        except MemoryError:
            return "killed: the answer takes more memory than there is to compare it, in {where}", atol
        except Exception:  # whatever hostile data makes of numpy, Decimal, ...
            return "killed: the answer is not what the sandbox writes, in {where}", atol
        exp = unpack(expected)
        same, atol = agrees(kind, entry, inp, out, exp, atol)
        texts = (_show(v).replace("{", "{{").replace("}", "}}") for v in (out, exp))
        return "" if same else "wrong answer: {{where}}: {{call}} gave {}, expected {}".format(*texts), atol
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


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


def _call(entry: str, inputs: list[Any], i: int) -> str:
    """The i-th call as Python text, shortened."""
    try:
        return f"{entry}({', '.join(map(_show, unpack(inputs[i])))})"
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

    `inp`: the (packed) arguments, as they were before the program had them. Two departures: EvalPlus does not count
    a test of find_zero (HumanEval/32) that passes, so that no program, its own solution included, ever passes it; and
    numpy spreads arrays to the shape of others before it compares, so that nothing agrees with everything.
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
                exact = exact or abs(out - special._surface_Area(*unpack(inp))) <= atol
            elif entry == "digit_distance_nums":
                exact = exact or out == special._digit_distance_nums(*unpack(inp))
            elif entry in special.MBPP_OUTPUT_SET_EQ_TASKS:
                wanted = set(exp)
                exact = not (type(out) is range and len(out) != len(wanted)) and set(out) == wanted
            elif entry in special.MBPP_OUTPUT_NOT_NONE_TASKS:
                exact = out == exp if isinstance(out, bool) else exp == (out is not None)
        elif entry == "find_zero":
            return bool(abs(special._poly(*unpack(inp), out)) <= atol), atol
        if atol == 0 and is_floats(exp):
            atol = 1e-6
        if not exact and atol != 0:
            return bool(
                type(out) is type(exp) and _alike(out, exp) and np.allclose(out, exp, rtol=1e-07, atol=atol)
            ), atol
        return bool(exact), atol
    except Exception:  # numpy or an oracle choking on what a program returned: a wrong answer, as in EvalPlus
        return False, atol


def _alike(out: Any, exp: Any) -> bool:
    """Whether number stands against number and length against length at every depth."""
    import numpy as np

    if isinstance(out, np.ndarray) or isinstance(exp, np.ndarray):
        return bool(np.shape(out) == np.shape(exp))
    if isinstance(exp, (list, tuple)):
        return isinstance(out, (list, tuple)) and len(out) == len(exp) and all(map(_alike, out, exp))
    return isinstance(out, (numbers.Number, np.bool_))


# --- the caller's end ------------------------------------------------------------------------------------------------

Job = tuple[str, dict[str, Any], bytes]


def decided(
    jobs: list[Job], workers: int, without: list[str], title: str, before: int
) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Results as workers finish them; under the name None, the sandbox's layers, which hold in all of them so far."""
    if not jobs:
        return
    todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[str | None, Any]] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    stop = threading.Event()
    started: list[_Worker] = []
    threads = [
        threading.Thread(target=_serve, args=(todo, done, stop, started, without), daemon=True)
        for _ in range(min(workers, len(jobs)))
    ]
    for thread in threads:
        thread.start()
    left = len(jobs)
    layers: dict[str, Any] = {}
    try:
        with progress.bar(total=before + left, initial=before, desc=title, unit=" tasks", mininterval=1) as bar:
            while left:
                task, result = done.get()
                if isinstance(result, BaseException):
                    raise result
                if task is None:
                    layers = weakest(layers, result)
                    yield None, layers
                    continue
                left -= 1
                bar.update()
                yield task, result
    finally:
        stop.set()
        if left:  # interrupted: do not wait for the programs that run
            for one in started:
                one.process.kill()
        for thread in threads:
            thread.join()


def _serve(
    todo: queue.SimpleQueue[Job],
    done: queue.SimpleQueue[tuple[str | None, Any]],
    stop: threading.Event,
    started: list[_Worker],
    without: list[str],
) -> None:
    """One worker, and another when it dies, until there is nothing left to do."""
    worker: _Worker | None = None
    try:
        while not stop.is_set():
            try:
                task, header, oracle = todo.get_nowait()
            except queue.Empty:
                return
            for _ in range(2):
                if worker is None:
                    worker = _Worker(without, started)
                    if stop.is_set():
                        return
                    done.put((None, worker.layers))
                result = worker.ask(header, oracle)
                if result is None and stop.is_set():
                    return
                if result is None:  # it hung or died: over this answer, unless another worker does not
                    worker.close()
                    worker = None
                elif "broken" not in result:
                    break
            if result is None:
                why = "killed: the answer could not be compared"
                result = {"base": "fail", "plus": "fail", "reason": why, "seconds": 0.0}
                result = {"error": why} if header.get("record") else result
            if "broken" in result:
                raise UserError(
                    f"sandbox: a program's process cannot be set up ({result['broken']}); mend that, and score again."
                )
            done.put((task, result))
    except BaseException as e:
        done.put((None, e))
    finally:
        if worker:
            worker.close()


class _Worker:
    """The caller's end of a process that runs and compares."""

    def __init__(self, without: list[str], started: list[_Worker]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        keep = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "TMPDIR", "LANG")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "treediff.scoring.verdicts", json.dumps(without), str(GIVE_UP)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**keep, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        if self.process.stdin is None or self.process.stdout is None:
            raise AssertionError("both are pipes")
        self.questions, self.answers = self.process.stdin, self.process.stdout
        started.append(self)
        self.layers = self._within(START, b"")
        if not self.layers or "broken" in self.layers:
            self.close()
            why = (self.layers or {}).get("broken", "its message, if any, is above")
            raise UserError(
                f"sandbox: no program can be run on this machine ({why}); docs/sandbox.md says what it needs."
            )

    def ask(self, header: dict[str, Any], oracle: bytes) -> dict[str, Any] | None:
        """The worker's result, or None if it died or hung."""
        seconds = 7200.0 if header.get("record") else 4 * PATIENCE * MOST_SECONDS
        return self._within(seconds, json.dumps(header).encode() + b"\n" + oracle + b"\n")

    def _within(self, seconds: float, question: bytes) -> dict[str, Any] | None:
        """Its next line after this question; None if it has none by then, or has ended."""
        watch = threading.Timer(seconds, self.process.kill)
        watch.daemon = True
        watch.start()
        try:
            self.questions.write(question)
            self.questions.flush()
            found: dict[str, Any] = json.loads(self.answers.readline())
            return found
        except (OSError, ValueError):
            return None
        finally:
            watch.cancel()

    def close(self) -> None:
        """End the worker; its sandbox ends with it."""
        with contextlib.suppress(OSError):
            self.questions.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()


if __name__ == "__main__":
    GIVE_UP = float(sys.argv[2])
    main(json.loads(sys.argv[1]))
