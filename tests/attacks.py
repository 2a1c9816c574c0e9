"""Attacks on the sandbox and on verdicts, and right but odd programs, as data: name, kind, source, layers.

`ATTACKS` holds them all. By kind:

    verdict     wants a pass for a wrong answer, or for a right one too late. Run against `INPUTS`.
    tolerance   the same, against `FLOATS`, where EvalPlus compares within a tolerance.
    machine     does something to the machine, and returns the right answer only where that worked: a pass is a breach.
    mess        passes, or ends its process, and leaves something behind: nothing of it may last.
    right       an honest program: it must pass.

`layers`: for an attack, those of which any one must stop it (none named: it must fail with no layer at all); for a
right program, those that it needs in order to pass. Words in braces ({out}, {pid}, ...) are what siege.py sets up.
"""

from typing import NamedTuple

# f(x) = x * x * 7 + 3, which no attacker can guess from the inputs alone
INPUTS, EXPECTED = [[2], [5], [11]], [31, 178, 850]
RIGHT = "def f(x): return x * x * 7 + 3\n"
FLOATS = [[[2.0, 4.0, 3.0]], [[7.0, 1.0]]], [[0.0, 1.0, 0.5], [1.0, 0.0]]


class Attack(NamedTuple):
    name: str
    kind: str
    source: str
    layers: tuple[str, ...] = ()


# --- attacks on the verdict ------------------------------------------------------------------------------------------

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
    "expected searched in the runner's memory": """
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
    "time-out switched off in the first test": """
import signal, time
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0)
    if x == 2: time.sleep(1.2)
    return x * x * 7 + 3
""",
    "time-out switched off in the second test": """
import signal, time
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0)
    if x == 5: time.sleep(1.0)
    return x * x * 7 + 3
""",
    "time-out and an answer in drips": """
import posix, struct, time
def f(x):
    drip = b'[0.0, 31' + b' ' * 2000 + b']'
    first = b'o' + struct.pack('I', len(drip)) + drip
    rest = b''.join(b'o' + struct.pack('I', len(b)) + b for b in (b'[0.0, 178]', b'[0.0, 850]'))
    for fd in range(3, 64):
        try:
            for i in range(len(first)):
                posix.write(fd, first[i : i + 1])
                time.sleep(0.0005)
            posix.write(fd, rest)
        except OSError: pass
    posix._exit(0)
""",
    "time-out and many threads, to seem to wait for a core": """
import ctypes, signal, threading, time
libc, spin = ctypes.CDLL(None), b'x' * (1 << 24)
def waste():
    while True: libc.memchr(spin, 0, len(spin) - 1)
def f(x):
    signal.setitimer(signal.ITIMER_REAL, 0)
    if x == 2:
        for _ in range(40): threading.Thread(target=waste, daemon=True).start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end: libc.memchr(spin, 0, len(spin) - 1)
    return x * x * 7 + 3
""",
    "EvalPlus's oracles in memory": """
import gc, sys
def f(x):
    assert any('oracle' in name for name in sys.modules) or any(
        getattr(v, '__name__', '') == '_surface_Area' for v in gc.get_objects() if type(v) is type(f))
    return x * x * 7 + 3
""",
    "the tests before they come": """
import gc
seen = [v for v in gc.get_objects() if type(v) is list and [11] in v]
def f(x):
    assert seen
    return x * x * 7 + 3
