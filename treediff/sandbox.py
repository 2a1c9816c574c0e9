"""Runs a generated program on inputs, in a cage, and hands back what it returned as plain data. Never a verdict.

    with Sandbox() as box:
        box.layers                                # which layers hold on this machine, and why the others do not
        for frame in box.run(program="def f(x): return x + 1", entry="f", inputs=[[1], [2]], limits=[1, 1]): ...

Three processes stand between the caller and the program. This file, run as a script, is the *warden*: a small clean
process that has imported what EvalPlus's own children have, and no problem data. For each program it forks a
*guardian*, which makes the namespaces, forks the *program*, and waits to kill all of it. The caller and the program
share one socket, over which the program's side can only send JSON (see `encode`); nothing it sends is executed,
and it is told neither the expected outputs nor what became of the last one. docs/sandbox.md: layers and attacks.

Imports nothing from the package: the warden must be able to start alone.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import decimal
import fractions
import hashlib
import json
import marshal
import math
import numbers
import os
import platform
import re
import resource
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

MEMORY = 4 << 30
"""Address space of a program [bytes]: EvalPlus's limit, so that honest verdicts are the same."""
FRAME = 32 << 20
"""Longest answer to one test [bytes]; a longer one is no answer."""
BULK = 200_000
"""Most items that an output may hold to be sent whole rather than as a digest."""
SCRATCH = 64 << 20
"""Size of the scratch folder, and of a file where the folder is on disk [bytes]."""
LAYERS = ("processes", "network", "files", "user", "landlock", "seccomp")
"""The layers that a machine may lack, in the order they are tried."""
NAMESPACES = LAYERS[:4]

# --- plain data -----------------------------------------------------------------------------------------------------


