"""What holds a program: namespaces, a root of its own, landlock, seccomp and limits, by the kernel's own calls.

The supervisor calls `separate` before it forks the program's process, and that process calls `enter` before anything
of the program is read. Each layer that a machine lacks raises OSError here; runner.py finds out beforehand which
hold. docs/sandbox.md says what each one is for. Linux on x86_64 and aarch64.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import glob
import math
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LAYERS = ("processes", "network", "files", "user", "landlock", "seccomp")
"""The layers that a machine may lack, in the order they are tried."""
NAMESPACES = LAYERS[:4]
SCRATCH = 64 << 20
"""Size of the scratch folder, and of a file where the folder is on disk [bytes]."""
PACKAGES = {"numpy", "scipy", "sympy", "mpmath", "networkx", "pandas", "dateutil", "six", "pytz", "tzdata"}
PACKAGES |= {"rich", "markdown_it", "mdurl", "pygments", "tqdm", "pytest", "_pytest", "py", "pluggy", "iniconfig"}
PACKAGES |= {"packaging"}
"""The packages beside the standard library that a program may import, as far as they are installed."""

_NS = {
    "files": 0x00020000,
    "uts": 0x04000000,
    "ipc": 0x08000000,
    "user": 0x10000000,
    "pid": 0x20000000,
    "net": 0x40000000,
}
_ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# The system calls that a program may make, by number on x86_64 and aarch64 (`-`: not there); every other one fails.
# Files, pipes, memory, threads, signals to oneself, time. None that changes the metadata of a file, makes a socket,
# process or kernel object, or names another process.
_ALLOWED = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
preadv2 327 286, pwritev2 328 287, lseek 8 62, close 3 57, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -,
newfstatat 262 79, statx 332 291, statfs 137 43, fstatfs 138 44, access 21 -, faccessat 269 48, faccessat2 439 439,
getdents 78 -, getdents64 217 61, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37, unlink 87 -, unlinkat 263 35, symlink 88 -,
symlinkat 266 36, readlink 89 -, readlinkat 267 78, truncate 76 45, ftruncate 77 46, fallocate 285 47,
fadvise64 221 223, fsync 74 82, fdatasync 75 83, flock 73 32, sendfile 40 71, copy_file_range 326 285, umask 95 166,
dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72,
epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441,
eventfd2 290 19, sendto 44 206, recvfrom 45 207, shutdown 48 210, getsockname 51 204, getpeername 52 205,
getsockopt 55 209, mmap 9 222, munmap 11 215, mremap 25 216, mprotect 10 226, madvise 28 233, msync 26 227,
mincore 27 232, mlock 149 228, munlock 150 229, brk 12 214, membarrier 324 283, futex 202 98, futex_waitv 449 449,
set_robust_list 273 99, get_robust_list 274 100, rseq 334 293, set_tid_address 218 96, exit 60 93, exit_group 231 94,
wait4 61 260, waitid 247 95, sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121,
sched_getscheduler 145 120, sched_get_priority_max 146 125, sched_get_priority_min 147 126, rt_sigaction 13 134,
rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137, rt_sigsuspend 130 133,
sigaltstack 131 132, pause 34 -, alarm 37 -, setitimer 38 103, getitimer 36 102, restart_syscall 219 128,
clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115, nanosleep 35 101, gettimeofday 96 169,
time 201 -, times 100 153, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174, geteuid 107 175,
getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158, getpgrp 111 -,
getpgid 121 155, getsid 124 156, getpriority 140 141, uname 63 160, sysinfo 99 179, getrandom 318 278, getcpu 309 168,
getrusage 98 165, getrlimit 97 163, capget 125 90
"""
# Those allowed for some arguments only: see `_filter`.
_CLONE, _CLONE3, _TGKILL, _PRLIMIT = (56, 220), (435, 435), (234, 131), (302, 261)
_OPEN, _OPENAT, _CREAT, _SOCKETPAIR = (2, None), (257, 56), (85, None), (53, 199)
_FCNTL, _IOCTL, _PRCTL = (72, 25), (16, 29), (157, 167)
_EPERM, _ENOSYS = 1, 38
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS = 1, 4, 22, 36, 38


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: Any) -> int:
    """A C library function by name (or `syscall`); OSError naming it if it fails."""
    wide = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result = getattr(_libc(), name)(*wide)
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{name}: {os.strerror(errno)}")
    return result


def prctl(option: int, *args: Any) -> None:
    """The call of that name; OSError if it fails."""
    call("prctl", option, *args, *[0] * (4 - len(args)))