""",
}

TOLERANCE = {
    "empty arrays that broadcast": "import numpy\ndef f(x): return [[numpy.empty((0, 1))]] * len(x)",
    "one empty array": "import numpy\ndef f(x): return numpy.empty((0, len(x)))",
    "empty arrays of two dimensions": "import numpy\ndef f(x): return [numpy.empty((0, len(x)))] * len(x)",
    "empty lists": "def f(x): return [[[] for _ in x]]",
    "tuples of empty arrays": "import numpy\ndef f(x): return [(numpy.empty((0, 1)),)] * len(x)",
    "a subclass of list": "class L(list): pass\ndef f(x): return L([0.0] * len(x))",
    "numbers that are none": "def f(x): return [float('nan')] * len(x)",
    "infinite": "def f(x): return [float('inf')] * len(x)",
    "objects": "import numpy\ndef f(x): return [numpy.array([None] * len(x))] * len(x)",
    "arrays that broadcast": "import numpy\ndef f(x): return [numpy.array([0.0])] * len(x)",
}

# --- attacks on the machine ------------------------------------------------------------------------------------------

POSIX = "import ctypes, os, posix, socket, struct, sys, time\nlibc = ctypes.CDLL(None, use_errno=True)\n"
DO = POSIX + "def f(x):\n    %s\n    return x * x * 7 + 3\n"
FILES = ("files", "landlock")
# name: (layers of which one is enough, statement of `f`, which raises where the attack fails)
MACHINE = {
    "write outside with io.open": (FILES, "import io; io.open('{out}/a', 'w').write('x')"),
    "write outside with pathlib": (FILES, "import pathlib; pathlib.Path('{out}/a').write_text('x')"),
    "write outside with os.open": (FILES, "posix.open('{out}/a', posix.O_CREAT | posix.O_WRONLY)"),
    "write outside with libc": (FILES, "assert libc.open(b'{out}/a', 0o101, 0o666) >= 0"),
    "write outside through a link": (FILES, "posix.symlink('{out}', 'l'); posix.open('l/a', posix.O_CREAT)"),
    "write outside through ..": (FILES, "posix.open('..' + '/..' * 20 + '{out}/a', posix.O_CREAT)"),
    "write outside through /proc": (FILES, "posix.open('/proc/self/root{out}/a', posix.O_CREAT)"),
    "write outside through the runner's root": (
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
    "leave a file in /dev/shm": (FILES, "posix.open('/dev/shm/{tag}', posix.O_CREAT | posix.O_WRONLY); 1 / 0"),
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
    "addresses of the machine": (
        ("network", "seccomp"),
        """import fcntl
    def addresses(fd):
        b = ctypes.create_string_buffer(4000)
        try: return struct.unpack('i', fcntl.ioctl(fd, 0x8912, struct.pack('iiQ', 4000, 0, ctypes.addressof(b)))[:4])[0]
        except OSError: return 0
    assert any(addresses(fd) for fd in [*range(64), socket.socketpair()[0].fileno()])""",
    ),
    "addresses of the machine by any descriptor that it was given": (
        (),
        """import fcntl
    def addresses(fd):
        b = ctypes.create_string_buffer(4000)
        try: return struct.unpack('i', fcntl.ioctl(fd, 0x8912, struct.pack('iiQ', 4000, 0, ctypes.addressof(b)))[:4])[0]
        except OSError: return 0
    assert any(addresses(fd) for fd in range(64))""",
    ),
    "memory outside its address space": (
        ("seccomp",),
        "d = os.memfd_create('m'); assert sum(posix.pwrite(d, bytes(1 << 20), i << 20) for i in range(60))",
    ),
    "the machine's AIO contexts": (
        ("seccomp",),
        "p = ctypes.c_ulong(); assert libc.syscall(206, 64, ctypes.byref(p)) == 0",
    ),
    "survive its supervisor": (("seccomp",), "assert libc.prctl(1, 0, 0, 0, 0) == 0"),
    "kill the tests by a descriptor's signal": (
        ("processes", "seccomp"),
        "import fcntl; r, w = posix.pipe(); fcntl.fcntl(r, 10, 9); fcntl.fcntl(r, 8, {victim})"
        "; fcntl.fcntl(r, 4, 0o20000 | fcntl.fcntl(r, 3)); posix.write(w, b'x')",
    ),
    "stop the tests by a descriptor's signal": (
        ("processes", "seccomp"),
        "import fcntl; r, w = posix.pipe(); fcntl.fcntl(r, 10, 19); fcntl.fcntl(r, 15, struct.pack('ii', 1, {victim}))"
        "; fcntl.fcntl(r, 4, 0o20000 | fcntl.fcntl(r, 3)); posix.write(w, b'x')",
    ),
    "signal the tests by ioctl": (
        ("processes", "seccomp"),
        "import fcntl; [fcntl.ioctl(socket.socketpair()[0], c, struct.pack('i', {victim})) for c in (0x8901, 0x8902)]",
    ),
    "watch a folder by a descriptor's signal": (
        ("files", "seccomp"),
        "import fcntl; fcntl.fcntl(posix.open('{out}', posix.O_RDONLY), 1026, 0x80000002)",
    ),
    "change the rights of a file": (("files", "seccomp"), "posix.chmod('{out}/kept', 0o4777)"),
    "change the rights of a file by its descriptor": (
        ("files", "landlock", "seccomp"),
        "posix.fchmod(posix.open('{out}/kept', 0), 0o4777)",
    ),
    "change the rights of a file by a raw call": (
        ("files", "seccomp"),
        "assert libc.syscall(452, -100, b'{out}/kept', 0o4777, 0) == 0 or libc.syscall(268, -100, b'{out}/kept', 2047)"
        " == 0",
    ),
    "change the owner of a file": (("files", "seccomp"), "posix.chown('{out}/kept', -1, posix.getgid())"),
    "change the times of a file": (("files", "seccomp"), "posix.utime('{out}/kept', None)"),
    "change the attributes of a file": (("files", "seccomp"), "posix.setxattr('{out}/kept', 'user.a', b'x')"),
    "change the rights of the standard library": (("files", "user", "seccomp"), "posix.chmod(os.__file__, 0o666)"),
    "a set-uid file": (
        ("seccomp",),
        "posix.umask(0); posix.open('s', posix.O_CREAT | posix.O_WRONLY, 0o4755)"
        "; assert posix.stat('s').st_mode & 0o6000",
    ),
    "a set-uid file by chmod": (
        ("seccomp",),
        "posix.open('s', posix.O_CREAT | posix.O_WRONLY, 0o755); posix.chmod('s', 0o6755)"
        "; assert posix.stat('s').st_mode & 0o6000",
    ),
    "a set-uid file by mknod": (("seccomp",), "posix.umask(0); posix.mknod('s', 0o104755)"),
    "a set-gid folder": (
        ("seccomp",),
        "posix.umask(0); posix.mkdir('d', 0o2777); assert posix.stat('d').st_mode & 0o6000",
    ),
    "a datagram to a named socket": (
        ("files", "seccomp"),
        "s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]; s.sendto(b'x', '{out}/datagrams')",
    ),
    "a descriptor to a named socket": (
        ("files", "seccomp"),
        "s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]"
        "; s.sendmsg([b'x'], [(1, 1, struct.pack('i', 0))], 0, '{out}/datagrams')",
    ),
    "a datagram to an abstract socket": (
        ("network", "landlock", "seccomp"),
        "s = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]; s.sendto(b'x', '\\0{tag}-datagrams')",
    ),
    "look at a file": (("files",), "posix.stat('{out}/kept')"),
    "watch a folder": (
        ("files", "seccomp"),
        "assert libc.inotify_add_watch(libc.inotify_init1(0), b'{out}', 2) >= 0",
    ),
    "read a file below sys.prefix": (FILES, "posix.read(posix.open('{below}', 0), 9)"),
    "import EvalPlus's oracles": (FILES, "import evalplus.eval._special_oracle"),
    "import the kit": (FILES, "import treediff.data.tinycode"),
    "read the kit": (FILES, "posix.read(posix.open('{kit}/data/tinycode.py', 0), 9)"),
    "read another package": (FILES, "posix.read(posix.open(posix.fspath('{site}/evalplus/__init__.py'), 0), 9)"),
    "list the packages' folder": (("files", "landlock"), "assert 'evalplus' in posix.listdir('{site}')"),
    "chroot by a descriptor": ((), "assert libc.syscall(161, b'/') == 0"),
    "enter another's namespaces": ((), "assert libc.setns(posix.open('/proc/{pid}/ns/net', 0), 0) == 0"),
    "trace by process_madvise": (("seccomp",), "assert libc.syscall(434, posix.getpid(), 0) >= 0"),
    "change the clock": ((), "time.clock_settime(time.CLOCK_REALTIME, time.time())"),
    "real-time priority": ((), "posix.sched_setscheduler(0, posix.SCHED_FIFO, posix.sched_param(1))"),
    "a device": ((), "posix.mknod('d', 0o20666, posix.makedev(1, 1)); posix.open('d', 0)"),
    "read the kernel's log": (("user", "seccomp"), "assert libc.klogctl(3, ctypes.create_string_buffer(99), 99) >= 0"),
    "filter its own calls": (("seccomp",), "assert libc.prctl(22, 2, 0, 0, 0) == 0 or ctypes.get_errno() == 14"),
    "a message queue": (("network", "seccomp"), "assert libc.msgget({key}, 0o1666) >= 0"),
    "many pipes full of memory": (
        (),
        "import fcntl; p = [posix.pipe() for _ in range(28)]; [fcntl.fcntl(w, 1031, 1 << 20) for _, w in p]"
        "; assert sum(posix.write(w, bytes(1 << 20)) for _, w in p) > 27 << 20; 1 / 0",
    ),
}


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

# name: (layers, program). They pass or end; afterwards nothing of them is there, and the next program has its space.
DEEP = "import posix\nfor _ in range({n}):\n    posix.mkdir('d', 0o700)\n    posix.chdir('d')\n"
MESS = {
    "1,500 nested folders, then an end": DEEP.format(n=1500) + "posix._exit(0)\ndef f(x): return 0",
    "4,000 nested folders, then a pass": DEEP.format(n=4000) + RIGHT,
    "nested folders without rights": DEEP.format(n=300).replace("0o700", "0o300") + RIGHT,
    "64 MiB of files": """
