"""The warden, in a clean process: finds out which layers hold here, then forks a guardian for each program.

    python -c "from treediff.sandbox import runner; runner.main()" SOCKET LAYERS_TO_LEAVE_OFF SCRATCH   # client.py does

The *warden* is small, has imported what EvalPlus's own children have, and knows no problem data. For each program it
forks a *guardian*, which makes the namespaces (isolation.py), forks the *program*, and waits to kill all of it. The
process of the program enters the cage, runs it on the inputs and sends what it returned (values.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from treediff.sandbox.isolation import LAYERS, PR_SET_DUMPABLE, PR_SUBREAPER, absent, enter, prctl, separate, waited
from treediff.sandbox.values import abridged, drain, frames, pack, receive, send, unpack

MEMORY = 4 << 30
"""Address space of a program [bytes]: EvalPlus's limit, so that honest verdicts are the same."""
PATIENCE = 10
"""Up to so many times its limit a program may take on a busy machine, if it has waited for a core for the rest."""


def warden(control: socket.socket, without: list[str], scratch: str) -> None:
    """Forks one guardian per request until the caller hangs up. Says first which layers this machine has."""
    import evalplus.eval.utils  # noqa: F401  (what EvalPlus's own children have in memory, numpy among it)

    platform.uname()  # reliability_guard asks, and the answer is kept
    prctl(PR_SET_DUMPABLE, 0)
    layers = _probe(without, scratch)
    told = {name: "own user" if how.isdigit() else how for name, how in layers.items()}
    control.sendall(json.dumps(told).encode() + b"\n")
    while True:
        request, fds, _, _ = socket.recv_fds(control, 8, 2)
        if not request:  # the caller has ended, perhaps by a kill
            with contextlib.suppress(ChildProcessError):
                while True:
                    os.wait()
            shutil.rmtree(scratch, ignore_errors=True)
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            try:
                control.close()
                _guardian(*fds, *struct.unpack("d", request), layers, scratch)
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)


def _probe(without: list[str], scratch: str) -> dict[str, str]:
    """Each layer's name with how it holds, or `absent: ` and why: tried one upon another on a real program."""
    layers: dict[str, str] = {}
    root = os.geteuid() == 0
    ways = {
        "processes": ["namespace", "user namespace"],
        "network": ["namespace", "user namespace"],
        "files": ["namespace", "user namespace"],
        "user": [str((1 << 30) + os.getpid()), str(60_000 + os.getpid() % 5000)] if root else ["user namespace"],
        "landlock": ["on"],
        "seccomp": ["on"],
    }
    for name in LAYERS:
        if name in without:
            layers[name] = "absent: switched off"
            continue
        for way in ways[name]:
            if not root and way == "namespace":
                continue
            why = _try({**layers, name: way}, scratch)
            layers[name] = f"absent: {why}" if why else way
            if not why:
                break
    return layers


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
    ours, theirs = socket.socketpair()
    ask, answer = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            ask.close()
            _guardian(theirs.detach(), answer.detach(), 10.0, layers, scratch)
        finally:
            os._exit(0)
    theirs.close()
    answer.close()
    job = {"program": _TRIAL, "entry": "f", "inputs": [[7]], "limits": [5], "as_set": False}
    with ours, ask:
        with contextlib.suppress(OSError):
            send(ours, json.dumps(job).encode())
        sent = list(frames(ours))
        status = json.loads(drain(ask) or b'{"setup": "the guardian died"}')
    os.waitpid(pid, 0)
    if status["setup"] != "ok":
        return status["setup"]
    if sent and sent[0][0] == b"o" and sent[0][1][1] == 7:
        return ""
    return f"a plain program does not run in it ({sent[-1][1] if sent else status})"


def _guardian(data_fd: int, status_fd: int, seconds: float, layers: dict[str, str], scratch: str) -> None:
    """Makes the namespaces, forks the program, kills it in time or at the caller's word, reports how it ended."""
    data, status = socket.socket(fileno=data_fd), socket.socket(fileno=status_fd)
    temporary = tempfile.mkdtemp(prefix="program-", dir=scratch) if absent(layers, "files") else ""
    report: dict[str, Any] = {"setup": "ok", "exit": None, "late": False, "cpu": 0.0, "memory": 0}
    try:
        prctl(PR_SUBREAPER, 1)
        separate(layers)
        if temporary and layers.get("user", "").isdigit():
            os.chown(temporary, int(layers["user"]), -1)
        said, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                status.close()
                os.close(said)
                try:
                    clock = enter(layers, data, say, temporary, seconds)
                except BaseException as e:
                    os.write(say, f"{e}".encode()[:400] or b"failed")
                    os._exit(1)
                os.write(say, b"ok")
                os.close(say)
                _program(data, clock)
            finally:
                os._exit(0)
        data.close()
        os.close(say)
        report["setup"] = os.read(said, 500).decode() or "the program's process died before it began"
        report |= _wait(child, status, seconds)
        if absent(layers, "processes"):  # else the kernel has killed the namespace with its first process
            _sweep(child)
    except OSError as e:
        report["setup"] = str(e)
    finally:
        if temporary:
            _remove(temporary)
    with contextlib.suppress(OSError):
        status.sendall(json.dumps(report).encode())


