"""The cage against programs that want out of it, or a pass they have not earned; and the data that crosses its bars.

Each attack is a program whose `f` returns the right answer only where the attack worked, so a pass is a breach. The
attacks on the verdict run twice, with all layers that the machine has and with none. The attacks on the machine
name the layers of which one is enough, and skip where all of those are absent.
"""

import collections
import contextlib
import decimal
import fractions
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff.sandbox import client, isolation, runner, values
from treediff.sandbox.client import Sandbox
from treediff.sandbox.isolation import LAYERS
from treediff.sandbox.values import Opaque, abridged, pack, unpack
from treediff.scoring import score, verdicts

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")

# f(x) = x * x * 7 + 3, which no attacker can guess from the inputs alone
ORACLE = {"kind": "humaneval", "entry": "f", "atol": 0}
INPUTS = [[2], [5], [11]]
ORACLE["base"] = {"inputs": INPUTS, "expected": [31, 178, 850], "times": [0.0] * 3, "extras": [0.0] * 3}
RIGHT = "def f(x): return x * x * 7 + 3\n"

# --- attacks on the verdict -----------------------------------------------------------------------------------------

ALWAYS = """
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
"""
VERDICT = {
    "object equal to everything": f"class A:{ALWAYS}\ndef f(x): return A()",
    "int equal to everything": f"class A(int):{ALWAYS}\ndef f(x): return A(1)",
    "float equal to everything": f"class A(float):{ALWAYS}\ndef f(x): return A(1)",
    "str equal to everything": f"class A(str):{ALWAYS}\ndef f(x): return A('1')",
    "list equal to everything": f"class A(list):{ALWAYS}\ndef f(x): return A([1])",
    "dict equal to everything": f"class A(dict):{ALWAYS}\ndef f(x): return A()",
    "array of objects equal to everything": f"import numpy\nclass A:{ALWAYS}\ndef f(x): return numpy.array(A())",
    "class equal to everything": f"class M(type):{ALWAYS}\nclass A(metaclass=M): pass\ndef f(x): return A",
    "object that lies about its class": f"class A:{ALWAYS}\n    __class__ = int\ndef f(x): return A()",
    "expected read from the frames": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        for v in {**frame.f_locals, **frame.f_globals}.values():
            if isinstance(v, dict) and 'expected' in v: return v['expected'][0]
            if isinstance(v, list) and 31 in v: return 31
        frame = frame.f_back
""",
    "expected searched in memory": """
import gc
def f(x):
    for v in gc.get_objects():
        if isinstance(v, list) and 178 in v and 850 in v: return v[[2, 5, 11].index(x)]
        if isinstance(v, dict) and 'expected' in v: return v['expected'][[2, 5, 11].index(x)]
""",
    "expected searched in the warden's memory": """
import posix, re
def f(x):
    pid = posix.getppid()
    for line in posix.read(posix.open(f'/proc/{pid}/maps', 0), 1 << 20).split(b'\\n'):
        if b'rw' in line:
            low, high = (int(v, 16) for v in line.split()[0].split(b'-'))
            found = re.search(rb'"expected": .(\\d+)', posix.pread(posix.open(f'/proc/{pid}/mem', 0), high - low, low))
            if found: return int(found[1])
""",
    "end with exit code 0 at once": "import os\nos._exit(0)\ndef f(x): return 0",
    "end with exit code 0 in a test": "import os\ndef f(x): os._exit(0)",
    "sys.exit(0)": "import sys\ndef f(x): sys.exit(0)",
    "raise SystemExit in the definition": "raise SystemExit(0)\ndef f(x): return 0",
    "raise KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "patch numpy.allclose": "import numpy\nnumpy.allclose = lambda *a, **k: True\ndef f(x): return 1.0",
    "patch EvalPlus": """
import evalplus.eval as e, sys
e.is_floats = e.untrusted_check = e.unsafe_execute = lambda *a, **k: True
e.PASS = e.FAIL = e.TIMEOUT = 'pass'
e._mapping.update({1: 'pass', 2: 'pass', 3: 'pass'})
sys.modules['evalplus.eval._special_oracle'] = None
def f(x): return 1
""",
    "patch builtins": """
import builtins
builtins.isinstance = lambda *a: True
builtins.all = builtins.any = lambda *a: True
builtins.len = lambda *a: 3
def f(x): return 1
""",
    "patch json": "import json\njson.dumps = lambda *a, **k: '[0.0, 31]'\ndef f(x): return 1",
    "patch the encoder": """
import gc
for v in gc.get_objects():
    if isinstance(v, dict) and 'abridged' in v and 'encode' in v:
        v['abridged'] = v['encode'] = lambda x: 31
        v['_LIKE'] = v['_RAW'] = None
def f(x): return 1
""",
    "forge answers on every descriptor": """
import posix, struct
body = b'[0.0, 31]'
for fd in range(64):
    try: posix.write(fd, (b'o' + struct.pack('I', len(body)) + body) * 3)
    except OSError: pass
posix._exit(0)
def f(x): return 0
""",
    "forge a verdict on every descriptor": """
import posix
for fd in range(64):
    try: posix.write(fd, b'{"setup": "ok", "exit": 0, "base": "pass", "plus": "pass", "reason": ""}\\n')
    except OSError: pass
posix._exit(0)
def f(x): return 0
""",
    "send more answers than tests": """
import posix, struct, threading
def flood():
    body = b'[0.0, 31]'
    for fd in range(3, 64):
        try: posix.write(fd, (b'o' + struct.pack('I', len(body)) + body) * 1000)
        except OSError: pass
threading.Thread(target=flood, daemon=True).start()
def f(x): return 31
""",
    "announce an answer of 4 GiB": """
import posix
for fd in range(3, 64):
    try: posix.write(fd, b'o\\xff\\xff\\xff\\xff')
    except OSError: pass
def f(x): return 31
""",
    "answer with an unknown tag": """
import posix, struct
body = b'[0.0, {"pickle": "cposix\\\\nsystem\\\\n"}]'
for fd in range(3, 64):
    try: posix.write(fd, b'o' + struct.pack('I', len(body)) + body)
    except OSError: pass
def f(x): return 31
""",
    "answer with brackets 100,000 deep": """
import posix, struct
body = b'[0.0, ' + b'[' * 100_000 + b']' * 100_000 + b']'
for fd in range(3, 64):
    try: posix.write(fd, b'o' + struct.pack('I', len(body)) + body)
    except OSError: pass
def f(x): return 31
""",
    "close every descriptor": "import posix\nfor i in range(64):\n  try: posix.close(i)\n  except OSError: pass\n"
    + RIGHT,
    "answer at exit": "import atexit\natexit.register(print, 'pass')\ndef f(x): raise SystemExit",
    "exception that will not be printed": """
class E(Exception):
    def __str__(self): raise SystemExit(0)
    __repr__ = __str__
def f(x): raise E
""",
    "exception named like success": "class PASS(Exception): pass\ndef f(x): raise PASS('pass')",
    "endless list": "class L(list):\n  def __iter__(self):\n    while True: yield 1\ndef f(x): return L()",
    "list that holds itself": "def f(x):\n  a = []\n  a.append(a)\n  return a",
    "nested 100,000 deep": "def f(x):\n  a = []\n  for _ in range(100_000): a = [a]\n  return a",
    "integer of a million digits": "def f(x): return 7 ** (1 << 21)",
    "not a number": "def f(x): return float('nan')",
    "time-out caught": """
def f(x):
    n = 0
    while n < 10 ** 6 * 4:
        try:
            while n < 10 ** 6 * 4:
                n += 1
                sum(range(99))
        except BaseException: pass
    return x * x * 7 + 3
""",
    "time-out ignored": """
import signal, time
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    end = time.monotonic() + 60
    while time.monotonic() < end: pass
    return x * x * 7 + 3
""",
    "time-out in the definition": "while True: pass",
    "output of 1 GB": "def f(x): return 'x' * 1_000_000_000",
    "print of 20 MB a test": "def f(x):\n  print('x' * 20_000_000)\n  return 1",
    "crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "kill itself": "import posix, signal\ndef f(x): signal.raise_signal(9)",
    "read the tests' file": """
import posix
def f(x):
    for root in ('/tmp', '/root', '/home', '/work'):
        for name in posix.listdir(root):
            if name.startswith('oracle'): return 1
    raise OSError
""",
}


def verdict(box: Sandbox, program: str) -> tuple[str, str]:
    return verdicts._examine(box, program, ORACLE, "base")


@pytest.fixture(scope="module")
def full():
    """All layers that this machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "hunter2")
        with Sandbox() as box:
            yield box