class Opaque:
    """Stands for a value that is no plain data. Equal to nothing but itself."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}>"


class Digest(NamedTuple):
    """Stands for a value too big to send: equal to one of the same type, length and content."""

    type: str
    length: int
    sha256: str

    def __repr__(self) -> str:
        return f"<{self.type} of length {self.length}, SHA-256 {self.sha256[:12]}>"


_PLAIN = (list, tuple, set, frozenset, dict, str, bytes, bytearray, float, complex, int)
_LIKE = {base: type(f"other_{base.__name__}", (base,), {}) for base in _PLAIN}
_RAW = frozenset({str, bool, type(None), int, float})
_SCALAR = frozenset({bool, type(None), int, float})
_EXACT = frozenset({str, int, type(None), bytes})
_SEQUENCES = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "keys": frozenset,  # a view of keys or items: equal to a set, to no list
}
_MAPPINGS = {
    "dict": dict,
    "Counter": collections.Counter,
    "OrderedDict": collections.OrderedDict,
    "defaultdict": lambda pairs: collections.defaultdict(None, pairs),
}
_DTYPE = re.compile(r"[<>|=]?([biufc]\d{1,2}|[SU]\d{1,6})")


def encode(x: Any) -> Any:
    """`x` as a JSON value that `decode` turns into an equal one: plain data by content, anything else by name.

    JSON's own types stand for themselves; every other type is an object of one key, its name. Only the base
    type's methods are asked for the content, so a subclass says nothing about itself but its type's name.
    """
    t = type(x)
    if t is int:
        return x if -(1 << 63) <= x < 1 << 63 else {"int": hex(x)}
    if t in _RAW:
        return x
    if t is list:
        kinds = set(map(type, x))
        if kinds <= _RAW and (int not in kinds or _small(x)):
            return x
        return [encode(v) for v in x]
    name = t.__name__
    if t in (tuple, set, frozenset, collections.deque):
        return {name: [encode(v) for v in x]}
    if t in (dict, collections.Counter, collections.OrderedDict, collections.defaultdict):
        return {name: [[encode(k), encode(v)] for k, v in x.items()]}
    if t in (bytes, bytearray):
        return {name: x.hex()}
    if t is complex:
        return {"complex": [x.real, x.imag]}
    if t is decimal.Decimal:
        return {"Decimal": str(x)}
    if t is fractions.Fraction:
        return {"Fraction": [encode(x.numerator), encode(x.denominator)]}
    if t is range:
        return {"range": [encode(x.start), encode(x.stop), encode(x.step)]}
    if t in (type({}.keys()), type({}.items())):
        return {"keys": [encode(v) for v in x]}
    if t.__module__ == "numpy":
        return _encode_numpy(x, name)
    for base in _PLAIN:  # type(x).__mro__, not isinstance: `__class__` may lie
        if base in t.__mro__:
            return {"like": [base.__name__, encode(_content(base, x))]}
    if isinstance(x, numbers.Integral):
        return {"like": ["int", encode(int(x))]}
    return {"opaque": str(name)[:80]}


def abridged(x: Any) -> Any:
    """`encode(x)`, or the digest of an `x` of more than `BULK` items (Mbpp/255 returns 1.7 million tuples of 77).

    Equal values have equal digests as long as sets and mappings inside them have the same order.
    """
    if type(x) in _SCALAR or _items(x, 0) <= BULK:
        return encode(x)
    total = hashlib.sha256()
    if type(x) in (str, bytes):
        total.update(marshal.dumps(x, 2))  # version 2: by type and value alone, no references
    elif type(x) in (list, tuple):
        for item in x:
            total.update(marshal.dumps(_canonical(item), 2))
    elif type(x) in (set, frozenset, dict):  # in no order: the sum of the items' digests
        items = x.items() if type(x) is dict else x
        digests = (hashlib.sha256(marshal.dumps(_canonical(item), 2)).digest() for item in items)
        total.update((sum(int.from_bytes(d, "big") for d in digests) % (1 << 256)).to_bytes(32, "big"))
    else:
        return {"opaque": type(x).__name__}
    return {"digest": [type(x).__name__, len(x), total.hexdigest()]}


def _canonical(x: Any) -> Any:
    """`x` with its numbers written in one way: 1 for 1.0 and True. What is unequal to itself differs every time."""
    t = type(x)
    if t is float:
        return int(x) if x.is_integer() else x if x == x else os.urandom(16)
    if t is bool:
        return int(x)
    if t in (list, tuple) and not set(map(type, x)) <= _EXACT:
        return t([_canonical(v) for v in x])
    return x


def _items(x: Any, so_far: int) -> int:
    """How many items `x` holds at any depth, text counting by 4 characters; stops counting beyond `BULK`."""
    t = type(x)
    if t in (str, bytes):
        return so_far + len(x) // 4
    if t is dict:
        return _items(list(x.values()), so_far + len(x))
    if t not in (list, tuple, set, frozenset):
        return so_far
    so_far += len(x)
    kinds = set(map(type, x))
    if so_far > BULK or kinds <= _SCALAR:
        return so_far
    if kinds == {str}:
        return so_far + sum(map(len, x)) // 4
    for item in x:
        so_far = _items(item, so_far)
        if so_far > BULK:
            break
    return so_far


def _small(values: list) -> bool:
    """Whether all integers among `values` fit 64 bits."""
    return all(-(1 << 63) <= v < 1 << 63 for v in values if type(v) is int)


def _content(base: type, x: Any) -> Any:
    """`x`, an instance of a subclass of `base`, as a plain `base`, by the methods of `base` alone."""
    if base is dict:
        return dict(dict.items(x))
    if base in (list, tuple, set, frozenset):
        return base(base.__iter__(x))
    if base is str:
        return str.__str__(x) if type(str.__str__(x)) is str else "".join(str.__iter__(x))
    if base in (bytes, bytearray):
        return base(memoryview(x))
    if base is complex:
        return complex.__pos__(x)
    return base.__pos__(x)


def _encode_numpy(x: Any, name: str) -> Any:
    """A numpy scalar or array by its dtype, shape and values; object arrays and others by name."""
    dtype = getattr(x, "dtype", None)
    shape = getattr(x, "shape", None)
    if not _DTYPE.fullmatch(getattr(dtype, "str", "") or "") or not isinstance(shape, tuple):
        return {"opaque": name}
    if name == "ndarray":
        return {"ndarray": [dtype.str, list(shape), encode(x.reshape(-1).tolist())]}
    return {"numpy": [dtype.str, encode(x.item())]} if shape == () else {"opaque": name}


def decode(v: Any) -> Any:
    """The value that `encode` wrote. Raises ValueError or TypeError for anything that it cannot have written."""
    t = type(v)
    if t is list:
        return v if set(map(type, v)) <= _RAW else [decode(i) for i in v]
    if t is not dict:
        return v
    if len(v) != 1:
        raise ValueError("not one key")
    ((tag, body),) = v.items()
    if tag in _SEQUENCES:
        return _SEQUENCES[tag]([decode(i) for i in _list(body)])
    if tag in _MAPPINGS:
        return _MAPPINGS[tag]({decode(k): decode(i) for k, i in _list(body)})
    if tag == "int":
        return int(body, 16)
    if tag in ("bytes", "bytearray"):
        return {"bytes": bytes, "bytearray": bytearray}[tag].fromhex(body)
    if tag == "complex":
        real, imag = _list(body)
        return complex(float(real), float(imag))
    if tag == "Decimal":
        return decimal.Decimal(body)
    if tag == "Fraction":
        return fractions.Fraction(*map(decode, _list(body)))
    if tag == "range":
        return range(*map(decode, _list(body)))
    if tag in ("numpy", "ndarray"):
        return _decode_numpy(tag, _list(body))
    if tag == "like":
        base, content = _list(body)
        kind = next(b for b in _PLAIN if b.__name__ == base)
        return _LIKE[kind](decode(content))
    if tag == "digest":
        name, length, digest = _list(body)
        return Digest(str(name), int(length), str(digest))
    if tag == "opaque":
        return Opaque(str(body)[:80])
    raise ValueError(f"unknown tag {tag[:40]!r}")


def _list(body: Any) -> list:
    if type(body) is not list:
        raise ValueError("not a list")
    return body


def _decode_numpy(tag: str, body: list) -> Any:
    import numpy as np

    if not _DTYPE.fullmatch(body[0]):
        raise ValueError("not a plain dtype")
    dtype = np.dtype(body[0])
    if tag == "numpy":
        return dtype.type(decode(body[1]))
    _, shape, values = body
    if dtype.itemsize * len(_list(values)) > FRAME or math.prod(shape) != len(values):
        raise ValueError("not an array")
    return np.array(decode(values), dtype=dtype).reshape(shape)


# --- the kernel -----------------------------------------------------------------------------------------------------

_NS = {
    "files": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# System calls that no honest program needs, by number on x86_64 and aarch64: networking, processes, other processes,
# namespaces and mounts, the kernel's own objects, the clock, priorities, and objects that outlive the process.
_DENIED = """
socket 41 198, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, kill 62 129, tkill 200 130,
rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434,
pidfd_getfd 438 438, kcmp 312 272, process_madvise 440 440, process_mrelease 448 448, setsid 112 157,
setpgid 109 154, fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, unshare 272 97, setns 308 268,
mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, move_mount 429 429, open_tree 428 428,
fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433, mount_setattr 442 442, bpf 321 280,
perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, io_uring_enter 426 426,
io_uring_register 427 427, keyctl 250 219, add_key 248 217, request_key 249 218, init_module 175 105,
finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294, reboot 169 142,
swapon 167 224, swapoff 168 225, acct 163 89, settimeofday 164 170, clock_settime 227 112, clock_adjtime 305 266,
adjtimex 159 171, sethostname 170 161, setdomainname 171 162, iopl 172 -, ioperm 173 -, quotactl 179 60,
quotactl_fd 443 443, name_to_handle_at 303 264, open_by_handle_at 304 265, personality 135 92, msgget 68 186,
shmget 29 194, semget 64 190, mq_open 240 180, setpriority 141 140, ioprio_set 251 30, sched_setscheduler 144 119,
sched_setparam 142 118, sched_setattr 314 274, sched_setaffinity 203 122, migrate_pages 256 238, move_pages 279 239,
fanotify_init 300 262, syslog 103 116, memfd_secret 447 447, modify_ldt 154 -
"""
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
_EPERM, _ENOSYS = 1, 38
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SUBREAPER, _PR_NO_NEW_PRIVS = 1, 4, 22, 36, 38


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(name: str, *args: Any) -> int:
    """A C library function by name (or `syscall`); OSError naming it if it fails."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = getattr(_libc(), name)(*wide)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def _prctl(option: int, *args: Any) -> None:
    _call("prctl", option, *args, *[0] * (4 - len(args)))


