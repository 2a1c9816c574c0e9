"""What holds a program: namespaces, a root of its own, landlock, seccomp and limits, by the kernel's own calls.

The guardian calls `separate` before it forks the program's process, and that process calls `enter` before anything
of the program is read. Each layer that a machine lacks raises OSError here; client.py finds out beforehand which
hold. docs/sandbox.md says what each one is for. Linux on x86_64 and aarch64.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import resource
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

LAYERS = ("processes", "network", "files", "user", "landlock", "seccomp")
"""The layers that a machine may lack, in the order they are tried."""
NAMESPACES = LAYERS[:4]
SCRATCH = 64 << 20
"""Size of the scratch folder, and of a file where the folder is on disk [bytes]."""

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
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS = 1, 4, 22, 36, 38


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
    call("prctl", option, *args, *[0] * (4 - len(args)))


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
    call("mount", none, b"/", None, private, None)
    root = "/proc"  # any folder that surely exists and that nothing below is read from
    devices = [p for p in ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom") if os.path.exists(p)]
    call("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=1m,mode=755")
    for path in [*readable(), *devices]:
        spot = root + path
        os.makedirs(spot if os.path.isdir(path) else os.path.dirname(spot), mode=0o755, exist_ok=True)
        if not os.path.isdir(path):
            os.close(os.open(spot, os.O_CREAT | os.O_WRONLY))
        call("mount", path.encode(), spot.encode(), None, bind, None)
    os.mkdir(root + "/scratch")
    read_only = struct.pack("4Q", 0x1 | 0x2, 0, 0, 0)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, on all below
    call("syscall", 442, -100, root.encode(), 0x8000, read_only, len(read_only))
    options = f"size={SCRATCH},nr_inodes=4096,mode=777".encode()
    call("mount", b"tmpfs", (root + "/scratch").encode(), b"tmpfs", 0x2 | 0x4, options)
    os.chdir(root)
    call("syscall", {"x86_64": 155, "aarch64": 41}[platform.machine()], b".", b".")
    call("umount2", b".", 2)
    os.chdir("/scratch")


def _landlock(scratch: str) -> None:
    """No file but those `readable` and under `scratch`, no TCP, and (Linux 6.12) no signal or socket to others."""
    abi = call("syscall", 444, None, 0, 1)
    every = (1 << (13 + (abi >= 2) + (abi >= 3) + (abi >= 5))) - 1
    attr = struct.pack("3Q", every, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    ruleset = call("syscall", 444, attr, 8 if abi < 4 else 16 if abi < 6 else 24, 0)
    read, write = 0b1100, 0b0110 | (every & 1 << 14)
    rules = [(p, read if os.path.isdir(p) else 0b0100) for p in readable()]
    rules += [(p, write) for p in ("/dev/null", "/dev/zero")]
    rules += [(p, 0b0100) for p in ("/dev/random", "/dev/urandom")]
    rules += [(scratch, every & ~(1 | 1 << 6 | 1 << 11 | 1 << 13))]
    for path, allowed in rules:
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            call("syscall", 445, ruleset, 1, struct.pack("=Qi", allowed, fd), 0)
            os.close(fd)
    call("syscall", 446, ruleset, 0)
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
    prctl(PR_SET_SECCOMP, 2, program)


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


def absent(layers: dict[str, str], name: str) -> bool:
    return layers.get(name, "absent").startswith("absent")


def separate(layers: dict[str, str]) -> None:
    """The guardian's namespaces; the program is then the first process in a process namespace."""
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


def enter(layers: dict[str, str], data: socket.socket, say: int, spot: str, seconds: float) -> int:
    """The program's process goes into the cage, outermost wall first. Returns a descriptor for `waited`, or -1."""
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
    if not absent(layers, "files"):
        call("unshare", _NS["files"])
        _new_root()
    else:
        os.chdir(spot)
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    keep = sorted({data.fileno(), say, clock} - {-1})
    for low, high in zip([2, *keep], [*keep, 1 << 16], strict=True):
        os.closerange(low + 1, high)
    os.environ.clear()
    sys.modules["posix"].environ.clear()  # as it was at the start
    os.umask(0o077)
    _limits(seconds, processes)
    prctl(PR_NO_NEW_PRIVS, 1)
    if not absent(layers, "landlock"):
        _landlock("/scratch" if not absent(layers, "files") else spot)
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


def waited(clock: int) -> float:
    """How long a process has been ready to run but had no core [s], from its `schedstat`; 0 where there is none."""
    try:
        return int(os.pread(clock, 99, 0).split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def _tasks(process: Path) -> int:
    """Threads of a process of this user, 0 for others'."""
    try:
        return len(os.listdir(process / "task")) if process.stat().st_uid == os.getuid() else 0
    except OSError:
        return 0
