"""What the ranks of a training run and its starter know of each other: the lock, the signs of life, the last words.

A rank beats (`beat`) at every micro-batch. The starter (launch.py) ends a run whose rank has not done so for
`stall_timeout` seconds, and asks each for its stack first (`stacks`), so that the error says where it hangs.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from treediff.errors import UserError

_WAIT = 15.0  # seconds that a new start waits for the ranks of a killed one to end


def starter() -> str:
    """This process as the ranks know it: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def state(pid: int | str) -> str:
    """The kernel's letter for what a process does: R, S, D, T (stopped), Z (ended, not buried), X (there is none)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def follow(name: str) -> None:
    """End this process when the `starter` is gone: a killed notebook must not leave ranks behind.

    Only on the starter's own host; elsewhere the launcher's connection ends the ranks.
    """
    host, _, pid = name.rpartition(":")
    if host != socket.gethostname():
        return

    def watch() -> None:
        while state(pid) not in "ZX":
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def alone(run_dir: Path, wait: float = _WAIT) -> FileLock:
    """The run's lock, held until it is released or the process ends. Raises UserError if another process keeps it."""
    lock = FileLock(run_dir / ".lock")
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        raise UserError(f"{run_dir}: another process is training this run; wait for it, or end it.") from None
    return lock


# --- signs of life -------------------------------------------------------------------------------------------------
def life(run_dir: Path, rank: int | str) -> Path:
    """The file whose time is the rank's last sign of life, and whose text is its host and process id."""
    return run_dir / f".rank{rank}.alive"


def begin(run_dir: Path, rank: int, asked: Callable[[], None]) -> None:
    """Called by a rank before its first step: from now on it beats, answers SIGUSR1 with its stack, and calls `asked`
    when its starter asks it to stop (SIGUSR2: a SIGTERM of the launcher's ends it at once)."""
    signal.signal(signal.SIGUSR2, lambda *_: asked())
    faulthandler.register(signal.SIGUSR1, _stack(run_dir, rank).open("w"), all_threads=False)
    life(run_dir, rank).write_text(starter())


def beat(run_dir: Path, rank: int, grace: float = 0.0) -> None:
    """A sign of life; the next may be `grace` seconds later than usual (a checkpoint takes the time it takes)."""
    then = time.time() + grace
    os.utime(life(run_dir, rank), (then, then))


def end(run_dir: Path) -> None:
    """Remove the signs of life of a run that is over."""
    for path in [*run_dir.glob(".rank*.alive"), *run_dir.glob(".rank*.stack")]:
        path.unlink(missing_ok=True)


def silence(run_dir: Path, since: float) -> float:
    """How long the quietest rank has been silent [s]; 0 before the first step. Signs from before `since` (a time) were
    left by a start that was killed."""
    now = time.time()
    times = []
    for path in run_dir.glob(".rank*.alive"):
        with suppress(FileNotFoundError):
            times.append(path.stat().st_mtime)
    return max([now - t for t in times if t >= since], default=0.0)


def here(run_dir: Path, since: float) -> dict[Path, int]:
    """Process ids of this host's ranks that have given a sign of life since a time, and live, by its file."""
    found = {}
    for path in sorted(run_dir.glob(".rank*.alive")):
        host, _, pid = path.read_text().rpartition(":")
        if host == socket.gethostname() and state(pid) not in "ZX" and path.stat().st_mtime >= since:
            found[path] = int(pid)
    return found


def stacks(run_dir: Path, since: float) -> str:
    """Where each rank of this host stands: the inner frames of its stack, or that it does not answer."""
    words = []
    asked = here(run_dir, since)
    for pid in asked.values():
        os.kill(pid, signal.SIGUSR1)
    time.sleep(1.0 if asked else 0.0)
    for path, pid in asked.items():
        rank = path.name.removeprefix(".").removesuffix(".alive")
        said = _stack(run_dir, rank.removeprefix("rank")).read_text().strip()
        lines = [line.strip() for line in said.splitlines() if line.strip().startswith("File")]
        words.append(f"{rank}: " + (" <- ".join(lines[:4]) or f"does not answer (process {pid}, state {state(pid)})"))
    return "; ".join(words)


def _stack(run_dir: Path, rank: int | str) -> Path:
    return run_dir / f".rank{rank}.stack"