def readable() -> list[str]:
    """What a program may read: Python, its packages and the system's libraries. Not the project, not its data."""
    sites = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages", "lib-dynload")]
    stdlib = os.path.dirname(os.__file__)
    wanted = [sys.prefix, sys.base_prefix, sys.exec_prefix, stdlib, *sites, "/usr", "/lib", "/lib64"]
    wanted = sorted({os.path.abspath(p) for p in wanted if os.path.isdir(p)} - {"/"}, key=len)
    tops = [p for i, p in enumerate(wanted) if not any(p.startswith(q + "/") for q in wanted[:i])]
    return tops + [p for p in ("/etc/ld.so.cache", "/etc/localtime") if os.path.isfile(p)]


def _new_root() -> None:
    """A root of our own: what is `readable`, read-only, a few devices, and an empty /scratch in memory. No /proc."""
    none, bind, private = b"none", 0x1000 | 0x4000, 0x40000 | 0x4000
    _call("mount", none, b"/", None, private, None)
    root = "/proc"  # any folder that surely exists and that nothing below is read from
    devices = [p for p in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom") if os.path.exists(p)]
    _call("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    for path in [*readable(), *devices]:
        spot = root + path
        os.makedirs(spot if os.path.isdir(path) else os.path.dirname(spot), mode=0o755, exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(spot, os.O_CREAT | os.O_WRONLY))
        _call("mount", path.encode(), spot.encode(), None, bind, None)
    os.mkdir(root + "/scratch")
    read_only = struct.pack("4Q", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, on all below
    _call("syscall", 442, -100, root.encode(), 0x8000, read_only, len(read_only))
    options = f"size={SCRATCH},nr_inodes=4096,mode=777".encode()
    _call("mount", b"tmpfs", (root + "/scratch").encode(), b"tmpfs", 0x2 | 0x4, options)
    os.chdir(root)
    _call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b".")
    _call("umount2", b".", 2)
    os.chdir("/scratch")


def _landlock(scratch: str) -> None:
    """No file but those `readable` and under `scratch`, no TCP, and (Linux 6.12) no signal or socket to others."""
    abi = _call("syscall", 444, None, 0, 1)
    every = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attr = struct.pack("3Q", every, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = _call("syscall", 444, attr, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    read, write = 0b1100, 0b0110 | (every & 1 << 14)
    rules = [(p, read if os.path.isdir(p) else 0b0100) for p in readable()]
    rules += [(p, write) for p in ("/dev/null", "/dev/zero")]
    rules += [(p, 0b0100) for p in ("/dev/random", "/dev/urandom")]
    rules += [(scratch, every & ~(1 | 1 << 6 | 1 << 11 | 1 << 13))]
    for path, allowed in rules:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            _call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    _call("syscall", 446, ruleset, 0)
    os.close(ruleset)


def _filter() -> bytes:
    """The seccomp filter as BPF: `_DENIED` fails, no process is made (threads are), no other process touched."""
    column, arch = _ARCHES[platform.machine()]
    denied = [row.split()[1 + column] for row in _DENIED.replace("\n", " ").split(",")]
    pid = os.getpid()

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, at_least, bits = 0x20, 0x15, 0x35, 0x45
    fail, allow, kill = op(6, 0x50000 | _EPERM), op(6, 0x7FFF0000), op(6, 0x80000000)
    code = [op(load, 4), op(equal, arch, 1, 0), kill, op(load, 0)]
    code += [op(at_least, 0x40000000, 0, 1), fail]  # x32's numbers
    for number in denied:
        if number != "-":
            code += [op(equal, int(number), 0, 1), fail]
    code += [op(equal, _CLONE3[column], 0, 1), op(6, 0x50000 | _ENOSYS)]  # then libc takes clone, whose flags we see
    code += [op(equal, _CLONE[column], 0, 4), op(load, 16), op(bits, 0x10000, 1, 0), fail, allow]
    code += [op(equal, _TGKILL[column], 0, 4), op(load, 16), op(equal, pid, 1, 0), fail, allow]
    code += [op(equal, _PRLIMIT[column], 0, 4), op(load, 16), op(equal, 0, 2, 0), op(equal, pid, 1, 0), fail]
    return b"".join([*code, allow])


def _seccomp() -> None:
    code = ctypes.create_string_buffer(_filter())
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code)))
    _prctl(_PR_SET_SECCOMP, 2, program)


def _limits(seconds: float, processes: int) -> None:
    cpu = math.ceil(seconds) + 2
    for name, value in [
        ("CPU", cpu),
        ("FSIZE", SCRATCH),
        ("NOFILE", 64),
        ("NPROC", processes),
        ("CORE", 0),
        ("MEMLOCK", 1 << 20),
        ("MSGQUEUE", 0),
        ("SIGPENDING", 256),
    ]:
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is not None:
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))


