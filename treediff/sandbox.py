"""Runs a generated program on inputs, in a cage, and hands back what it returned as plain data. Never a verdict.

    with Sandbox() as box:
        box.layers                                # which layers hold on this machine, and why the others do not
        for frame in box.run("def f(x): return x + 1", "f", [[1], [2]], [1, 1], seconds=4): ...

Three processes stand between the caller and the program. The *warden* is a small clean process that has imported
what EvalPlus's own children have, and no problem data. For each program it forks a *guardian*, which makes the
namespaces (cage.py), forks the *program*, and waits to kill all of it. The caller and the program share one socket,
over which the program's side can only send JSON (plain.py); nothing it sends is executed, and it is told neither the
expected outputs nor what became of the last one. docs/sandbox.md: layers and attacks.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from treediff.cage import (
    LAYERS,
    NAMESPACES,
    PR_SET_DUMPABLE,
    PR_SUBREAPER,
    absent,
    enter,
    prctl,
    readable,
    separate,
    waited,
)
from treediff.plain import FRAME, abridged, decode, encode

MEMORY = 4 << 30
"""Address space of a program [bytes]: EvalPlus's limit, so that honest verdicts are the same."""
PATIENCE = 10
"""Up to so many times its limit a program may take on a busy machine, if it has waited for a core for the rest."""
PACKAGE = os.path.dirname(os.path.abspath(__file__))


# --- the warden's side ----------------------------------------------------------------------------------------------


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
            _send(ours, json.dumps(job).encode())
        frames = list(_frames(ours))
        status = json.loads(_drain(ask) or b'{"setup": "the guardian died"}')
    os.waitpid(pid, 0)
    if status["setup"] != "ok":
        return status["setup"]
    if frames and frames[0][0] == b"o" and frames[0][1][1] == 7:
        return ""
    return f"a plain program does not run in it ({frames[-1][1] if frames else status})"


def _guardian(data_fd: int, status_fd: int, seconds: float, layers: dict[str, str], scratch: str) -> None:
    """Makes the namespaces, forks the program, kills it in time or at the caller's word, reports how it ended."""
    data, status = socket.socket(fileno=data_fd), socket.socket(fileno=status_fd)
    spot = tempfile.mkdtemp(prefix="program-", dir=scratch) if absent(layers, "files") else ""
    report: dict[str, Any] = {"setup": "ok", "exit": None, "late": False, "cpu": 0.0, "memory": 0}
    try:
        prctl(PR_SUBREAPER, 1)
        separate(layers)
        if spot and layers.get("user", "").isdigit():
            os.chown(spot, int(layers["user"]), -1)
        said, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                status.close()
                os.close(said)
                try:
                    clock = enter(layers, data, say, spot, seconds)
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
        if spot:
            _remove(spot)
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


def _remove(spot: str) -> None:
    """The scratch folder, whatever rights the program left on it (rmtree itself follows no link)."""
    for folder, names, _ in os.walk(spot):
        for name in [folder, *[os.path.join(folder, n) for n in names]]:
            with contextlib.suppress(OSError):
                if not os.path.islink(name):
                    os.chmod(name, 0o700)
    shutil.rmtree(spot, ignore_errors=True)


# --- the program's side: from here on nothing is trusted once the program has begun ---------------------------------


def _program(sock: socket.socket, clock: int) -> None:
    """Runs the program as EvalPlus's `unsafe_execute` does, and sends each output in place of comparing it."""
    from evalplus.eval.utils import reliability_guard, swallow_io

    job = json.loads(_receive(sock))
    inputs = decode(job["inputs"])
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
                    body = encode(set(out))  # a generator or the like: EvalPlus compares as sets
                body = dumps([seconds, body]).encode()
            except RecursionError:
                body = dumps([seconds, {"opaque": type(out).__name__}]).encode()
            _send(sock, body, b"o")
    except BaseException as e:
        _send(sock, dumps([type(e).__name__[:80], _text(e)]).encode(), stage)
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


def _send(sock: socket.socket, body: bytes, kind: bytes = b"j") -> None:
    sock.sendall(kind + struct.pack("I", len(body)) + body)


def _receive(sock: socket.socket) -> bytes:
    """One frame's body, however long: the caller is trusted."""
    header = _exactly(sock, 5)
    return _exactly(sock, struct.unpack("I", header[1:])[0])


def _exactly(sock: socket.socket, n: int) -> bytes:
    parts = bytearray()
    while len(parts) < n:
        part = sock.recv(min(1 << 20, n - len(parts)))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)


# --- the caller's side ----------------------------------------------------------------------------------------------


class Frame(NamedTuple):
    """What the program's side sent: `o` the output of the next test (seconds, value); `e` an exception in it or `d`
    in defining the program (type, text)."""

    kind: bytes
    value: Any


class Silent(Exception):
    """The program sent nothing for longer than it may."""


class Broken(Exception):
    """The cage could not be set up: the machine's fault, not the program's."""