import posix
d = posix.open('big', 0o101)
try:
    while posix.write(d, bytes(1 << 22)): pass
except OSError: pass
"""
    + RIGHT,
    "5,000 files": """
import posix
try:
    for i in range(5000): posix.close(posix.open(str(i), 0o101))
except OSError: pass
"""
    + RIGHT,
    "names that are not text": """
import posix
for name in (b'\\xff\\xfe', b'a\\nb', b'-rf', b'*', b'n' * 255, b' ', b'\\\\'): posix.close(posix.open(name, 0o101))
"""
    + RIGHT,
    "links and loops": """
import posix
posix.symlink('/', 'root'); posix.symlink('..', 'up'); posix.symlink('loop', 'loop'); posix.symlink('{out}', 'out')
posix.mkdir('d'); posix.symlink('..', 'd/up')
"""
    + RIGHT,
    "a folder that nobody may read": "import posix\nposix.mkdir('d')\nposix.close(posix.open('d/a', 0o101))\n"
    "posix.mkdir('d/e', 0)\nposix.umask(0o777)\nposix.mkdir('e')\n" + RIGHT,
    **SWARM,
}

RIGHT_BUT_ODD = {
    "a right program": ((), RIGHT),
    "pandas": ((), "import pandas\ndef f(x): return int(pandas.Series([x * x] * 7).sum()) + 3"),
    "rich": ((), "import rich, rich.text\ndef f(x): return x * x * 7 + len(rich.text.Text('abc'))"),
    "numpy": ((), "import numpy as np\ndef f(x): return int(np.dot([x] * 7, [x] * 7)) + 3"),
    "numpy's linear algebra": (
        (),
        "import numpy as np\ndef f(x): return round(np.linalg.det(np.eye(3) * x)) * 0 + x * x * 7 + 3",
    ),
    "sympy": ((), "import sympy\ndef f(x): return int(sympy.Integer(x) ** 2 * 7 + 3)"),
    "scipy": ((), "import scipy.special\ndef f(x): return x * x * 7 + int(scipy.special.comb(3, 1, exact=True))"),
    "networkx": ((), "import networkx\ndef f(x): return x * x * 7 + networkx.path_graph(3).number_of_nodes()"),
    "pytest": ((), "import pytest\ndef f(x): return x * x * 7 + 3"),
    "gettempdir": ((), "import tempfile\nassert tempfile.gettempdir()\n" + RIGHT),
    "TemporaryFile": (
        (),
        """
