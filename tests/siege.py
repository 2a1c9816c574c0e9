"""Every attack of attacks.py on one sandbox, in a process of its own: python siege.py '{"without": ["landlock"]}'

The order is a JSON object; every key may be missing:

    without     layers to leave off, as for Sandbox
    refuse      what a filter keeps the kernel from granting here: "namespaces" (as in a plain container), "landlock"
    kinds, only kinds of attacks; names of attacks
    every       each how manyth attack

Writes JSON: the layers, how many attacks ran, and what came through, in words by name. tests/test_attacks.py starts it
as root, as an ordinary user, and under limits and masks.
"""

import contextlib
import ctypes
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from attacks import ATTACKS, EXPECTED, FLOATS, INPUTS, RIGHT, Attack

import treediff
from treediff.sandbox.client import Sandbox
from treediff.scoring import verdicts


def oracle(inputs: list, expected: list) -> dict:
    part = {"inputs": inputs, "expected": expected, "times": [0.0] * len(inputs), "extras": [0.0] * len(inputs)}
    return {"kind": "humaneval", "entry": "f", "atol": 0, "base": part}


def refuse(what: list[str]) -> None:
    """From here on the kernel refuses it to this process and its children."""
    calls = {
        "namespaces": [(272, 97), (308, 268), (165, 40), (442, 442)],  # unshare, setns, mount, mount_setattr
        "landlock": [(444, 444), (445, 445), (446, 446)],
    }
    column = ["x86_64", "aarch64"].index(platform.machine())
    code = [struct.pack("HBBI", 0x20, 0, 0, 0)]
    for numbers in (pair for name in what for pair in calls[name]):
        code += [struct.pack("HBBI", 0x15, 0, 1, numbers[column]), struct.pack("HBBI", 6, 0, 0, 0x50001)]
    # Nor clone with a namespace's flag, by which bubblewrap would make its own; clone3 is said not to exist.
    clone, clone3 = [(56, 220), (435, 435)][0][column], 435
    if "namespaces" in what:
        code += [struct.pack("HBBI", 0x15, 0, 1, clone3), struct.pack("HBBI", 6, 0, 0, 0x50026)]
        code += [struct.pack("HBBI", 0x15, 0, 3, clone), struct.pack("HBBI", 0x20, 0, 0, 16)]
        code += [struct.pack("HBBI", 0x45, 0, 1, 0x7E020000), struct.pack("HBBI", 6, 0, 0, 0x50001)]
    code.append(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    buffer = ctypes.create_string_buffer(b"".join(code))
    libc = ctypes.CDLL(None, use_errno=True)
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        raise OSError(ctypes.get_errno(), "the filter was refused")


class Outside:
    """What an attack could reach: a folder that everyone may write to, listeners, a process, a secret."""

    def __init__(self) -> None:
        self.tag = tag = f"treediff-attack-{os.getpid()}-{time.monotonic_ns()}"
        self.folder = Path("/var/tmp") / tag
        self.folder.mkdir()
        self.folder.chmod(0o777)
        (self.folder / "kept").write_text("kept")
        (self.folder / "kept").chmod(0o666)
        self.victim = subprocess.Popen(["sleep", "1000"])
        self.streams = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        self.streams += [socket.socket(socket.AF_UNIX)]
        self.streams[1].bind(str(self.folder / "socket"))
        self.streams[2].bind(f"\0{tag}")
        port = self.streams[0].getsockname()[1]
        self.datagrams = [socket.socket(family, socket.SOCK_DGRAM) for family in (2, 1, 1)]
        self.datagrams[0].bind(("127.0.0.1", port))
        self.datagrams[1].bind(str(self.folder / "datagrams"))
        self.datagrams[2].bind(f"\0{tag}-datagrams")
        for name in ("socket", "datagrams"):
            (self.folder / name).chmod(0o777)
        for s in (*self.streams, *self.datagrams):
            s.setblocking(False)
        for s in self.streams:
            s.listen()
        self.below = Path(sys.prefix) / tag
        with contextlib.suppress(OSError):
            self.below.write_text("kept")
        self.key = 0x7E000000 + os.getpid()
        os.environ["SECRET"] = "hunter2"
        import evalplus

        self.words = {"out": self.folder, "port": port, "pid": os.getpid(), "tag": tag, "secret": "hunter2"}
        self.words |= {"key": self.key, "victim": self.victim.pid, "below": self.below}
        self.words |= {"kit": Path(treediff.__file__).parent, "site": Path(evalplus.__file__).parents[1]}
        self.before = self._metadata()

    def _metadata(self) -> list:
        kept = os.stat(self.folder / "kept")
        return [kept.st_mode, kept.st_uid, kept.st_gid, kept.st_mtime_ns, os.listxattr(self.folder / "kept")]

    def reached(self) -> list[str]:
        """What an attack reached, in words."""
        found = []
        for s in self.streams:
            with contextlib.suppress(OSError):
                s.accept()
                found.append("a connection")
        for s in self.datagrams:
            with contextlib.suppress(OSError):
                s.recv(9)
                found.append("a datagram")
        if sorted(p.name for p in self.folder.iterdir()) != ["datagrams", "kept", "socket"]:
            found.append("the folder")
        if (self.folder / "kept").read_text() != "kept" or self._metadata() != self.before:
            found.append("the file or its metadata")
        for trace in (Path("/tmp") / self.tag, Path("/dev/shm") / self.tag):
            if trace.exists():
                found.append(str(trace))
                trace.unlink()
        if f" {self.key} " in Path("/proc/sysvipc/shm").read_text() + Path("/proc/sysvipc/msg").read_text():
            found.append("System V memory or queues")
        if b") S " not in Path(f"/proc/{self.victim.pid}/stat").read_bytes():
            found.append("a process")
        return found

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for s in (*self.streams, *self.datagrams):
            s.close()
        self.below.unlink(missing_ok=True)
        shutil.rmtree(self.folder)


def below(pid: int) -> list[int]:
    """Live processes below `pid`."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            fields = (process / "stat").read_bytes().rsplit(b")", 1)[1].split()
            if int(fields[1]) == pid:
                found += [int(process.name)] * (fields[0] != b"Z") + below(int(process.name))
    return found


def left_behind(box: Sandbox, scratch: Path) -> list[str]:
    """What lives below the runner, which bubblewrap may have put below itself, and what lies in its folder."""
    found = below(box._process.pid)[2 if box._wrap else 0 :]
    on_disk = [p.name for folder in scratch.iterdir() for p in folder.iterdir()]
    return [f"left running: {p}" for p in found] + [f"left on disk: {name}" for name in on_disk]


def tried(box: Sandbox, attack: Attack, words: dict) -> str:
    """How the attack came through; empty if it did not."""
    source = attack.source
    for name, value in words.items():
        source = source.replace(f"{{{name}}}", str(value))
    tests = oracle(*FLOATS) if attack.kind == "tolerance" else oracle(INPUTS, EXPECTED)
    status, reason = verdicts._examine(box, source, tests, "base")
    if attack.kind == "right":
        return "" if status == "pass" else reason
    if reason.startswith("syntax") or "NameError" in reason:
        return f"the attack itself is wrong: {reason}"
    if status == "pass" and attack.kind != "mess":
        return "passed"
    return ""


def siege(order: dict) -> dict:
    os.environ.setdefault("TMPDIR", "/tmp")
    refuse(order.get("refuse", []))
    verdicts.MIN_SECONDS, verdicts.SLACK, verdicts.GRACE = 0.3, 0.5, 0.5
    chosen = [a for a in ATTACKS if a.kind in order.get("kinds", [a.kind]) and a.name in order.get("only", [a.name])]
    chosen = chosen[:: order.get("every", 1)]
    came_through, ran = {}, 0
    scratch = Path(tempfile.mkdtemp(prefix="siege-"))
    scratch.chmod(0o755)
    outside = Outside()
    try:
        with Sandbox(order.get("without", []), scratch=str(scratch)) as box:
            holds = {name for name, how in box.layers.items() if not how.startswith("absent")}
            for attack in chosen:
                stopped = not attack.layers or bool(holds & set(attack.layers))
                if attack.kind == "right" and box._wrap:
                    stopped = not attack.layers  # bubblewrap's root has no /dev/shm for each program
                if not stopped or (attack.name == "fork bomb" and not holds and os.geteuid() == 0):
                    continue  # what docs/sandbox.md says is possible here
                ran += 1
                start = time.monotonic()
                why = [tried(box, attack, outside.words), *outside.reached()]
                if attack.kind != "right":
                    status, reason = verdicts._examine(box, RIGHT, oracle(INPUTS, EXPECTED), "base")
                    why += [f"the next program fails: {reason}"] * (status != "pass")
                deadline = time.monotonic() + 10
                while (left := left_behind(box, scratch)) and time.monotonic() < deadline:
                    time.sleep(0.02)  # the runner is at it
                why += left
                if time.monotonic() - start > 60:
                    why.append(f"took {time.monotonic() - start:.0f} s")
                if any(why):
                    came_through[attack.name] = "; ".join(filter(None, why))
            layers = box.layers
    finally:
        outside.close()
    if left := list(scratch.iterdir()):
        came_through["after the end"] = f"left on disk: {left}"
    shutil.rmtree(scratch, ignore_errors=True)
    return {"layers": layers, "ran": ran, "came through": came_through}


if __name__ == "__main__":
    print(json.dumps(siege(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")), indent=1))