@pytest.fixture(scope="module")
def bare():
    """What is left where the machine has no layer at all."""
    with Sandbox([*LAYERS, "bubblewrap"]) as box:
        yield box


@pytest.fixture(scope="module")
def walled():
    """What a plain container leaves: no namespaces, but what a process can forbid itself."""
    with Sandbox(["namespaces", "bubblewrap"]) as box:
        yield box


@pytest.fixture(scope="module")
def wrapped():
    """Where our own namespaces are refused, but bubblewrap is there and allowed."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    with Sandbox(["namespaces"]) as box:
        if box.layers["files"].startswith("absent"):
            pytest.skip(f"bubblewrap does not work here: {box.layers['files']}")
        assert box.layers["files"].startswith("bubblewrap")
        yield box


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    """Time limits short enough to test them."""
    monkeypatch.setattr(verdicts, "MIN_SECONDS", 0.3)
    monkeypatch.setattr(verdicts, "SLACK", 0.5)


@pytest.mark.parametrize("which", ["full", "bare"])
@pytest.mark.parametrize("attack", [a for a in VERDICT if a != "time-out ignored"])
def test_no_pass_by_tampering(attack, which, request):
    box = request.getfixturevalue(which)
    status, reason = verdict(box, VERDICT[attack])
    assert status != "pass"
    assert reason
    assert verdict(box, RIGHT) == ("pass", "")  # and the next program is not worse off


def test_a_program_that_must_be_killed_is_a_time_out(full):
    """As in EvalPlus: its own timer makes a failure, and only the end of all its time a time-out."""
    assert verdict(full, VERDICT["time-out ignored"]) == ("timeout", "time-out: base test 0: killed after 1.4 s")
    assert verdict(full, "def f(x):\n  while True: pass") == (
        "fail",
        "time-out: base test 0: f(2) took more than 0.3 s",
    )


@pytest.mark.slow
def test_a_busy_machine_fails_nobody(full):
    """Time without a core is not the program's; time asleep is."""
    if not Path("/proc/self/schedstat").exists():
        pytest.skip("this kernel has no schedstat")
    work = "import time\ndef f(x):\n  end = time.thread_time() + 0.22\n  while time.thread_time() < end: pass\n"
    busy = "while True: pass"
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(4 * cores)]
    try:
        assert verdict(full, work + "  return x * x * 7 + 3") == ("pass", "")
        start = time.monotonic()
        _, reason = verdict(full, "import time\ndef f(x):\n  time.sleep(60)")
        assert reason == "time-out: base test 0: f(2) took more than 0.3 s"
        assert time.monotonic() - start < 10
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_inputs_changed_in_place_do_not_move_the_goal(full):
    """EvalPlus computes find_zero's polynomial from the inputs as the program left them: zeros fit everything."""
    oracle = {"kind": "humaneval", "entry": "find_zero", "atol": 1e-4}
    oracle["base"] = {"inputs": [[[1, 2]]], "expected": [-0.5], "times": [0.0], "extras": [0.0]}
    assert verdicts._examine(full, "def find_zero(xs):\n  xs[:] = [0, 0]\n  return 9", oracle, "base")[0] == "fail"
    assert verdicts._examine(full, "def find_zero(xs): return -0.5", oracle, "base") == ("pass", "")


