"""The sandbox itself: what it tells, what it leaves, how it ends; and the data that crosses its pipes.

Attacks are in attacks.py, and run by test_attacks.py.
"""

import collections
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
from attacks import ATTACKS, EXPECTED, INPUTS, RIGHT
from hypothesis import given, settings
from hypothesis import strategies as st
from siege import below, oracle

from treediff.sandbox import client, isolation, runner, values
from treediff.sandbox.client import Sandbox
from treediff.sandbox.isolation import LAYERS
from treediff.sandbox.values import Opaque, abridged, pack, unpack
from treediff.scoring import score, verdicts

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")

VERDICT = {a.name: a.source for a in ATTACKS if a.kind == "verdict"}


def verdict(box: Sandbox, program: str) -> tuple[str, str]:
    return verdicts._examine(box, program, oracle(INPUTS, EXPECTED), "base")


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


@pytest.fixture(autouse=True)
def brisk(monkeypatch):
    """Time limits short enough to test them."""
    monkeypatch.setattr(verdicts, "MIN_SECONDS", 0.3)
    monkeypatch.setattr(verdicts, "SLACK", 0.5)
    monkeypatch.setattr(verdicts, "GRACE", 0.5)


def test_a_program_that_must_be_killed_is_a_time_out(full):
    """As in EvalPlus: its own timer makes a failure; what outlasts that is killed by our clock, which is a time-out."""
    reason = "time-out: base test 0: f(2) held out against 0.3 s"
    assert verdict(full, VERDICT["time-out ignored"]) == ("timeout", reason)
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
    tests = {**oracle([[[1, 2]]], [-0.5]), "entry": "find_zero", "atol": 1e-4}
    assert verdicts._examine(full, "def find_zero(xs):\n  xs[:] = [0, 0]\n  return 9", tests, "base")[0] == "fail"
    assert verdicts._examine(full, "def find_zero(xs): return -0.5", tests, "base") == ("pass", "")


def test_the_supervisor_without_pidfd(monkeypatch):
    """Old kernels and some containers have no pidfd_open; the supervisor then looks every 10 ms."""

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
            report = runner._wait(pid, theirs, [], 0.5)
        assert report["late"] is late
        assert report["exit"] == (-9 if late else 7)


def test_nothing_is_left_on_disk_after_a_kill(tmp_path):
    box = Sandbox(scratch=str(tmp_path))
    box._control.close()  # as when the caller is killed
    box._process.wait(5)
    box._process.stderr.close()
    assert not list(tmp_path.iterdir())


DETACHED = """
import ctypes, time
def f(x):
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # not to end with the process that started it
    while x == 5: time.sleep(0.01)
    return x * x * 7 + 3
"""


@pytest.mark.parametrize(
    ("whom", "sent", "without"),
    [
        ("supervisor", signal.SIGKILL, ()),
        ("supervisor", signal.SIGKILL, ("processes", "seccomp")),
        ("supervisor", signal.SIGSTOP, ()),
        ("runner", signal.SIGSTOP, (*LAYERS, "bubblewrap")),
        ("runner", signal.SIGKILL, ("processes", "seccomp")),
    ],
)
def test_a_process_of_the_sandbox_that_ends_or_hangs_is_one_failed_program(whom, sent, without, tmp_path, monkeypatch):
    """Killed or stopped while a program runs: that program fails, in time; the next one passes; nothing is left."""
    monkeypatch.setattr(client, "SETUP", 2.0)
    monkeypatch.setattr(client, "PATIENCE", 1)
    with Sandbox(without, scratch=str(tmp_path)) as box:
        first = box._process

        def strike() -> None:
            while len(processes := below(first.pid)) < 2:
                time.sleep(0.01)
            time.sleep(0.3)
            os.kill(processes[0] if whom == "supervisor" else first.pid, sent)

        thread = threading.Thread(target=strike)
        thread.start()
        start = time.monotonic()
        monkeypatch.setattr(verdicts, "MIN_SECONDS", 1.5)
        status, _ = verdict(box, DETACHED)
        thread.join()
        assert status != "pass"
        assert time.monotonic() - start < 60
        assert verdict(box, RIGHT) == ("pass", "")
        assert verdict(box, RIGHT) == ("pass", "")
        assert first.poll() is not None or not below(first.pid)
    assert not list(tmp_path.iterdir())


def test_the_runner_is_stopped_between_programs(monkeypatch):
    """As by a program that had no layer to keep it from that: another runner takes its place, no program fails."""
    monkeypatch.setattr(client, "SETUP", 1.0)
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        with Sandbox() as box:
            assert verdict(box, RIGHT) == ("pass", "")
            os.kill(box._process.pid, sent)
            assert verdict(box, RIGHT) == ("pass", "")