def _frames(
    sock: socket.socket, waits: Iterator[float] | None = None, ask: socket.socket | None = None
) -> Iterator[Frame]:
    """Frames until the program's side hangs up or sends what is no frame.

    `waits`: longest wait for each [s], not counting what `ask`, the guardian, says that the program waited for a core.
    """
    buffer, forgiven = bytearray(), 0.0
    while True:
        deadline = time.monotonic() + next(waits, 5.0) if waits else None
        while len(buffer) < 5 or len(buffer) < 5 + struct.unpack_from("I", buffer, 1)[0]:
            if len(buffer) >= 5 and struct.unpack_from("I", buffer, 1)[0] > FRAME:
                yield Frame(b"e", ["OutputTooLong", f"an output of more than {FRAME >> 20} MiB"])
                return
            if deadline is not None:
                sock.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                part = sock.recv(1 << 18)
            except TimeoutError:
                owed = _ask(ask) - forgiven
                if owed < 0.01:
                    raise Silent from None
                forgiven += owed
                deadline = time.monotonic() + owed
                continue
            except OSError:
                part = b""
            if not part:
                return
            buffer += part
        end = 5 + struct.unpack_from("I", buffer, 1)[0]
        kind, body = bytes(buffer[:1]), bytes(buffer[5:end])
        del buffer[:end]
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            value = None
        if kind not in (b"o", b"e", b"d") or type(value) is not list or len(value) != 2:
            yield Frame(b"e", ["Forged", "the answer is not what the sandbox writes"])
            return
        yield Frame(kind, value)


def _ask(guardian: socket.socket) -> float:
    """How long the program has waited for a core so far [s]; for ever, if it has ended and its last words are near."""
    with contextlib.suppress(OSError):
        guardian.sendall(b"?")
    guardian.settimeout(60)
    if guardian.recv(1, socket.MSG_PEEK) != b"?":
        return 1e9
    return struct.unpack("<cd", _exactly(guardian, 9))[1]


def _drain(sock: socket.socket) -> bytes:
    parts = b""
    with contextlib.suppress(OSError):
        while part := sock.recv(1 << 16):
            parts += part
    return parts


class Sandbox:
    """A warden and its layers; one program runs at a time.

    `without`: LAYERS to leave off, `namespaces` for our own making of the first four, `bubblewrap` for it.
    """

    def __init__(self, without: list[str] | tuple[str, ...] = (), scratch: str | None = None) -> None:
        self.status: dict[str, Any] = {}
        self._without = [n for name in without for n in (NAMESPACES if name == "namespaces" else (name,))]
        self._scratch = tempfile.mkdtemp(prefix="treediff-", dir=scratch)
        os.chmod(self._scratch, 0o711)
        self._start([])
        bwrap = shutil.which("bwrap")
        if bwrap and absent(self.layers, "files") and not {"files", "bubblewrap"} & set(without):
            # Some systems let bubblewrap make the namespaces that they refuse to others.
            alone = self.layers
            self._stop()
            try:
                self._start(_bubblewrap(bwrap))
                held = "bubblewrap, one for all programs of a worker"
                self.layers |= {name: held for name in NAMESPACES if absent(self.layers, name)}
            except Broken as e:
                self._start([])
                self.layers = {k: f"{v}; bubblewrap: {e}" if absent(alone, k) else v for k, v in alone.items()}

    def _start(self, wrap: list[str]) -> None:
        ours, theirs = socket.socketpair()
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        scratch = "/tmp" if wrap else self._scratch
        find = f"import sys; sys.path.insert(0, {os.path.dirname(PACKAGE)!r})"
        start = f"{find}; from treediff import sandbox; del sys.path[0]; sandbox.main()"
        python = [sys.executable, "-s", "-P", "-B", "-c", start]
        self._process = subprocess.Popen(
            [*wrap, *python, str(theirs.fileno()), json.dumps(self._without), scratch],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control = ours
        hello = ours.makefile("rb").readline()
        if not hello:
            error = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self._stop()
            raise Broken(error[-1] if error else "the warden did not start")
        self.layers: dict[str, str] = json.loads(hello)

    def _stop(self) -> None:
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()

    def run(
        self,
        program: str,
        entry: str,
        inputs: Any,
        limits: list[float],
        *,
        seconds: float,
        as_set: bool = False,
        waits: list[float] | None = None,
    ) -> Iterator[Frame]:
        """What `program`'s `entry` returns for each of the (encoded) `inputs`, frame by frame.

        `limits`: seconds for each call, by EvalPlus's timer inside; `waits`: for each answer, by our own clock
        (raises Silent); `seconds`: for all. Closing the iterator kills the program. Then `status` says how the
        process ended: exit (negative: a signal), late, cpu [s], memory [bytes].
        """
        ours, theirs = socket.socketpair()
        ask, answer = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs, answer:
            socket.send_fds(self._control, [struct.pack("d", seconds)], [theirs.fileno(), answer.fileno()])
        job = {"program": program, "entry": entry, "inputs": inputs, "limits": limits, "as_set": as_set}
        try:
            with contextlib.suppress(OSError):
                ours.settimeout(30)
                _send(ours, json.dumps(job).encode())
                ours.settimeout(None)
            # The first wait holds the program's own start, which EvalPlus does not limit either.
            yield from _frames(ours, iter([seconds + 5, *waits[1:]]) if waits else None, ask)
        finally:
            # Done or not: the guardian kills the program's process and all it made, then reports.
            with contextlib.suppress(OSError):
                ask.shutdown(socket.SHUT_WR)
            ask.settimeout(60)
            text = _drain(ask)
            ours.close()
            ask.close()
            self.status = json.loads(text) if text else {"setup": "the guardian died"}
        if self.status["setup"] != "ok":
            raise Broken(self.status["setup"])

    def close(self) -> None:
        """End the warden and remove its scratch folder."""
        self._stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _bubblewrap(bwrap: str) -> list[str]:
    """The command that starts a warden under bubblewrap: `readable` and this package read-only, /tmp in memory."""
    command = [bwrap, "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    paths = readable()
    for path in (sys.executable, PACKAGE):
        if not any(path.startswith(p + "/") for p in paths):
            paths.append(path)
    for path in paths:
        command += ["--ro-bind", path, path]
    return [*command, "--chdir", "/", "--"]


def main() -> None:
    """The warden's process: the socket's number, layers to leave off and the scratch folder are its arguments."""
    warden(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3])