# --- attacks on the machine -----------------------------------------------------------------------------------------

POSIX = "import ctypes, os, posix, socket, struct, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
DO = POSIX + "def f(x):\n    {}\n    return x * x * 7 + 3\n"
FILES = ("files", "landlock")
# name: (layers of which one is enough, statement of `f`; it must raise where the attack fails)
MACHINE = {
    "write outside with io.open": (FILES, "import io; io.open('{out}/a', 'w').write('x')"),
    "write outside with pathlib": (FILES, "import pathlib; pathlib.Path('{out}/a').write_text('x')"),
    "write outside with os.open": (FILES, "posix.open('{out}/a', posix.O_CREAT | posix.O_WRONLY)"),
    "write outside with libc": (FILES, "assert libc.open(b'{out}/a', 0o101, 0o666) >= 0"),
    "write outside through a link": (FILES, "posix.symlink('{out}', 'l'); posix.open('l/a', posix.O_CREAT)"),
    "write outside through ..": (FILES, "posix.open('..' + '/..' * 20 + '{out}/a', posix.O_CREAT)"),
    "write outside through /proc": (FILES, "posix.open('/proc/self/root{out}/a', posix.O_CREAT)"),
    "write outside through the warden's root": (
        FILES,
        "posix.open('/proc/%d/root{out}/a' % posix.getppid(), posix.O_CREAT)",
    ),
    "overwrite a file": (FILES, "posix.open('{out}/kept', posix.O_WRONLY | posix.O_TRUNC)"),
    "truncate a file": (FILES, "posix.truncate('{out}/kept', 0)"),
    "delete a file": (FILES, "posix.unlink('{out}/kept')"),
    "rename a file": (FILES, "posix.rename('{out}/kept', '{out}/a')"),
    "link a file": (FILES, "posix.link('{out}/kept', 'k')"),
    "make a folder": (FILES, "posix.mkdir('{out}/a')"),
    "make a pipe": (FILES, "posix.mkfifo('{out}/a')"),
    "change the standard library": (FILES, "posix.open(os.__file__, posix.O_WRONLY)"),
    "change a package": (FILES, "import numpy; posix.open(numpy.__file__, posix.O_WRONLY)"),
    "leave a module in the packages": (
        FILES,
        "import numpy; posix.open(numpy.__file__ + '.x', posix.O_CREAT | posix.O_WRONLY)",
    ),
    "leave a file in /tmp": (FILES, "posix.open('/tmp/{tag}', posix.O_CREAT | posix.O_WRONLY)"),
    "leave a file in /dev/shm": (FILES, "posix.open('/dev/shm/{tag}', posix.O_CREAT | posix.O_WRONLY)"),
    "read a file": (FILES, "posix.read(posix.open('{out}/kept', 0), 9)"),
    "read the list of users": (FILES, "posix.read(posix.open('/etc/passwd', 0), 9)"),
    "list a folder": (FILES, "posix.listdir('{out}')"),
    "read the environment of its own process": (
        (),
        "assert b'{secret}' in posix.read(posix.open('/proc/self/environ', 0), 65536)",
    ),
    "read the environment of its parents": (
        (*FILES, "processes"),
        "posix.read(posix.open('/proc/{pid}/environ', 0), 9) or 1 / 0",
    ),
    "read the environment in memory": (
        (),
        "libc.getenv.restype = ctypes.c_char_p; assert libc.getenv(b'SECRET') or posix.environ.get(b'SECRET')",
    ),
    "connect to the network": (("network", "seccomp"), "socket.create_connection(('127.0.0.1', {port}), 1)"),
    "send a datagram": (
        ("network", "seccomp"),
        "assert socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    ),
    "listen for others": (("seccomp",), "socket.create_server(('127.0.0.1', 0))"),
    "connect with libc": (
        ("network", "seccomp"),
        "a = struct.pack('<H', 2) + struct.pack('>H', {port}) + bytes([127, 0, 0, 1]) + bytes(8)"
        "; assert libc.connect(libc.socket(2, 1, 0), a, 16) == 0",
    ),
    "connect to a named socket": (
        ("files", "landlock", "seccomp"),
        "s = socket.socket(socket.AF_UNIX); s.connect('{out}/socket')",
    ),
    "connect to an abstract socket": (
        ("network", "landlock", "seccomp"),
        "s = socket.socket(socket.AF_UNIX); s.connect('\\0{tag}')",
    ),
    "watch the network": (("user", "seccomp"), "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "start a program with posix_spawn": (
        ("seccomp",),
        "posix.waitpid(posix.posix_spawn('/usr/bin/env', ['env'], dict()), 0)",
    ),
    "start a program with libc's system": (("seccomp",), "assert libc.system(b'true') == 0"),
    "become another program": (("seccomp",), "posix.execv('/usr/bin/env', ['env'])"),
    "fork": (("seccomp",), "pid = posix.fork(); pid or posix._exit(0)"),
    "fork with clone3": (("seccomp",), "assert libc.syscall(435, struct.pack('11Q', *[0] * 11), 88) >= 0"),
    "signal its parent": (
        ("processes", "landlock", "seccomp", "user"),
        "posix.getppid() or 1 / 0; posix.kill(posix.getppid(), 0)",
    ),
    "kill everyone": (("processes", "seccomp"), "posix.kill(-1, 0)"),
    "kill the tests": (("processes", "landlock", "seccomp", "user"), "posix.kill({pid}, 9)"),
    "stop the tests": (("processes", "landlock", "seccomp", "user"), "posix.kill({pid}, 19)"),
    "trace its parent": (("processes", "seccomp"), "assert libc.ptrace(16, posix.getppid() or 1, 0, 0) == 0"),
    "read the tests' memory": (
        ("files", "landlock", "user"),
        "m = posix.read(posix.open('/proc/{pid}/maps', 0), 99).split(b'-')[0]"
        "; posix.pread(posix.open('/proc/{pid}/mem', 0), 1, int(m, 16))",
    ),
    "read the tests' memory by system call": (
        ("processes", "seccomp", "user"),
        "b = ctypes.create_string_buffer(8); v = struct.pack('QQ', ctypes.addressof(b), 8)"
        "; assert libc.process_vm_readv({pid}, v, 1, struct.pack('QQ', id(f), 8), 1, 0) >= 0"
        " or ctypes.get_errno() == 14",
    ),
    "slow the tests down": (("processes", "seccomp", "user"), "posix.setpriority(posix.PRIO_PROCESS, {pid}, 19)"),
    "limit the tests": (
        ("processes", "seccomp", "user"),
        "assert libc.prlimit({pid}, 7, struct.pack('QQ', 9, 9), None) == 0",
    ),
    "become root": ((), "posix.setuid(0); posix.chroot('/')"),
    "mount": ((), "assert libc.mount(b'tmpfs', b'.', b'tmpfs', 0, None) == 0"),
    "make a user namespace": (("seccomp",), "assert libc.unshare(0x10000000) == 0"),
    "use io_uring": (("seccomp",), "assert libc.syscall(425, 8, ctypes.create_string_buffer(120)) >= 0"),
    "load a kernel program": (
        ("seccomp",),
        "assert libc.syscall(321, 0, struct.pack('16I', 2, 4, 4, 1, *[0] * 12), 64) >= 0",
    ),
    "store a key": (("seccomp",), "assert libc.syscall(248, b'user', b'{tag}', b'x', 1, -2) >= 0"),
    "leave shared memory": (("network", "seccomp"), "assert libc.shmget({key}, 4096, 0o1666) >= 0"),
    "raise its own limits": ((), "import resource; resource.setrlimit(7, (99999, 99999))"),
    "open a thousand files": ((), "[posix.open('/dev/null', 0) for _ in range(1000)]"),
    "write a file of 1 GB": (
        (),
        "import signal; signal.signal(25, signal.SIG_IGN); d = posix.open('big', 0o101);"
        " sum(posix.write(d, bytes(1 << 24)) for _ in range(64)) >> 30 or 1 / 0",
    ),
    "fill the disk with files": (
        ("files",),
        "[posix.write(posix.open(str(i), 0o101), bytes(1 << 22)) and posix.closerange(9, 60) for i in range(64)]",
    ),
    "start 10,000 threads": (
        (),
        "import threading; [threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(10000)]",
    ),
    "take 20 GB of memory": ((), "b = [bytearray(1 << 30) for _ in range(20)]"),
    "map 20 GB of memory": ((), "import mmap; m = mmap.mmap(-1, 20 << 30)"),
}


@pytest.fixture
def outside(monkeypatch):
    """A folder that everyone may write to, a file to harm, listeners, a secret; afterwards nothing may have changed."""
    tag = f"treediff-attack-{os.getpid()}-{time.monotonic_ns()}"
    folder = Path("/var/tmp") / tag
    folder.mkdir()
    folder.chmod(0o777)
    (folder / "kept").write_text("kept")
    (folder / "kept").chmod(0o666)
    reached = []
    listeners = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)]
    listeners[1].bind(str(folder / "socket"))
    os.chmod(folder / "socket", 0o777)
    listeners[2].bind(f"\0{tag}")
    port = listeners[0].getsockname()[1]
    listeners.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
    listeners[3].bind(("127.0.0.1", port))
    for listener in listeners:
        listener.setblocking(False)
        with contextlib.suppress(OSError):
            listener.listen()
    key = 0x7E000000 + os.getpid()
    yield {"out": folder, "port": port, "pid": os.getpid(), "tag": tag, "secret": "hunter2", "key": key}
    for listener in listeners:
        with contextlib.suppress(OSError):
            listener.accept() if listener is not listeners[3] else listener.recv(9)
            reached.append("a connection")
        listener.close()
    if sorted(p.name for p in folder.iterdir()) != ["kept", "socket"]:
        reached.append("the folder")
    if (folder / "kept").read_text() != "kept":
        reached.append("the file")
    for trace in (Path("/tmp") / tag, Path("/dev/shm") / tag):
        if trace.exists():
            reached.append(str(trace))
            trace.unlink()
    if f" {key} " in Path("/proc/sysvipc/shm").read_text():
        reached.append("shared memory")
    shutil.rmtree(folder)
    assert not reached


