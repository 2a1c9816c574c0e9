"""The runner, in a clean process: finds out which layers hold here, then runs one program after another.

    python -c "from treediff.sandbox import runner; runner.main()" SOCKET LAYERS_TO_LEAVE_OFF SCRATCH   # client.py does

The *runner* is small, has numpy in memory as EvalPlus's own children have, and knows no problem data. For each program
it forks a *supervisor*, which makes the namespaces (isolation.py), forks the *program*, and waits to kill it. The
program's process isolates itself, defines the program, and answers each input with what it returned (values.py). When
the supervisor has ended, the runner kills and removes whatever is left.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from treediff.sandbox.isolation import (
    LAYERS,
    PACKAGES,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    PR_SUBREAPER,
    absent,
    enter,
    limit,
    prctl,
    readable,
    separate,
    waited,
)
from treediff.sandbox.values import abridged, pack, receive, send, unpack

MEMORY = 4 << 30
"""Address space of a program [bytes]: EvalPlus's limit, so that honest verdicts are the same."""
PATIENCE = 10
"""Up to so many times its limit a program may take on a busy machine, if it has waited for a core for the rest."""
LOADED = ("multiprocessing", "dateutil", "pandas", "rich", "tqdm")
"""What EvalPlus's own process has imported before its guard, under which these can no longer be imported."""
REQUEST = "d?"
"""What a caller asks the runner for: seconds in all, whether there is need of packages beside numpy."""
SETUP = 30.0
"""Longest that the isolation of one program may take [s]."""


def serve(control: socket.socket, without: list[str], scratch: str) -> None:
    """Runs one program per request until the caller hangs up. Says first which layers this machine has."""
    import numpy  # noqa: F401

    os.umask(0o022)  # the caller's may be such that nobody could enter what is made here
    evalplus_guard()
    others()
    platform.uname()  # reliability_guard asks, and the answer is kept
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SUBREAPER, 1)
    layers = _probe(without, scratch)
    told = {name: "own user" if how.isdigit() else how for name, how in layers.items()}
    control.sendall(json.dumps(told).encode() + b"\n")
    while True:
        request, fds, _, _ = socket.recv_fds(control, 16, 3)
        if not request:  # the caller has ended, perhaps by a kill
            remove(scratch)
            return
        _run(fds, *struct.unpack(REQUEST, request), layers, scratch)