@functools.cache
def readable() -> tuple[list[str], list[str], list[str]]:
    """What a program may read: (folders and files, folders below these that it may not, `PACKAGES`).

    Python's standard library, the system's libraries and time zones. No other package, not the project, not its data.
    """
    stdlib, triplet = os.path.dirname(os.__file__), sysconfig.get_config_var("MULTIARCH") or "-"
    libraries = [f"{top}/{triplet}" for top in ("/lib", "/usr/lib")]
    if not all(map(os.path.isdir, libraries)):
        libraries = ["/lib", "/usr/lib"]
    conda = [f"{sys.base_prefix}/lib"] * os.path.isdir(f"{sys.base_prefix}/conda-meta")
    wanted = [stdlib, sysconfig.get_path("platstdlib"), *conda, *libraries, "/lib64", "/usr/lib64"]
    wanted = [p for p in dict.fromkeys(wanted) if os.path.isdir(p)]
    tops = [p for p in wanted if not any(p.startswith(q + "/") for q in wanted)]
    hidden = {q for p in wanted for q in glob.glob(f"{p}/*-packages") + glob.glob(f"{p}/python*/*-packages")}
    sites = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
    hidden |= {p for p in sites if any(p.startswith(q + "/") for q in tops)}
    packages = [os.path.join(p, n) for p in sites for n in sorted(os.listdir(p)) if n.partition(".")[0] in PACKAGES]
    tops += [p for p in ("/usr/share/zoneinfo", "/etc/ld.so.cache", "/etc/localtime") if os.path.exists(p)]
    _plain()  # kept, as this is, for every program to come
    return tops, sorted(hidden), packages