# --- the warden's side ----------------------------------------------------------------------------------------------


def warden(control: socket.socket, without: list[str], scratch: str) -> None:
    """Forks one guardian per request until the caller hangs up. Says first which layers this machine has."""
    import evalplus.eval.utils  # noqa: F401  (what EvalPlus's own children have in memory, numpy among it)

    platform.uname()  # reliability_guard asks, and the answer is kept
    _prctl(_PR_SET_DUMPABLE, 0)
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
    spot = tempfile.mkdtemp(prefix="program-", dir=scratch) if _absent(layers, "files") else ""
    report: dict[str, Any] = {"setup": "ok", "exit": None, "late": False, "cpu": 0.0, "memory": 0}
    try:
        _prctl(_PR_SUBREAPER, 1)
        _separate(layers)
        if spot and layers.get("user", "").isdigit():
            os.chown(spot, int(layers["user"]), -1)
        said, say = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                status.close()
                os.close(said)
                try:
                    _enter(layers, data, say, spot, seconds)
                except BaseException as e:
                    os.write(say, f"{e}".encode()[:400] or b"failed")
                    os._exit(1)
                os.write(say, b"ok")
                os.close(say)
                _program(data)
            finally:
                os._exit(0)
        data.close()
        os.close(say)
        report["setup"] = os.read(said, 500).decode() or "the program's process died before it began"
        report |= _wait(child, status, seconds)
        if _absent(layers, "processes"):  # else the kernel has killed the namespace with its first process
            _sweep(child)
    except OSError as e:
        report["setup"] = str(e)
    finally:
        if spot:
            _remove(spot)
    with contextlib.suppress(OSError):
        status.sendall(json.dumps(report).encode())