def test_no_layers_are_left_off_because_nothing_runs_at_all(monkeypatch, tmp_path):
    """Where not even a plain program runs, that is told, rather than every layer given up."""
    environment = {**os.environ, "PYTHONPATH": str(Path(client.__file__).parents[2])}
    code = "from treediff.sandbox.client import Sandbox\nSandbox()"
    limited = ["sh", "-c", 'ulimit -n 12; exec "$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(limited, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 1
    assert "client.Broken: " in done.stderr.splitlines()[-1]


def test_the_kit_in_the_packages_is_out_of_reach(tmp_path):
    """Installed as the container has it, neither its code nor data beside it can be read."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [site] = tmp_path.glob("venv/lib/python*/site-packages")
    shutil.copytree(Path(client.__file__).parents[1], site / "treediff", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "solutions.py").write_text("f = lambda x: x * x * 7 + 3")
    (tmp_path / "venv" / "runs").mkdir()
    (tmp_path / "venv" / "runs" / "oracle").write_text("31")
    (site / "others.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    code = """
import json, sys
from treediff.sandbox.client import Sandbox
import treediff
assert 'venv' in treediff.__file__
for i, program in enumerate(sys.argv[1:]):
    for without in ((), ('namespaces', 'bubblewrap')):
        with Sandbox(without) as box:
            if not all(box.layers[n].startswith('absent') for n in ('files', 'landlock')):
                print(i, [f.kind.decode() for f in box.run(program, 'f', [[2]], [5], seconds=9)][-1])
"""
    programs = [
        "import treediff.data.tinycode\ndef f(x): return 31",
        "def f(x):\n  import solutions\n  return solutions.f(x)",
        f"import posix\ndef f(x): return posix.read(posix.open('{site}/treediff/data/tinycode.py', 0), 9)",
        f"import posix\ndef f(x): return posix.read(posix.open('{tmp_path}/venv/runs/oracle', 0), 9)",
        "import numpy\ndef f(x): return 31",
    ]
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-c", code, *programs], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    if not lines:
        pytest.skip("this machine has neither the layer files nor landlock")
    assert {line for line in lines if line.endswith("o")} == {line for line in lines if line.startswith("4 ")}, lines


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
    assert sorted(sys.modules) and not sys.modules.get('treediff')
    return x * x * 7 + 3
"""
    assert verdict(full, program) == ("pass", "")


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
        "fork bomb": next(a.source for a in ATTACKS if a.name == "fork bomb"),
        **{k: v for k, v in [*VERDICT.items()][::3] if "time-out" not in k},
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
    text, pair, number = type("S", (str,), {}), collections.namedtuple("P", "a b"), decimal.Decimal
    equal += [([text("a")] * n, ["a"] * n), (text("xyz!" * n), "xyz!" * n), ([pair(1, 2)] * n, [(1, 2)] * n)]
    equal += [(collections.Counter(range(n)), dict.fromkeys(range(n), 1)), ([{1, 2}] * n, [{2, 1.0}] * n)]
    equal += [([{"a": 1, "b": True}] * n, [{"b": 1, "a": 1.0}] * n), ([number("0.5")] * n, [0.5] * n)]
    equal += [([np.int64(3)] * n, [3] * n), (frozenset(range(n)), set(range(n))), (bytearray(4 * n), bytes(4 * n))]
    equal += [([[1, 2.0]] * n, [[1.0, 2]] * n), (dict.fromkeys(range(n), 0), dict.fromkeys(reversed(range(n)), 0))]
    for a, b in equal:
        assert "digest" in abridged(a)
        assert (a == b) is (unpack(abridged(a)) == unpack(abridged(b))) is True
    different = [([1] * n, [1] * (n - 1) + [2]), ([1] * n, (1,) * n), (["1"] * n, [1] * n), ([1.5] * n, [1] * n)]
    different += [([float("nan")] * n, [float("nan")] * n), ([object()] * n, [object()] * n)]
    different += [(dict.fromkeys(range(n), 1), dict.fromkeys(range(n), 2)), ([{1: 1}] * n, [{1: 2}] * n)]
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
    rows = [row.split() for row in isolation._ALLOWED.replace("\n", " ").split(",")]
    for name in ("clone", "clone3", "tgkill", "open", "openat", "creat", "socketpair", "fcntl", "ioctl", "prctl"):
        rows.append([name, *("-" if n is None else n for n in getattr(isolation, f"_{name.upper()}"))])
    rows.append(["prlimit64", *isolation._PRLIMIT])
    for name, *ours in rows:
        theirs = numbers.get(name, numbers.get("fstatat" if name == "newfstatat" else name, "-"))
        assert theirs == str(ours[column]), name


def re_defines(text: str):
    import re

    return re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)


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
