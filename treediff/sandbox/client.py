"""Runs a generated program on inputs, in a cage, and hands back what it returned as plain data. Never a verdict.

    with Sandbox() as box:
        box.layers                                # which layers hold on this machine, and why the others do not
        for frame in box.run("def f(x): return x + 1", "f", [[1], [2]], [1, 1], seconds=4): ...

Three processes stand between the caller and the program: warden, guardian (runner.py) and the program's own, in its
cage (isolation.py). The caller and the program share one socket, over which the program's side can only send JSON
(values.py); nothing it sends is executed, and it is told neither the expected outputs nor what became of the last one.
docs/sandbox.md: layers and attacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from treediff.sandbox.isolation import NAMESPACES, SCRATCH, absent, readable
from treediff.sandbox.values import Frame, drain, frames, send

PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Broken(Exception):
    """The cage could not be set up: the machine's fault, not the program's."""


class Sandbox:
    """A warden and its layers; one program runs at a time.

    `without`: LAYERS to leave off, `namespaces` for our own making of the first four, `bubblewrap` for it.
    """

    def __init__(self, without: list[str] | tuple[str, ...] = (), scratch: str | None = None) -> None:
        self.status: dict[str, Any] = {}
        self._without = [n for name in without for n in (NAMESPACES if name == "namespaces" else (name,))]
        self._scratch = tempfile.mkdtemp(prefix="treediff-", dir=scratch)
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
        os.makedirs(self._scratch, exist_ok=True)  # a warden that ends takes it along
        os.chmod(self._scratch, 0o711)
        ours, theirs = socket.socketpair()
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        scratch = "/tmp" if wrap else self._scratch
        find = f"import sys; sys.path.insert(0, {os.path.dirname(PACKAGE)!r})"
        start = f"{find}; from treediff.sandbox import runner; del sys.path[0]; runner.main()"
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
                send(ours, json.dumps(job).encode())
                ours.settimeout(None)
            # The first wait holds the program's own start, which EvalPlus does not limit either.
            yield from frames(ours, iter([seconds + 5, *waits[1:]]) if waits else None, ask)
        finally:
            # Done or not: the guardian kills the program's process and all it made, then reports.
            with contextlib.suppress(OSError):
                ask.shutdown(socket.SHUT_WR)
            ask.settimeout(60)
            text = drain(ask)
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
    command = [bwrap, "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev"]
    known = subprocess.run([bwrap, "--help"], capture_output=True, text=True, check=False).stdout
    command += ["--size", str(SCRATCH)] if "--size" in known else []  # older ones limit it to half of the memory
    command += ["--tmpfs", "/tmp"]
    paths = readable()
    for path in (sys.executable, PACKAGE):
        if not any(path.startswith(p + "/") for p in paths):
            paths.append(path)
    for path in paths:
        command += ["--ro-bind", path, path]
    return [*command, "--chdir", "/", "--"]