def _absent(layers: dict[str, str], name: str) -> bool:
    return layers.get(name, "absent").startswith("absent")


def _separate(layers: dict[str, str]) -> None:
    """The guardian's namespaces; the program is then the first process in a process namespace."""
    holds = [name for name in ("processes", "network", "files", "user") if not _absent(layers, name)]
    flags = (_NS["pid"] if "processes" in holds else 0) | (_NS["net"] if "network" in holds else 0)
    flags |= _NS["ipc"] | _NS["uts"] if "network" in holds else 0
    user, group = os.geteuid(), os.getegid()
    if any(layers[name] == "user namespace" for name in holds):
        _prctl(_PR_SET_DUMPABLE, 1)  # or the maps below are not ours to write
        _call("unshare", _NS["user"])
        for file, text in [("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")]:
            Path(f"/proc/self/{file}").write_text(text)
        _prctl(_PR_SET_DUMPABLE, 0)
    if flags:
        _call("unshare", flags)


def _enter(layers: dict[str, str], data: socket.socket, say: int, spot: str, seconds: float) -> None:
    """The program's process goes into the cage, outermost wall first."""
    os.setsid()
    with contextlib.suppress(OSError):
        _prctl(_PR_SET_DUMPABLE, 1)
        Path("/proc/self/oom_score_adj").write_text("1000")  # short of memory, the kernel takes this one first
    own = not _absent(layers, "user") or not _absent(layers, "processes")
    processes = 64 if own else 64 + sum(_tasks(p) for p in Path("/proc").iterdir() if p.name.isdigit())
    if not _absent(layers, "files"):
        _call("unshare", _NS["files"])
        _new_root()
    else:
        os.chdir(spot)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    keep = sorted({data.fileno(), say})
    for low, high in zip([2, *keep], [*keep, 1 << 16], strict=True):
        os.closerange(low + 1, high)
    os.environ.clear()
    sys.modules["posix"].environ.clear()  # as it was at the start
    os.umask(0o077)
    _limits(seconds, processes)
    _prctl(_PR_NO_NEW_PRIVS, 1)
    if not _absent(layers, "landlock"):
        _landlock("/scratch" if not _absent(layers, "files") else spot)
    if layers.get("user", "").isdigit():
        os.setgroups([])
        os.setresgid(*[int(layers["user"])] * 3)
        os.setresuid(*[int(layers["user"])] * 3)
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_DUMPABLE, 0)
    if not _absent(layers, "seccomp"):
        _seccomp()