@functools.cache
def evalplus_guard() -> ModuleType:
    """EvalPlus's `eval/utils.py` alone: the package around it brings oracles, which are solutions, into memory."""
    [folder] = importlib.util.find_spec("evalplus").submodule_search_locations
    spec = importlib.util.spec_from_file_location("guard", os.path.join(folder, "eval", "utils.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def others() -> set[str]:
    """Names of installed modules that a program may not import."""
    sites = {os.path.dirname(path) for path in readable()[2]}
    names = {name.partition(".")[0] for site in sites for name in os.listdir(site)} | {"treediff"}
    return names - PACKAGES - sys.stdlib_module_names


def _probe(without: list[str], scratch: str) -> dict[str, str]:
    """Each layer's name with how it holds, or `absent: ` and why: all at once on a real program, else one by one.

    Raises OSError where no program runs at all, which is no reason to do without layers.
    """
    root = os.geteuid() == 0
    ways = {name: ["namespace", "user namespace"] if root else ["user namespace"] for name in LAYERS[:3]}
    users = [str((1 << 30) + os.getpid()), str(60_000 + os.getpid() % 5000)] if root else ["user namespace"]
    ways |= {"user": users, "landlock": ["on"], "seccomp": ["on"]}
    off = {name: "absent: switched off" for name in LAYERS if name in without}
    layers = {name: ways[name][0] for name in LAYERS} | off
    if not _try(layers, scratch):
        return layers
    if why := _try({}, scratch):
        raise OSError(f"even without isolation {why}")
    layers = {}
    for name in LAYERS:
        for way in [] if name in off else ways[name]:
            why = _try({**layers, name: way}, scratch)
            layers[name] = f"absent: {why}" if why else way
            if not why:
                break
    return {name: (layers | off)[name] for name in LAYERS}


_TRIAL = """
import _decimal, colorsys, numpy, os, statistics, threading
def f(x):
    t = threading.Thread(target=lambda: None); t.start(); t.join()
    numpy.zeros(9).sum()
    os.close(os.open("a", os.O_CREAT | os.O_WRONLY))
    return x
"""


def _try(layers: dict[str, str], scratch: str) -> str:
    """Why a small honest program does not run in these layers; empty if it does."""
    inp, to = os.pipe()
    back, out = os.pipe()
    ours, theirs = socket.socketpair()
    job = {"program": _TRIAL, "entry": "f", "as_set": False}
    for message in (job, [[5.0, [7]]]):  # little enough to wait in the pipe
        send(to, json.dumps(message).encode())
    os.close(to)
    with ours, open(back, "rb") as answered:
        _run([inp, out, theirs.detach()], 10.0, True, layers, scratch)
        answers = []
        with contextlib.suppress(EOFError):
            while True:
                answers.append(json.loads(receive(answered)))
        report = b""
        while part := ours.recv(1 << 16):
            report += part
    status = json.loads(report.lstrip(b"!") or b'{"setup": "its supervisor died"}')
    if status["setup"] != "ok":
        return status["setup"]
    return "" if answers[1:2] and answers[1][1] == 7 else f"a plain program does not run ({answers or status})"


def _run(fds: list[int], seconds: float, packages: bool, layers: dict[str, str], scratch: str) -> None:
    """One program from beginning to end. `fds`: where it reads from, where it writes to, the supervisor's socket."""
    folder = tempfile.mkdtemp(prefix="program-", dir=scratch) if absent(layers, "files") else ""
    if folder and layers.get("user", "").isdigit():
        os.chown(folder, int(layers["user"]), -1)
    pid = os.fork()
    if pid == 0:
        try:
            _supervise(*fds, seconds, packages, layers, folder)
        finally:
            os._exit(0)
    for fd in fds:
        os.close(fd)
    os.waitpid(pid, 0)
    _sweep()
    if folder:
        remove(folder)


def _sweep() -> None:
    """Kill what a program left: the runner adopts orphans, child after child."""
    for _ in range(5000):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and parent(process) == os.getpid():
                with contextlib.suppress(OSError):
                    os.kill(int(process.name), signal.SIGKILL)


def parent(process: Path) -> int:
    """The parent's id of a process by its folder in /proc; 0 if it has ended."""
    try:
        return int((process / "stat").read_bytes().rsplit(b")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def remove(folder: str) -> None:
    """A folder and all that a program left in it: folders in folders are moved up first, so that no path is long."""
    todo, moved = [folder], 0
    while todo:
        here = todo.pop()
        with contextlib.suppress(OSError):
            os.chmod(here, 0o700)
            for name in os.listdir(here):
                path = os.path.join(here, name)
                with contextlib.suppress(OSError):
                    if os.path.isdir(path) and not os.path.islink(path):
                        moved += 1
                        os.chmod(path, 0o700)
                        os.rename(path, f"{folder}.{moved}")
                        todo.append(f"{folder}.{moved}")
                    else:
                        os.unlink(path)
            os.rmdir(here)


def _supervise(
    inp: int, out: int, status_fd: int, seconds: float, packages: bool, layers: dict[str, str], folder: str
) -> None:
    """Makes the namespaces, forks the program, kills it in time or at the caller's word, reports how it ended."""
    status = socket.socket(fileno=status_fd)
    report: dict[str, Any] = {"setup": "ok", "exit": None, "late": False, "cpu": 0.0, "memory": 0}
    try:
        runner = os.getppid()
        separate(layers)
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != runner:
            return
        said, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                try:
                    clock = enter(layers, [inp, out, say], folder, seconds, packages)
                except BaseException as e:
                    os.write(say, f"{e}".encode()[:400] or b"failed")
                    os._exit(1)
                os.write(say, b"ok")
                os.close(say)
                _program(inp, out, clock)
            finally:
                os._exit(0)
        for fd in (inp, out, say):
            os.close(fd)
        clocks = [os.open(f"/proc/{child}/{name}", os.O_RDONLY) for name in ("schedstat", "stat") if _file(child, name)]
        late = not select.select([said], [], [], SETUP)[0]
        report["setup"] = "it took too long" if late else os.read(said, 500).decode() or "its process died at once"
        if report["setup"] == "ok":
            with contextlib.suppress(OSError):
                socket.send_fds(status, [b"!"], clocks)
        report |= _wait(child, status, clocks, seconds if report["setup"] == "ok" else 0.0)
    except OSError as e:
        report["setup"] = str(e)
    with contextlib.suppress(OSError):
        status.sendall(json.dumps(report).encode())


def _file(pid: int, name: str) -> bool:
    return os.access(f"/proc/{pid}/{name}", os.R_OK)


def _wait(child: int, status: socket.socket, clocks: list[int], seconds: float) -> dict[str, Any]:
    """Until the program ends, its time is up or the caller hangs up; then it is dead."""
    poll = select.poll()
    poll.register(status, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(child), select.POLLIN)
        tick = seconds
    except OSError:
        tick = 0.01  # an old kernel, or a container that forbids pidfd_open
    began, late = time.monotonic(), False
    while True:
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        left = seconds + min(waited(*clocks), (PATIENCE - 1) * seconds) - (time.monotonic() - began)
        late = left <= 0
        events = [] if late else poll.poll(max(1.0, min(tick, left) * 1000))
        if late or any(fd == status.fileno() for fd, _ in events):
            os.kill(child, signal.SIGKILL)
            _, code, usage = os.wait4(child, 0)
            break
    exit_code = os.waitstatus_to_exitcode(code)
    return {"exit": exit_code, "late": late, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss << 10}


# --- the program's side: from here on nothing is trusted once the program has begun ---------------------------------


def _program(inp: int, out: int, clock: int) -> None:
    """Runs the program as EvalPlus's `unsafe_execute` does, and sends each output in place of comparing it."""
    dumps, loads, now, leave, stage = json.dumps, json.loads, time.perf_counter, os._exit, b"d"
    try:
        asked = open(inp, "rb")  # noqa: SIM115
        guard, job = evalplus_guard(), loads(receive(asked))
        tempfile.tempdir = os.getcwd()
        for name in [n for n in sys.modules if n.partition(".")[0] == "treediff"]:
            del sys.modules[name]
        sys.modules.update(dict.fromkeys(others()))  # as if they were not installed, though landlock shows their names
        for name in LOADED:
            if name in job["program"]:
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        memory = min(MEMORY, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        for name in ("AS", "DATA", "STACK"):
            limit(name, memory)
        guard.reliability_guard(None)  # which would raise limits, and fail where a hard one is lower
        scope: dict[str, Any] = {}
        with guard.swallow_io():
            exec(job["program"], scope)
            fn = scope[job["entry"]]
        stage = b"e"
        send(out, b"[0, 0]", b"r")
        for seconds, arguments in _tests(asked):
            with _time_limit(seconds, clock) as before:
                start = now()
                with guard.swallow_io():
                    result = fn(*arguments)
                used = now() - start - (waited(clock) - before)
            try:
                body = abridged(result)
                if job["as_set"] and type(body) is dict and "opaque" in body:
                    body = pack(set(result))  # a generator or the like: EvalPlus compares as sets
                body = dumps([used, body]).encode()
            except RecursionError:
                body = dumps([used, {"opaque": type(result).__name__}]).encode()
            send(out, body, b"o")
    except BaseException as e:
        send(out, dumps([type(e).__name__[:80], _text(e)]).encode(), stage)
    leave(0)


def _tests(asked: BinaryIO, loads: Any = json.loads) -> Iterator[tuple[float, list]]:
    """Seconds and arguments of each test, until there are no more."""
    with contextlib.suppress(EOFError):
        while True:
            for seconds, arguments in loads(receive(asked)):
                yield seconds, unpack(arguments)


@contextlib.contextmanager
def _time_limit(seconds: float, clock: int) -> Iterator[float]:
    """EvalPlus's `time_limit`, but for the time in which the process had no core: a busy machine fails nobody."""
    expired = evalplus_guard().TimeoutException
    before, granted = waited(clock), 0.0

    def ring(signum: int, frame: Any) -> None:
        nonlocal granted
        owed = waited(clock) - before - granted
        if owed < 0.01 or granted > (PATIENCE - 1) * seconds:
            raise expired("Timed out!")
        granted += owed
        signal.setitimer(signal.ITIMER_REAL, owed)

    signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.signal(signal.SIGALRM, ring)
    try:
        yield before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _text(e: BaseException) -> str:
    try:
        return str(e)[:300]
    except BaseException:  # a hostile exception whose own text raises
        return ""


def main() -> None:
    """The runner's process: the socket's number, layers to leave off and the scratch folder are its arguments."""
    serve(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3])