def needs(box: Sandbox, layers: tuple[str, ...]) -> None:
    if layers and all(box.layers[name].startswith("absent") for name in layers):
        pytest.skip(f"this machine has none of the layers {', '.join(layers)}: {box.layers}")


@pytest.mark.parametrize("which", ["full", "walled", "wrapped"])
@pytest.mark.parametrize("attack", MACHINE)
def test_no_way_out(attack, which, outside, request):
    box = request.getfixturevalue(which)
    layers, statement = MACHINE[attack]
    needs(box, layers)
    program = DO.format(statement)
    for name, value in outside.items():
        program = program.replace(f"{{{name}}}", str(value))
    status, reason = verdict(box, program)
    assert status != "pass", program
    assert not reason.startswith("syntax")
    assert "NameError" not in reason
    assert verdict(box, RIGHT) == ("pass", "")


def test_the_attacks_would_work_without_a_cage(tmp_path, outside, monkeypatch):
    """The file attacks are real: as a plain process each reaches its aim. (Then the traces are removed again.)"""
    for attack in ("write outside with io.open", "write outside with libc", "write outside through a link"):
        program = DO.format(MACHINE[attack][1].format(**outside))
        subprocess.run([sys.executable, "-c", program + "f(1)"], check=True, cwd=tmp_path)
        (outside["out"] / "a").unlink()