def _wait(child: int, status: socket.socket, seconds: float) -> dict[str, Any]:
    """Until the program ends, its time is up or the caller hangs up; then it is dead.

    A `?` from the caller is answered with how long the program has waited for a core, which is not its time.
    """
    poll = select.poll()
    poll.register(status, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(child), select.POLLIN)
        tick = seconds
    except OSError:
        tick = 0.01  # an old kernel, or a container that forbids pidfd_open
    try:
        clock = os.open(f"/proc/{child}/schedstat", os.O_RDONLY)
    except OSError:
        clock = -1
    began, late = time.monotonic(), False
    while True:
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        left = seconds + min(waited(clock), (PATIENCE - 1) * seconds) - (time.monotonic() - began)
        late = left <= 0
        events = [] if late else poll.poll(max(1.0, min(tick, left) * 1000))
        called = any(fd == status.fileno() for fd, _ in events)
        if called and status.recv(1) == b"?":
            status.sendall(struct.pack("<cd", b"?", waited(clock)))
        elif late or called:
            os.kill(child, signal.SIGKILL)
            _, code, usage = os.wait4(child, 0)
            break
    exit_code = os.waitstatus_to_exitcode(code)
    return {"exit": exit_code, "late": late, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss << 10}


def _sweep(leader: int) -> None:
    """Kill what the program left: its group, then, as the guardian adopts orphans, child after child."""
    for _ in range(2000):
        with contextlib.suppress(OSError):
            os.killpg(leader, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _parent(p) == os.getpid()]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_bytes().rsplit(b")", 1)[1].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _remove(temporary: str) -> None:
    """The scratch folder, whatever rights the program left on it (rmtree itself follows no link)."""
    for folder, names, _ in os.walk(temporary):
        for name in [folder, *[os.path.join(folder, n) for n in names]]:
            with contextlib.suppress(OSError):
                if not os.path.islink(name):
                    os.chmod(name, 0o700)
    shutil.rmtree(temporary, ignore_errors=True)


# --- the program's side: from here on nothing is trusted once the program has begun ---------------------------------
def _program(sock: socket.socket, clock: int) -> None:
    """Runs the program as EvalPlus's `unsafe_execute` does, and sends each output in place of comparing it."""
    from evalplus.eval.utils import reliability_guard, swallow_io

    job = json.loads(receive(sock))
    inputs = unpack(job["inputs"])
    dumps, now, leave, as_set = json.dumps, time.perf_counter, os._exit, job["as_set"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    reliability_guard(maximum_memory_bytes=min(MEMORY, total))
    for name in [n for n in sys.modules if n.partition(".")[0] == "treediff"]:
        del sys.modules[name]
    scope: dict[str, Any] = {}
    stage = b"d"
    try:
        with swallow_io():
            exec(job["program"], scope)
            fn = scope[job["entry"]]
        stage = b"e"
        for inp, limit in zip(inputs, job["limits"], strict=True):
            with _time_limit(limit, clock) as before:
                start = now()
                with swallow_io():
                    out = fn(*inp)
                seconds = now() - start - (waited(clock) - before)
            try:
                body = abridged(out)
                if as_set and type(body) is dict and "opaque" in body:
                    body = pack(set(out))  # a generator or the like: EvalPlus compares as sets
                body = dumps([seconds, body]).encode()
            except RecursionError:
                body = dumps([seconds, {"opaque": type(out).__name__}]).encode()
            send(sock, body, b"o")
    except BaseException as e:
        send(sock, dumps([type(e).__name__[:80], _text(e)]).encode(), stage)
    leave(0)


@contextlib.contextmanager
def _time_limit(seconds: float, clock: int) -> Iterator[float]:
    """EvalPlus's `time_limit`, but for the time in which the process had no core: a busy machine fails nobody."""
    from evalplus.eval.utils import TimeoutException

    before, granted = waited(clock), 0.0

    def ring(signum: int, frame: Any) -> None:
        nonlocal granted
        owed = waited(clock) - before - granted
        if owed < 0.01 or granted > (PATIENCE - 1) * seconds:
            raise TimeoutException("Timed out!")
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
    """The warden's process: the socket's number, layers to leave off and the scratch folder are its arguments."""
    warden(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3])
