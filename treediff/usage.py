"""What a run cost: seconds, GPU-hours and energy of every attempt at a stage, those that failed or were killed as well.

    with attempt(cfg.run_dir, "train", gpus=8): ...      # one file in runs/<preset>/<run>/attempts/
    total(cfg.run_dir)                                   # {"train": {"attempts": 2, "failed": 1, "gpu_hours": ...}}

An attempt's file is written when it begins, every half minute, and when it ends; so of one that was killed at most half
a minute is missing. Energy is what the counters of the machine say, other processes on it included: NVML's for the GPUs
that are visible, RAPL's for processors' packages where the kernel lets this user read it. What gives none is absent.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from treediff.errors import Preempted
from treediff.files import read_json, write_json

EVERY = 30.0
"""Seconds between two writings of a running attempt's file."""
RAPL = Path("/sys/class/powercap")


@contextmanager
def attempt(run_dir: Path, stage: str, gpus: int) -> Iterator[None]:
    """Keep account of what happens inside: done, stopped (by SIGTERM or Ctrl-C) or failed.

    A call that is done in less than a second found its work there and leaves no account.
    """
    path = run_dir / "attempts" / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{stage}-{uuid.uuid4().hex[:6]}.json"
    began, meter = time.monotonic(), Meter()
    record: dict[str, Any] = {"stage": stage, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    record |= {"process": _name(os.getpid()), "gpus": gpus}

    def write(state: str) -> None:
        seconds = time.monotonic() - began
        spent = {"seconds": round(seconds, 1), "gpu_hours": round(gpus * seconds / 3600, 6), "joules": meter.joules()}
        write_json(path, record | spent | {"state": state})

    ended = threading.Event()

    def follow() -> None:
        while not ended.wait(EVERY):
            with suppress(OSError):  # a full disk is the stage's to tell
                write("running")

    write("running")
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    state = "failed"
    try:
        yield
        state = "done"
    except (Preempted, KeyboardInterrupt):
        state = "stopped"
        raise
    finally:
        ended.set()
        thread.join()
        with suppress(OSError):
            write(state)
            if state == "done" and time.monotonic() - began < 1:
                path.unlink()


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All attempts of a run in the order in which they began; one whose process is gone without a word was killed."""
    found = [read_json(path) for path in sorted((run_dir / "attempts").glob("*.json"))]
    return [
        a | {"state": "killed"}
        if a["state"] == "running" and _name(int(a["process"].split(":")[0])) != a["process"]
        else a
        for a in found
    ]


def total(run_dir: Path) -> dict[str, dict[str, Any]]:
    """By stage: attempts, how many of them did not end well, seconds, GPU-hours, and joules by counter as far as every
    attempt has them."""
    out: dict[str, dict[str, Any]] = {}
    every = attempts(run_dir)
    for stage in dict.fromkeys(a["stage"] for a in every):
        of = [a for a in every if a["stage"] == stage]
        bad = sum(a["state"] in ("failed", "killed", "stopped") for a in of)
        known = set.intersection(*(set(a["joules"]) for a in of))
        out[stage] = {"attempts": len(of), "not_finished": bad}
        out[stage] |= {k: round(sum(a[k] for a in of), 4) for k in ("seconds", "gpu_hours")}
        out[stage]["joules"] = {k: round(sum(a["joules"][k] for a in of), 1) for k in sorted(known)}
    return out


def _name(pid: int) -> str:
    """A process by its number and the moment it began; only the number's text if there is none."""
    with suppress(OSError, IndexError):
        return f"{pid}:{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"
    return f"{pid}:"


# --- energy --------------------------------------------------------------------------------------------------------
class Meter:
    """Counters of energy, read when it is made and at every `joules`."""

    def __init__(self) -> None:
        self._gpus = _gpu_counters()
        self._packages = _packages()
        self._first_gpus = [read() for read in self._gpus]
        self._last = {path: _number(path) for path, _ in self._packages}
        self._spent = 0.0  # of the packages, whose counters start anew at their limit

    def joules(self) -> dict[str, float]:
        """Joules since it was made, by counter (`gpus`, `packages`); without those that this machine does not give."""
        out = {}
        if self._gpus:
            out["gpus"] = round(sum(read() - at for read, at in zip(self._gpus, self._first_gpus, strict=True)), 1)
        for path, limit in self._packages:
            now = _number(path)
            self._spent += ((now - self._last[path]) % limit if limit else now - self._last[path]) / 1e6
            self._last[path] = now
        return out | ({"packages": round(self._spent, 1)} if self._packages else {})


def _number(path: Path) -> int:
    return int(path.read_text())


def _packages() -> list[tuple[Path, int]]:
    """RAPL's counter of each processor package [microjoules] with the value at which it starts anew."""
    found = []
    for folder in sorted(RAPL.glob("intel-rapl:[0-9]*")):
        if folder.name.count(":") == 1:  # cores and memory within a package are counted in it
            with suppress(OSError, ValueError):
                _number(folder / "energy_uj")
                found.append((folder / "energy_uj", _number(folder / "max_energy_range_uj")))
    return found


def _gpu_counters() -> list[Any]:
    """A function per visible GPU that gives the joules since its driver was loaded; none without NVML."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2():
        return []
    count = ctypes.c_uint()
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = range(count.value) if visible is None else [int(i) for i in visible.split(",") if i.strip().isdecimal()]

    def reader(handle: ctypes.c_void_p) -> Any:
        def read() -> float:
            value = ctypes.c_ulonglong()
            return (
                value.value / 1e3 if not nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)) else 0.0
            )

        return read

    found = []
    for index in chosen:
        handle = ctypes.c_void_p()
        if not nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)):
            found.append(reader(handle))
    return [read for read in found if read() > 0]  # older GPUs do not count