def _tasks(process: Path) -> int:
    """Threads of a process of this user, 0 for others'."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0
    except OSError:
        return 0


def _wait(child: int, status: socket.socket, seconds: float) -> dict[str, Any]:
    """Until the program ends, the time is up or the caller hangs up; then it is dead."""
    poll = select.poll()
    poll.register(status, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(child), select.POLLIN)
        tick = seconds
    except OSError:
        tick = 0.01  # an old kernel, or a container that forbids pidfd_open
    deadline, late = time.monotonic() + seconds, False
    while True:
        done, code, usage = os.wait4(child, os.WNOHANG)
        if done:
            break
        late = time.monotonic() >= deadline
        if late or any(
            fd == status.fileno() for fd, _ in poll.poll(max(0, min(tick, deadline - time.monotonic())) * 1000)
        ):
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


def _program(sock: socket.socket) -> None:
    """Runs the program as EvalPlus's `unsafe_execute` does, and sends each output in place of comparing it."""
    from evalplus.eval.utils import reliability_guard, swallow_io, time_limit

    job = json.loads(_receive(sock))
    inputs = decode(job["inputs"])
    dumps, clock, leave, as_set = json.dumps, time.perf_counter, os._exit, job["as_set"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    reliability_guard(maximum_memory_bytes=min(MEMORY, total))
    scope: dict[str, Any] = {}
    stage = b"d"
    try:
        with swallow_io():
            exec(job["program"], scope)
            fn = scope[job["entry"]]
        stage = b"e"
        for inp, limit in zip(inputs, job["limits"], strict=True):
            with time_limit(limit):
                start = clock()
                with swallow_io():
                    out = fn(*inp)
                seconds = clock() - start
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


def _text(e: BaseException) -> str:
    try:
        return str(e)[:300]
    except BaseException:
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


def _frames(sock: socket.socket, waits: Iterator[float] | None = None) -> Iterator[Frame]:
    """Frames until the program's side hangs up or sends what is no frame. `waits`: longest wait for each [s]."""
    buffer = bytearray()
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
                raise Silent from None
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
        if bwrap and _absent(self.layers, "files") and not {"files", "bubblewrap"} & set(without):
            # Some systems let bubblewrap make the namespaces that they refuse to others.
            alone = self.layers
            self._stop()
            try:
                self._start(_bubblewrap(bwrap))
                held = "bubblewrap, one for all programs of a worker"
                self.layers |= {name: held for name in NAMESPACES if _absent(self.layers, name)}
            except Broken as e:
                self._start([])
                self.layers = {k: f"{v}; bubblewrap: {e}" if _absent(alone, k) else v for k, v in alone.items()}

    def _start(self, wrap: list[str]) -> None:
        ours, theirs = socket.socketpair()
        environment = {"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        scratch = "/tmp" if wrap else self._scratch
        python = [sys.executable, "-s", "-P", "-B", os.path.abspath(__file__)]
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
            yield from _frames(ours, iter([seconds + 5, *waits[1:]]) if waits else None)
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
    """The command that starts a warden under bubblewrap: `readable` and this file read-only, /tmp in memory."""
    command = [bwrap, "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp"]
    paths = readable()
    for path in (sys.executable, os.path.abspath(__file__)):
        if not any(path.startswith(p + "/") for p in paths):
            paths.append(path)
    for path in paths:
        command += ["--ro-bind", path, path]
    return [*command, "--chdir", "/", "--"]


if __name__ == "__main__":
    warden(socket.socket(fileno=int(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3])