def _new_root(packages: bool) -> None:
    """A root of our own: what is `readable`, read-only, a few devices, an empty /scratch and /dev/shm in memory.

    No /proc. `packages`: all of them, or numpy alone.
    """
    none, bind, private = b"none", 0x1000 | 0x4000, 0x40000 | 0x4000
    call("mount", none, b"/", None, private, None)
    root = "/proc"  # any folder that surely exists and that nothing below is read from
    devices = [p for p in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom") if os.path.exists(p)]
    tops, hidden, installed = readable()
    installed = installed if packages else [p for p in installed if os.path.basename(p).startswith("numpy")]

    def memory(path: str, options: str) -> None:
        os.makedirs(root + path, mode=0o755, exist_ok=True)
        call("mount", b"tmpfs", (root + path).encode(), b"tmpfs", 0x2 | 0x4, options.encode())

    memory("", "size=1m,mode=755")
    for path in [*tops, *devices, *hidden, *installed]:
        spot = root + path
        if path in hidden:
            memory(path, "size=64k,mode=755")
            continue
        folder = os.path.isdir(path)
        os.makedirs(spot if folder else os.path.dirname(spot), mode=0o755, exist_ok=True)
        if not folder:
            os.close(os.open(spot, os.O_CREAT | os.O_WRONLY))
        call("mount", path.encode(), spot.encode(), None, bind, None)
    os.makedirs(root + "/dev/shm")
    os.mkdir(root + "/scratch")
    read_only = struct.pack("4Q", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, on all below
    call("syscall", 442, -100, root.encode(), 0x8000, read_only, len(read_only))
    memory("/scratch", f"size={SCRATCH},nr_inodes=4096,mode=777")
    memory("/dev/shm", "size=1m,nr_inodes=64,mode=777")
    os.chdir(root)
    call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b".")
    call("umount2", b".", 2)
    os.chdir("/scratch")


def _landlock(own: list[str]) -> None:
    """No file but those `readable` and under `own`, no TCP, and (Linux 6.12) no signal or socket to others.

    Names of files in folders of which only a part may be read remain visible, and every file's metadata. In a root of
    our own all of it may be read.
    """
    abi = call("syscall", 444, None, 0, 1)
    every = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attr = struct.pack("3Q", every, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = call("syscall", 444, attr, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    rules = [("/", _READ)] if own[0] == "/scratch" else _rules()
    rules += [(p, 0b0110 | (every & 1 << 14)) for p in ("/dev/null", "/dev/zero")]
    rules += [(p, every & ~(1 | 1 << 6 | 1 << 11 | 1 << 13)) for p in own]
    for path, allowed in rules:
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    call("syscall", 446, ruleset, 0)
    os.close(ruleset)


_READ, _NAMES = 0b1100, 0b1000


def _rules() -> list[tuple[str, int]]:
    """What landlock lets a program read where there is no root of its own."""
    tops, hidden, packages = readable()
    rules = [(p, _READ if os.path.isdir(p) else 0b0100) for p in [*_outside(tops, hidden), *packages]]
    rules += [(p, _NAMES) for p in {os.path.dirname(p) for p in [*packages, *hidden]}]
    return rules + [(p, 0b0100) for p in ("/dev/random", "/dev/urandom")]


def _outside(paths: list[str], hidden: list[str]) -> Iterator[str]:
    """`paths`, but in place of one that holds a hidden folder, all in it that is not hidden."""
    for path in paths:
        if not any(h.startswith(path + "/") for h in hidden):
            yield path
        else:
            below = [os.path.join(path, name) for name in os.listdir(path)]
            yield from _outside([p for p in below if p not in hidden], hidden)


@functools.cache
def _plain() -> bytes:
    """The part of the filter that allows `_ALLOWED`: test and return for each."""
    numbers = [row.split()[1 + _ARCHES[platform.machine()][0]] for row in _ALLOWED.replace("\n", " ").split(",")]
    return b"".join(struct.pack("HBBIHBBI", 0x15, 0, 1, int(n), 6, 0, 0, 0x7FFF0000) for n in numbers if n != "-")


def _filter() -> bytes:
    """The seccomp filter as BPF: `_ALLOWED`, and some calls by their arguments; the rest is said not to exist."""
    column, arch = _ARCHES[platform.machine()]

    def op(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    load, equal, at_least, bits = 0x20, 0x15, 0x35, 0x45
    fail, allow, unknown = op(6, 0x50000 | _EPERM), op(6, 0x7FFF0000), op(6, 0x50000 | _ENOSYS)
    kill = op(6, 0x80000000)
    code = [op(load, 4), op(equal, arch, 1, 0), kill, op(load, 0), op(at_least, 0x40000000, 0, 1), unknown]  # x32's

    def when(numbers: tuple[int, int | None], *ops: bytes) -> None:
        if numbers[column] is not None:
            code.extend([op(equal, numbers[column], 0, len(ops)), *ops])

    def one_of(argument: int, *values: int) -> list[bytes]:
        tests = [op(equal, value, len(values) - i, 0) for i, value in enumerate(values)]
        return [op(load, 16 + 8 * argument), *tests, fail, allow]

    def not_set_uid(flags: int | None, mode: int) -> list[bytes]:
        creates = [] if flags is None else [op(load, 16 + 8 * flags), op(bits, 0x400040, 1, 0), allow]
        return [*creates, op(load, 16 + 8 * mode), op(bits, 0o6000, 0, 1), fail, allow]

    code.append(_plain())
    when(_CLONE, op(load, 16), op(bits, 0x10000, 1, 0), fail, allow)  # CLONE_THREAD
    when(_TGKILL, *one_of(0, os.getpid()))
    when(_PRLIMIT, *one_of(0, 0, os.getpid()))
    when(_OPEN, *not_set_uid(1, 2))
    when(_OPENAT, *not_set_uid(2, 3))
    when(_CREAT, *not_set_uid(None, 1))
    when(_SOCKETPAIR, op(load, 16 + 8), op(0x54, 0xF), op(equal, 1, 1, 0), fail, allow)  # a stream
    when(_FCNTL, *one_of(1, *range(8), 36, 37, 38, 1030, 1031, 1032))  # descriptors, flags, locks, the size of a pipe
    when(_IOCTL, *one_of(1, 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451))  # isatty, FIONREAD, FIONBIO, FIOCLEX
    when(_PRCTL, *one_of(0, 15, 16, 0x53564D41))  # names of threads and of memory
    return b"".join([*code, unknown])


def _seccomp() -> None:
    code = ctypes.create_string_buffer(_filter())
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(code) // 8, ctypes.addressof(code)))
    prctl(PR_SET_SECCOMP, 2, program)


def limit(name: str, value: int) -> None:
    """The limit of this name for this process, or the hard one that there is already, if that is lower."""
    kind = getattr(resource, f"RLIMIT_{name}", None)
    if kind is not None:
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def processor_time(seconds: float) -> int:
    """Processor time that a program with so many seconds may use, in all its threads [s]."""
    return math.ceil(seconds) + 2


def absent(layers: dict[str, str], name: str) -> bool:
    """Whether a layer does not hold here."""
    return layers.get(name, "absent").startswith("absent")


def weakest(one: dict[str, str], other: dict[str, str]) -> dict[str, str]:
    """What holds in both of two sandboxes; `one` may be empty."""
    return {name: one[name] if name in one and absent(one, name) else how for name, how in other.items()}


def in_words(layers: dict[str, str]) -> dict[str, str]:
    """Each layer with what it kept programs from, or what they could do without it, for who reads a score."""
    calls, rights = not absent(layers, "seccomp"), not absent(layers, "landlock")
    held = {
        "processes": "programs saw no process but their own",
        "network": "programs had no network",
        "files": "programs saw Python, its libraries and an empty folder, nothing else",
        "user": "programs ran without the rights of the user who scored",
        "landlock": "programs could open Python, its libraries and an empty folder, nothing else",
        "seccomp": "programs could make only the system calls of computing: no process, no socket",
    }
    lacked = {
        "processes": "programs could see other processes" + ("" if calls else ", and stop those of the same user"),
        "network": "programs could have a socket" if not calls else "programs shared the network, but had no socket",
        "files": "programs could see names, sizes and dates of files outside, and fill the disk"
        if rights
        else "programs could read and write what the user who scored may, solutions of the benchmark included",
        "user": "programs ran as the user who scored",
        "landlock": "only the layer files kept programs from files"
        if not absent(layers, "files")
        else "see the layer files",
        "seccomp": "programs could start processes and reach all of the kernel that the other layers leave",
    }
    return {
        name: f"{how}; {lacked[name]}" if absent(layers, name) else f"{how}: {held[name]}"
        for name, how in layers.items()
    }


def separate(layers: dict[str, str]) -> None:
    """The supervisor's namespaces; the program is then the first process in a process namespace."""
    holds = [name for name in ("processes", "network", "files", "user") if not absent(layers, name)]
    flags = (_NS["pid"] if "processes" in holds else 0) | (_NS["net"] if "network" in holds else 0)
    flags |= _NS["ipc"] | _NS["uts"] if "network" in holds else 0
    user, group = os.geteuid(), os.getegid()
    if any(layers[name] == "user namespace" for name in holds):
        prctl(PR_SET_DUMPABLE, 1)  # or the maps below are not ours to write
        call("unshare", _NS["user"])
        for file, text in [("setgroups", "deny"), ("uid_map", f"1000 {user} 1"), ("gid_map", f"1000 {group} 1")]:
            Path(f"/proc/self/{file}").write_text(text)
        prctl(PR_SET_DUMPABLE, 0)
    if flags:
        call("unshare", flags)


def enter(layers: dict[str, str], keep: list[int], scratch: str, seconds: float, packages: bool = True) -> int:
    """Isolates this process, the outermost layer first; of its descriptors `keep` remain.

    Returns a descriptor for `waited`, or -1.
    """
    os.setsid()
    try:
        clock = os.open("/proc/self/schedstat", os.O_RDONLY)
    except OSError:
        clock = -1
    with contextlib.suppress(OSError):
        prctl(PR_SET_DUMPABLE, 1)
        Path("/proc/self/oom_score_adj").write_text("1000")  # short of memory, the kernel takes this one first
    own = not absent(layers, "user") or not absent(layers, "processes")
    processes = 64 if own else 64 + sum(_tasks(p) for p in Path("/proc").iterdir() if p.name.isdigit())
    rooted = not absent(layers, "files")
    if rooted:
        call("unshare", _NS["files"])
        _new_root(packages)
    else:
        os.chdir(scratch)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    keep = sorted({*keep, clock} - {-1})
    for low, high in zip([2, *keep], [*keep, 1 << 16], strict=True):
        os.closerange(low + 1, high)
    os.environ.clear()
    sys.modules["posix"].environ.clear()  # as it was at the start
    os.umask(0o077)
    for name, value in [
        ("CPU", processor_time(seconds)),
        ("FSIZE", SCRATCH),
        ("NOFILE", 64),
        ("NPROC", processes),
        ("CORE", 0),
        ("MEMLOCK", 1 << 20),
        ("MSGQUEUE", 0),
        ("SIGPENDING", 256),
    ]:
        limit(name, value)
    prctl(PR_NO_NEW_PRIVS, 1)
    if not absent(layers, "landlock"):
        _landlock(["/scratch", "/dev/shm"] if rooted else [scratch])
    if layers.get("user", "").isdigit():
        os.setgroups([])
        os.setresgid(*[int(layers["user"])] * 3)
        os.setresuid(*[int(layers["user"])] * 3)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    prctl(PR_SET_DUMPABLE, 0)
    if not absent(layers, "seccomp"):
        _seccomp()
    return clock


def waited(clock: int = -1, stat: int = -1) -> float:
    """How long a process has been ready to run but had no core [s], from its `schedstat`; 0 where there is none.

    With its `stat` too, less what its other threads used: it may not keep itself waiting.
    """
    try:
        own, delay, _ = map(int, os.pread(clock, 99, 0).split())
        used = os.pread(stat, 999, 0).rsplit(b")", 1)[1].split()[11:13] if stat >= 0 else []
    except (OSError, IndexError, ValueError):
        return 0.0
    others = sum(map(int, used)) / os.sysconf("SC_CLK_TCK") - own * 1e-9 if used else 0.0
    return max(0.0, delay * 1e-9 - max(0.0, others))


def _tasks(process: Path) -> int:
    """Threads of a process of this user, 0 for others'."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0
    except OSError:
        return 0