import tempfile
def f(x):
    with tempfile.TemporaryFile('w+') as file:
        file.write(str(x * x * 7 + 3))
        file.seek(0)
        return int(file.read())
""",
    ),
    "NamedTemporaryFile": (
        (),
        """
import tempfile
def f(x):
    with tempfile.NamedTemporaryFile('w+') as file:
        file.write(str(x * x * 7 + 3))
        file.seek(0)
        return int(file.read())
""",
    ),
    "mkstemp": (
        (),
        "import os, tempfile\ndef f(x):\n  fd, name = tempfile.mkstemp()\n  os.close(fd)\n  return x * x * 7 + 3",
    ),
    "ThreadPool": (
        ("files",),
        "from multiprocessing.pool import ThreadPool\ndef f(x):\n  with ThreadPool(4) as p:"
        " return sum(p.map(lambda i: x * x, range(7))) + 3",
    ),
    "multiprocessing.dummy": (
        ("files",),
        "from multiprocessing.dummy import Pool\ndef f(x):\n  with Pool(2) as p:"
        " return sum(p.map(lambda i: x * x, range(7))) + 3",
    ),
    "multiprocessing.Lock": (
        ("files",),
        "from multiprocessing import Lock\ndef f(x):\n  with Lock(): return x * x * 7 + 3",
    ),
    "threads": (
        (),
        """
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as pool: return sum(pool.map(lambda i: x * x, range(7))) + 3
""",
    ),
    "asyncio": (
        (),
        """
