"""Runs a generated program on inputs, isolated, and hands back what it returned as plain data. Never a verdict.

    with Sandbox() as box:
        box.layers                                # which layers hold on this machine, and why the others do not
        for frame in box.run("def f(x): return x + 1", "f", [[1], [2]], [1, 1], seconds=4): ...

Three processes stand between the caller and the program: runner and supervisor (runner.py), and the program's own,
isolated (isolation.py). The caller and the program share two pipes, over which the program's side can only send JSON
(values.py); nothing it sends is executed. It gets its inputs once it is defined, a few at a time, and is told neither
the expected outputs nor what became of its answers. docs/sandbox.md: layers and attacks.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import importlib.util
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from typing import Any, NamedTuple

from treediff.sandbox.isolation import NAMESPACES, PACKAGES, SCRATCH, absent, readable, waited
from treediff.sandbox.runner import PATIENCE, REQUEST, SETUP, remove

FRAME = 32 << 20
"""Longest answer to one test [bytes]; a longer one is no answer."""
AHEAD = 128
"""Most inputs that a program has before it has answered them; to send one at a time would take three times as long."""
PIPE = 1 << 20
"""Size of a pipe, where the system grants it [bytes]."""
_NAMED = re.compile(rf"\b(?:{'|'.join(sorted(PACKAGES - {'numpy'}))})\b")
PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Broken(Exception):
    """The sandbox could not be set up: the machine's fault, not the program's."""


class Silent(Exception):
    """The program did not answer in time."""


class Frame(NamedTuple):
    """What the program's side sent: `o` the output of the next test (seconds, value); `e` an exception in it or `d`
    in defining the program (type, text); `r` once it is defined."""

    kind: bytes
    value: Any


FORGED = Frame(b"e", ["Forged", "the answer is not what the sandbox writes"])


class Sandbox:
    """A runner and its layers; one program runs at a time.

    `without`: LAYERS to leave off, `namespaces` for our own making of the first four, `bubblewrap` for it. Raises
    Broken where not even an honest program runs.
    """

    def __init__(self, without: list[str] | tuple[str, ...] = (), scratch: str | None = None) -> None:
        self.status: dict[str, Any] = {}
        self._without = [n for name in without for n in (NAMESPACES if name == "namespaces" else (name,))]
        self._parent = scratch
        self._wrap: list[str] = []
        self._start()
        bwrap = shutil.which("bwrap")
        if bwrap and absent(self.layers, "files") and not {"files", "bubblewrap"} & set(without):
            # Some systems let bubblewrap make the namespaces that they refuse to others.
            alone = self.layers
            self.close()
            try:
                self._wrap = _bubblewrap(bwrap)
                self._start()
            except Broken as e:
                self._wrap = []
                self._start()
                self.layers = {k: f"{v}; bubblewrap: {e}" if absent(alone, k) else v for k, v in alone.items()}

    def _start(self) -> None:
        """A runner and a folder for it. Its layers are told once: one that takes its place must have the same."""
        self._scratch = tempfile.mkdtemp(prefix="treediff-", dir=self._parent)
        os.chmod(self._scratch, 0o711 if os.geteuid() == 0 else 0o700)  # root's programs run as another user
        self._control, theirs = socket.socketpair()
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        scratch = "/tmp" if self._wrap else self._scratch
        find = f"import sys; sys.path.insert(0, {os.path.dirname(PACKAGE)!r})"
        start = f"{find}; from treediff.sandbox import runner; del sys.path[0]; runner.main()"
        python = [sys.executable, "-s", "-P", "-B", "-c", start]
        self._process = subprocess.Popen(
            [*self._wrap, *python, str(theirs.fileno()), json.dumps(self._without), scratch],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
        theirs.close()
        self._control.settimeout(10 * SETUP)
        try:
            layers = json.loads(_all(self._control, b"\n"))
        except (OSError, ValueError):
            self._process.kill()
            error = self._process.stderr.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise Broken(error[-1].removeprefix("OSError: ") if error else "its runner did not start") from None
        if self._wrap:
            held = "bubblewrap, one for all programs of a worker"
            layers |= {name: held for name in NAMESPACES if absent(layers, name)}
        self.layers: dict[str, str] = layers

    def _again(self) -> None:
        """A runner that hangs is killed, with all below it, and another takes its place."""
        self._process.kill()
        self.close()
        before = self.layers
        self._start()
        if lost := [name for name in before if absent(self.layers, name) and not absent(before, name)]:
            raise Broken(f"the layer {lost[0]} was there and is no longer ({self.layers[lost[0]]})")

    def run(
        self,
        program: str,
        entry: str,
        inputs: list,
        limits: list[float],
        *,
        seconds: float,
        as_set: bool = False,
        waits: list[float] | None = None,
    ) -> Generator[Frame]:
        """What `program`'s `entry` returns for each of the (packed) `inputs`, frame by frame; first `r` or `d`.

        `limits`: seconds for each call, by EvalPlus's timer inside; `waits`: for each answer, by our own clock
        (raises Silent); `seconds`: for all. Closing the iterator kills the program. Then `status` says how the
        process ended: exit (negative: a signal; None: nobody knows), late, cpu [s], memory [bytes].
        """
        job = json.dumps({"program": program, "entry": entry, "as_set": as_set}).encode()
        packages = bool(_NAMED.search(program))  # to mount them takes a third of a short program's time
        try:
            line = _Line(self._control, seconds, packages)
        except (OSError, EOFError):  # this runner hangs or has ended, perhaps by the last program's doing
            self._again()
            try:
                line = _Line(self._control, seconds, packages)
            except (OSError, EOFError):
                raise Broken("its runner does not answer") from None
        try:
            frame, sent = line.exchange(job, 1, seconds) if line.setup == "ok" else None, 0
            for i, wait in enumerate(waits or limits):
                if frame is None:
                    return
                yield frame
                fresh = range(sent, min(i + AHEAD, len(inputs))) if sent - i <= AHEAD // 2 else range(0)
                body = json.dumps([[limits[k], inputs[k]] for k in fresh]).encode() if fresh else b""
                sent += len(fresh)
                frame = line.exchange(body, len(fresh), wait)
            if frame is not None:
                yield frame
        finally:
            # Done or not: the supervisor kills the program's process, then reports.
            self.status = line.close()
            if self.status["exit"] is None and self.status["setup"] == "ok":
                self._again()
        if self.status["setup"] != "ok":
            raise Broken(self.status["setup"])

    def close(self) -> None:
        """End the runner and remove its scratch folder."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stderr.close()
        remove(self._scratch)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Line:
    """The caller's end of a program: a pipe to it, one back, and its supervisor. Every wait ends."""

    def __init__(self, control: socket.socket, seconds: float, packages: bool) -> None:
        """Has the runner start a program of so many seconds. Raises OSError or EOFError if it does not in time."""
        self._supervisor, theirs = socket.socketpair()
        inp, self._to = os.pipe()
        self._back, out = os.pipe()
        self._buffer, self._rest, self._due = bytearray(), bytearray(), 0
        self._clocks: list[int] = []
        self.setup = "ok"
        for fd in (self._to, self._back):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE)
        self._supervisor.settimeout(2 * SETUP)
        try:
            try:
                socket.send_fds(control, [struct.pack(REQUEST, seconds, packages)], [inp, out, theirs.fileno()])
            finally:
                theirs.close()
                os.close(inp)
                os.close(out)
            first, self._clocks, _, _ = socket.recv_fds(self._supervisor, 1, 2)
            if not first:
                raise EOFError
        except (OSError, EOFError):
            self._shut()
            raise
        self._report = b"" if first == b"!" else first
        if first != b"!":
            self.setup = "failed"
        self._began, self._seconds = time.monotonic(), seconds

    def exchange(self, body: bytes, asks: int, seconds: float) -> Frame | None:
        """Sends a frame that asks for so many, if any, and waits for the next one back; None if the program has ended.

        Raises Silent after so many seconds. What the program waited for a core is not its time, up to PATIENCE times
        that; the sum of all waits has an end, too, if its supervisor does not see to it.
        """
        if not self._due and self._buffer:
            return FORGED  # an answer to what it was not asked
        self._due += asks - 1
        if asks:
            self._rest += b"j" + struct.pack("I", len(body)) + body
        if self._rest:
            self._write()
        if frame := self._frame():
            return frame
        start, before, forgiven, over = time.monotonic(), waited(*self._clocks[:1]), 0.0, False
        while True:
            left = start + seconds + forgiven - time.monotonic()
            if left <= 0:
                owed = min(waited(*self._clocks) - before, (PATIENCE - 1) * seconds) - forgiven
                if owed >= 0.01 and time.monotonic() < self._began + PATIENCE * self._seconds + 5:
                    forgiven += owed
                    continue
                if over:
                    raise Silent
                over, left = True, 0.0  # it may have answered while we had no core
            read, write, _ = select.select([self._back], [self._to] if self._rest else [], [], left)
            if write:
                self._write()
            if read:
                part = os.read(self._back, 1 << 18)
                self._buffer += part
                if (frame := self._frame()) or not part:
                    return frame

    def _write(self) -> None:
        """As much of what is to be sent as the pipe takes."""
        try:
            while self._rest:
                del self._rest[: os.write(self._to, self._rest)]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its end, or ended
            self._rest.clear()

    def _frame(self) -> Frame | None:
        """The next frame, if the whole of it is there."""
        if len(self._buffer) < 5:
            return None
        end = 5 + struct.unpack_from("I", self._buffer, 1)[0]
        if end > FRAME:
            return Frame(b"e", ["OutputTooLong", f"an output of more than {FRAME >> 20} MiB"])
        if len(self._buffer) < end:
            return None
        kind, body = bytes(self._buffer[:1]), bytes(self._buffer[5:end])
        del self._buffer[:end]
        try:
            value = json.loads(body)
        except (ValueError, RecursionError, MemoryError):
            value = None
        if kind not in (b"o", b"e", b"d", b"r") or type(value) is not list or len(value) != 2:
            return FORGED
        return Frame(kind, value)

    def close(self) -> dict[str, Any]:
        """Ends the program; what its supervisor says of it, or that it says nothing."""
        with contextlib.suppress(OSError):
            self._supervisor.shutdown(socket.SHUT_WR)
        try:
            self._supervisor.settimeout(SETUP)
            return json.loads(self._report + _all(self._supervisor))
        except (OSError, ValueError):
            return {"setup": "ok", "exit": None, "late": False, "cpu": 0.0, "memory": 0}
        finally:
            self._shut()

    def _shut(self) -> None:
        self._supervisor.close()
        for fd in (self._to, self._back, *self._clocks):
            os.close(fd)


def _all(sock: socket.socket, end: bytes = b"") -> bytes:
    """What comes until the other side hangs up, or until `end`."""
    parts = b""
    while not (end and parts.endswith(end)) and (part := sock.recv(1 << 16)):
        parts += part
    return parts


def _bubblewrap(bwrap: str) -> list[str]:
    """The command that starts a runner under bubblewrap: what it needs read-only, /tmp in memory."""
    command = [bwrap, "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout
    command += ["--size", str(SCRATCH)] if "--size" in known else []  # older ones limit it to half of the memory
    command += ["--tmpfs", "/tmp"]
    tops, hidden, packages = readable()
    [evalplus] = importlib.util.find_spec("evalplus").submodule_search_locations
    own = [f"{PACKAGE}/__init__.py", f"{PACKAGE}/sandbox", f"{evalplus}/eval/utils.py", f"{sys.prefix}/pyvenv.cfg"]
    own += [sys.executable, os.path.realpath(sys.executable), *glob.glob(f"{sys.base_prefix}/lib/libpython*")]
    for path in [*tops, *hidden, *packages, *filter(os.path.exists, own)]:
        command += ["--tmpfs", path] if path in hidden else ["--ro-bind", path, path]
    return [*command, "--chdir", "/", "--"]