SWARM = {
    "fork bomb": "import posix\ndef f(x):\n  while True: posix.fork()",
    "daemon": """
import posix, time
def f(x):
    if posix.fork() == 0:
        posix.setsid()
        if posix.fork() == 0:
            while True: time.sleep(1)
        posix._exit(0)
    raise OSError
""",
    "child that outlives its parent": """
import posix, time
def f(x):
    if posix.fork() == 0:
        while True: time.sleep(1)
    posix._exit(0)
""",
}


@pytest.mark.parametrize("without", [(), ("seccomp",), ("seccomp", "processes"), (*LAYERS, "bubblewrap")])
@pytest.mark.parametrize("attack", SWARM)
def test_no_process_is_left(attack, without):
    """Also without the layers that forbid processes or end them with the first: the guardian finds them all."""
    if attack == "fork bomb" and "user" in without and os.geteuid() == 0:
        pytest.skip("without another user's id root may start any number of processes")
    with Sandbox(without) as box:
        assert verdict(box, SWARM[attack])[0] != "pass"
        time.sleep(0.05)
        assert verdict(box, RIGHT) == ("pass", "")
        deadline = time.monotonic() + 5
        while (left := descendants(box._process.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)  # guardians that are about to be reaped
        assert len(left) <= 1, left
    assert not [p for p in Path("/proc").iterdir() if p.name.isdigit() and "import runner" in command(p) and child(p)]


def test_the_guardian_without_pidfd(monkeypatch):
    """Old kernels and some containers have no pidfd_open; the guardian then looks every 10 ms."""

    def refuse(_):
        raise OSError("pidfd_open: Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    for nap, late in ((0.05, False), (9, True)):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            pid = os.fork()
            if pid == 0:
                time.sleep(nap)
                os._exit(7)
            report = runner._wait(pid, theirs, 0.5)
        assert report["late"] is late
        assert report["exit"] == (-9 if late else 7)


def descendants(pid: int) -> list[int]:
    """Live processes below `pid`, by /proc."""
    below = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and runner._parent(p) == pid]
    live = [p for p in below if b") Z " not in stat(p)]
    return live + [q for p in below for q in descendants(p)]


def stat(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_bytes()
    return b") Z "


def command(process: Path) -> str:
    with contextlib.suppress(OSError):
        return (process / "cmdline").read_bytes().decode(errors="replace")
    return ""


def child(process: Path) -> bool:
    """Whether the process has been adopted by init: what a daemon wants."""
    return runner._parent(process) == 1 and b") Z " not in stat(int(process.name))


def test_nothing_is_left_on_disk(tmp_path):
    """Neither with a scratch folder in memory nor on disk, whatever the program leaves in it; nor after a kill."""
    mess = RIGHT + (
        "import posix\nposix.mkdir('d')\nposix.symlink('/', 'd/l')\nposix.close(posix.open('d/a', 0o101))\n"
        "posix.chmod('d', 0)\n"
    )
    for without in ((), ("files", "user", "bubblewrap"), (*LAYERS, "bubblewrap")):
        with Sandbox(without, scratch=str(tmp_path)) as box:
            assert verdict(box, mess) == ("pass", ""), box.layers
            assert [list(p.iterdir()) for p in tmp_path.iterdir()] == [[]]
        assert not list(tmp_path.iterdir())
    box = Sandbox(scratch=str(tmp_path))
    box._control.close()  # as when the judge is killed
    box._process.wait(5)
    box._process.stderr.close()
    assert not list(tmp_path.iterdir())


def test_programs_do_not_meet(full):
    """Neither files nor modules nor the answer of one program are there for the next."""
    leave = "import sys\nsys.modules['left'] = 1\nopen_ = __import__('posix').open\nopen_('left', 0o101)\n" + RIGHT
    assert verdict(full, leave) == ("pass", "")
    find = "import posix, sys\ndef f(x):\n  assert 'left' in sys.modules or posix.listdir('.')\n  return x * x * 7 + 3"
    assert verdict(full, find)[1].startswith("exception: AssertionError")


def test_layers_are_told_and_can_be_left_off(full, bare):
    assert set(full.layers) == set(LAYERS) == set(bare.layers)
    assert all(how.startswith("absent: ") for how in bare.layers.values())
    with Sandbox(["landlock"]) as box:
        assert box.layers["landlock"] == "absent: switched off"
        assert box.layers["seccomp"] == full.layers["seccomp"]


def test_what_a_program_finds(full):
    """An empty environment, no arguments, standard streams that go nowhere, its own session, a folder to write to."""
    program = """
import os, posix, sys, pathlib
def f(x):
    assert dict(os.environ) == dict(OMP_NUM_THREADS='1')  # EvalPlus's own
    assert posix.getsid(0) == posix.getpid()
    assert posix.read(0, 9) == b'' and posix.write(1, b'x') == 1
    pathlib.Path('a').write_text('b')
    assert pathlib.Path('a').read_text() == 'b'
    assert sorted(sys.modules) and 'treediff' not in sys.modules
    return x * x * 7 + 3
"""
    assert verdict(full, program) == ("pass", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_without_root_too(tmp_path):
    """The same layers through a user namespace, for a user who is not root (skips if that user cannot run Python)."""
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "from treediff.sandbox.client import Sandbox\n"
        "with Sandbox() as box:\n"
        "    frames = list(box.run('def f(x): return x + 1', 'f', [[1]], [5], seconds=9))\n"
        "    print(json.dumps([box.layers, frames[0][1][1]]))\n"
    )
    root = str(Path(client.__file__).parents[2])

    def other() -> None:
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)

    try:
        done = subprocess.run(
            [sys.executable, "-c", code, root],
            preexec_fn=other,
            capture_output=True,
            text=True,
            cwd="/",
            env={"TMPDIR": "/tmp"},
            timeout=60,
        )
    except PermissionError:
        pytest.skip("another user cannot run this Python")
    if done.returncode and "Error" in done.stderr and "treediff" not in done.stderr:
        pytest.skip(f"another user cannot run this Python: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    layers, answer = json.loads(done.stdout)
    assert answer == 2
    assert layers["seccomp"] == "on" or layers["seccomp"].startswith("absent")


# --- the whole run survives -----------------------------------------------------------------------------------------


def test_a_run_full_of_attacks_survives(tmp_path, runs, monkeypatch):
    """Every attack in one file, among honest programs: the ledger is whole and only the honest pass."""
    monkeypatch.setattr(verdicts, "GIVE_UP", 2.0)
    deadly = {
        "hash bomb": """
import json, posix, struct
body = json.dumps([0.0, {'set': [i * (2 ** 61 - 1) for i in range(1, 500_000)]}]).replace(' ', '').encode()
body = b'o' + struct.pack('I', len(body)) + body
def f(x):
    for fd in range(3, 64):
        rest = body
        try:
            while rest: rest = rest[posix.write(fd, rest):]
        except OSError: pass
""",
        "fork bomb": SWARM["fork bomb"],
        **{k: v for k, v in VERDICT.items() if "time-out" not in k},
    }
    problem = {"prompt": "", "canonical_solution": RIGHT, "entry_point": "f", "atol": 0}
    problem |= {"base_input": INPUTS, "plus_input": [[13]]}
    data, samples, out = (tmp_path / name for name in ("data.jsonl", "samples.jsonl", "ledger.json"))
    programs = {}
    for i, attack in enumerate(deadly.values()):
        programs |= {f"TinyCode/{2 * i}": attack} | ({} if i % 4 else {f"TinyCode/{2 * i + 1}": RIGHT})
    data.write_text("".join(json.dumps({**problem, "task_id": task}) + "\n" for task in programs))
    samples.write_text("".join(json.dumps({"task_id": t, "solution": p}) + "\n" for t, p in programs.items()))
    ledger = score.score("tinycode", data, samples, out, workers=2)
    statuses = {task: (row["base"], row["plus"]) for task, row in ledger["tasks"].items()}
    for task, program in programs.items():
        assert (statuses[task] == ("pass", "pass")) == (program == RIGHT), (task, program, ledger["tasks"][task])
    assert "killed: the answer could not be compared" in {row["reason"] for row in ledger["tasks"].values()}


# --- data -----------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(), max_size=9),
    st.binary(max_size=9),
    st.decimals(allow_nan=False),
    st.fractions(),
)
HASHABLE = SCALARS | st.tuples(SCALARS, SCALARS) | st.frozensets(SCALARS, max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda s: (
        st.lists(s, max_size=4)
        | st.tuples(s, s)
        | st.sets(HASHABLE, max_size=3)
        | st.dictionaries(HASHABLE, s, max_size=3)
    ),
    max_leaves=12,
)


def form(x) -> str:
    """`x` with its types at every depth, sets in a fixed order; nan like nan."""
    if isinstance(x, dict):
        return f"{{{', '.join(form(k) + ':' + form(v) for k, v in x.items())}}}"
    if isinstance(x, (list, tuple, set, frozenset)):
        items = list(map(form, x))
        return f"{type(x).__name__}({', '.join(sorted(items) if isinstance(x, (set, frozenset)) else items)})"
    return f"{type(x).__name__} {x!r}"


@given(VALUES)
@settings(max_examples=400, deadline=None)
def test_plain_data_crosses_unchanged(value):
    assert form(unpack(json.loads(json.dumps(pack(value))))) == form(value)


def test_integers_too_long_to_print_cross_unchanged():
    for value in (10**5000, -(10**100_000), [1 << 63, -(1 << 63) - 1]):
        assert unpack(json.loads(json.dumps(pack(value)))) == value


Point = collections.namedtuple("Point", "x y")


@pytest.mark.parametrize(
    "value",
    [
        collections.Counter("abca"),
        collections.OrderedDict([(2, 1), (1, 2)]),
        collections.deque([1, (2,)]),
        bytearray(b"ab"),
        range(2, 9, 3),
        np.float64(1.5),
        np.int32(7),
        np.bool_(True),
        fractions.Fraction(1, 3),
        decimal.Decimal("1.10"),
    ],
)
def test_types_of_the_standard_library_keep_their_type(value):
    back = unpack(json.loads(json.dumps(pack(value))))
    assert back == value
    assert type(back) is type(value)


def test_arrays_cross_unchanged():
    for array in (np.arange(6).reshape(2, 3), np.array([1.5, np.nan]), np.array(["a", "bc"]), np.array(3 + 1j)):
        back = unpack(json.loads(json.dumps(pack(array))))
        assert back.dtype == array.dtype
        np.testing.assert_array_equal(back, array)


def test_subclasses_are_equal_by_content_and_of_another_type():
    """As EvalPlus has it: a named tuple equals a tuple, but only values of one type are compared within a tolerance."""
    for value, same in ((Point(1, 2), (1, 2)), (signal.SIGTERM, 15), (collections.defaultdict(int, a=1), {"a": 1})):
        back = unpack(json.loads(json.dumps(pack(value))))
        assert back == same
        assert type(back) is not type(same)
    assert unpack(pack({1: 2}.keys())) == {1}
    assert unpack(pack({1: 2}.items())) == {(1, 2)}
    assert unpack(pack({1: 2}.keys())) != [1]


@pytest.mark.parametrize("value", [object(), int, len, iter([]), (i for i in ()), {}.values(), np.array([object()])])
def test_other_values_equal_nothing(value):
    back = unpack(json.loads(json.dumps(pack(value))))
    assert isinstance(back, Opaque)
    assert back != value
    assert back != unpack(pack(value))


@pytest.mark.parametrize(
    "body",
    [
        {"pickle": "x"},
        {"tuple": 3},
        {},
        {"a": 1, "b": 2},
        {"int": "10; import os"},
        {"dict": [[[1], 2]]},
        {"like": ["object", 1]},
        {"like": ["int"]},
        {"ndarray": ["O", [1], [1]]},
        {"ndarray": ["<f8", [1 << 40], [1.0]]},
        {"ndarray": ["<U9999999", [1], ["a"]]},
        {"numpy": ["V8", 1]},
        {"bytes": "zz"},
        {"Decimal": []},
    ],
)
def test_forged_data_is_refused(body):
    with pytest.raises((ValueError, TypeError, StopIteration, decimal.InvalidOperation, ArithmeticError)):
        unpack(body)


def test_bulky_outputs_go_as_digests_that_agree_with_equality(monkeypatch):
    monkeypatch.setattr(values, "BULK", 5000)
    n = values.BULK + 1
    equal = [([1] * n, [True] * n), ([2.0] * n, [2] * n), (("a", 1) * n, ("a", 1.0) * n), ("x" * 4 * n, "x" * 4 * n)]
    equal += [({(i, 1.0) for i in range(n)}, {(i, 1) for i in reversed(range(n))})]
    equal += [([[1, 2.0]] * n, [[1.0, 2]] * n), (dict.fromkeys(range(n), 0), dict.fromkeys(reversed(range(n)), 0))]
    for a, b in equal:
        assert "digest" in abridged(a)
        assert (a == b) is (unpack(abridged(a)) == unpack(abridged(b))) is True
    different = [([1] * n, [1] * (n - 1) + [2]), ([1] * n, (1,) * n), (["1"] * n, [1] * n), ([1.5] * n, [1] * n)]
    different += [([float("nan")] * n, [float("nan")] * n)]
    for a, b in different:
        assert unpack(abridged(a)) != unpack(abridged(b))
    assert "digest" not in abridged([1] * values.BULK)


# --- the filter -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "header"), [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_numbers_of_system_calls(machine, header):
    """Against the kernel's own headers."""
    file = Path("/usr/include") / header
    if not file.is_file():
        pytest.skip(f"{file} is not installed")
    numbers = dict(re_defines(file.read_text()))
    column = isolation._ARCHES[machine][0]
    rows = [row.split() for row in isolation._DENIED.replace("\n", " ").split(",")]
    rows += [["clone", *isolation._CLONE], ["clone3", *isolation._CLONE3], ["tgkill", *isolation._TGKILL]]
    rows += [["prlimit64", *isolation._PRLIMIT]]
    for name, *ours in rows:
        assert numbers.get(name, "-") == str(ours[column]), name


def re_defines(text: str):
    import re

    return re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)


def test_threads_are_allowed(full):
    program = """
import threading
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(lambda i: x * x, range(7))) + 3
"""
    assert verdict(full, program) == ("pass", "")


def test_the_callers_threads_can_run_sandboxes_side_by_side():
    results = []

    def work() -> None:
        with Sandbox() as box:
            results.append([verdict(box, RIGHT) for _ in range(5)])

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[("pass", "")] * 5] * 3


def test_a_bubblewrap_that_is_refused_changes_nothing(tmp_path, monkeypatch):
    """As in a container: it is installed, and the kernel will not have it."""
    refused = tmp_path / "bwrap"
    refused.write_text("#!/bin/sh\necho 'bwrap: no permissions to create a namespace' >&2\nexit 1\n")
    refused.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with Sandbox(["namespaces"]) as box:
        assert box.layers["files"].endswith("bubblewrap: bwrap: no permissions to create a namespace")
        assert box.layers["seccomp"] == "on"
        assert [verdict(box, RIGHT) for _ in range(3)] == [("pass", "")] * 3
        assert verdict(box, "def f(x): return 0")[0] == "fail"
        scratch = Path(box._scratch)
    assert not scratch.exists()