import asyncio
async def g(x):
    await asyncio.sleep(0.001)
    return x * x
async def h(x): return sum(await asyncio.gather(*[g(x) for _ in range(7)])) + 3
def f(x): return asyncio.run(h(x))
""",
    ),
    "asyncio in threads": (
        (),
        "import asyncio\ndef f(x): return asyncio.run(asyncio.to_thread(lambda: x * x * 7 + 3))",
    ),
    "sqlite": (
        (),
        "import sqlite3\ndef f(x): return sqlite3.connect(':memory:').execute(f'select {x}*{x}*7+3').fetchone()[0]",
    ),
    "files in its folder": (
        (),
        """
import io, pathlib
def f(x):
    pathlib.Path('a.txt').write_text(str(x))
    with io.open('a.txt') as file: return int(file.read()) ** 2 * 7 + 3
""",
    ),
    "recursion": (
        (),
        "import sys\nsys.setrecursionlimit(10 ** 6)\ndef g(n): return g(n - 1) + 1 if n else 0\n"
        "def f(x): return x * x * 7 + g(3000) - 2997",
    ),
    "much output": ((), "def f(x):\n  for _ in range(1000): print('x' * 1000)\n  return x * x * 7 + 3"),
    "modules of the standard library": (
        (),
        """
import ast, bisect, calendar, cmath, collections, copy, csv, ctypes, datetime, decimal, difflib, enum, fractions
import functools, hashlib, heapq, html, inspect, io, itertools, json, locale, logging, math, operator, os, pathlib
import pickle, pprint, queue, random, re, secrets, shutil, signal, socket, sqlite3, ssl, statistics, string, struct
import subprocess, sys, tempfile, textwrap, threading, time, timeit, tokenize, traceback, types, typing, unicodedata
import unittest, unittest.mock, urllib.parse, uuid, warnings, weakref, xml.etree.ElementTree, zlib, zoneinfo, bz2, lzma
import email.message, http.client, multiprocessing, concurrent.futures, contextlib, dataclasses, graphlib, curses, dis
def f(x): return x * x * 7 + 3
""",
    ),
    "time zones": (
        (),
        "import datetime, zoneinfo\ndef f(x): return x * x * 7 + 3 + 0 * datetime.datetime(2020, 1, 1,"
        " tzinfo=zoneinfo.ZoneInfo('Europe/Berlin')).day",
    ),
    "signals": (
        (),
        "import signal\ndef f(x):\n  r = []\n  signal.signal(signal.SIGUSR1, lambda *a: r.append(x * x * 7))\n"
        "  signal.raise_signal(signal.SIGUSR1)\n  return r[0] + 3",
    ),
    "a subprocess's constants": ((), "import subprocess\ndef f(x): return x * x * 7 + 3 * (subprocess.PIPE == -1)"),
    "a unit test": (
        (),
        "import unittest\nclass T(unittest.TestCase):\n  def test(self): self.assertEqual(1, 1)\n" + RIGHT,
    ),
    "wait for children that it does not have": (
        (),
        "import os\ndef f(x):\n  try: os.wait()\n  except ChildProcessError: return x * x * 7 + 3",
    ),
    "random numbers": (
        (),
        "import random, secrets, os\ndef f(x):\n  os.urandom(9)\n  random.seed(1)\n  return x * x * 7 + 3",
    ),
    "half a limit of sleep": ((), "import time\ndef f(x):\n  time.sleep(0.1)\n  return x * x * 7 + 3"),
}


ATTACKS = [
    *(Attack(name, "verdict", source) for name, source in VERDICT.items()),
    *(Attack(name, "tolerance", source) for name, source in TOLERANCE.items()),
    *(Attack(name, "machine", DO % statement, layers) for name, (layers, statement) in MACHINE.items()),
    *(Attack(name, "mess", source) for name, source in MESS.items()),
    *(Attack(name, "right", source, layers) for name, (layers, source) in RIGHT_BUT_ODD.items()),
]
