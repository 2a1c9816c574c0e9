"""The attacks of attacks.py come through nowhere, and right programs pass: with all layers, with few, as other users.

A process of its own each (siege.py), which writes what came through. By default a few configurations and a part of the
attacks; `pytest -m slow` takes every attack in every configuration that this machine can make.
"""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import treediff

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is Linux's")

LAYERS = {
    "all layers": {},
    "a plain container": {"refuse": ["namespaces"], "without": ["bubblewrap"]},
    "bubblewrap": {"without": ["namespaces"]},
    "no namespaces, no landlock": {"refuse": ["namespaces", "landlock"], "without": ["bubblewrap"]},
    "no seccomp": {"without": ["seccomp"]},
    "landlock alone": {"refuse": ["namespaces"], "without": ["bubblewrap", "seccomp"]},
    "no layer": {"without": ["namespaces", "bubblewrap", "landlock", "seccomp"]},
}
SHELL = {"": "", "a hard limit on the stack": "ulimit -Hs 8192", "umask 077": "umask 077", "umask 0777": "umask 0777"}
USERS = ("root", "an ordinary user") if os.geteuid() == 0 else ("an ordinary user",)
OTHER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", "--no-new-privs"]
# Shows the interpreter to users who may not enter a folder above it: that folder is replaced, in this process's mounts.
REACH = """
below=$1; shift; above=$below
while [ "$above" != / ]; do [ "$(stat -c %A "$above" | cut -c10)" = x ] || shut=$above; above=$(dirname "$above"); done
if [ "$shut" ]; then
    kept=$(mktemp -d) && mount --bind "$below" "$kept" && mount -t tmpfs -o mode=755 none "$shut"
    mkdir -p "$below" && mount --bind "$kept" "$below" && umount "$kept" && rmdir "$kept"
fi
exec "$@"
"""


def besiege(order: dict, user: str, shell: str) -> dict:
    """What siege.py writes, as that user, after that shell command."""
    root = Path(treediff.__file__).parents[1]
    command = [sys.executable, str(Path(__file__).with_name("siege.py")), json.dumps(order)]
    if shell:
        command = ["sh", "-c", f'{shell}; exec "$@"', "sh", *command]
    if user != "root" and os.geteuid() == 0:
        command = ["unshare", "-m", "sh", "-c", REACH, "sh", sys.base_prefix, *OTHER, *command]
    environment = {k: v for k, v in os.environ.items() if k in ("PATH", "LANG")} | {"PYTHONPATH": str(root)}
    environment |= {"TMPDIR": "/tmp", "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment, check=False)
    if done.returncode and "treediff" not in done.stderr and "siege" not in done.stderr:
        pytest.skip(f"{user} cannot run this Python: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@functools.cache
def at_best(user: str, layers: str) -> dict:
    """The layers that such a user has in a plain shell."""
    return besiege({**LAYERS[layers], "only": ["a right program"]}, user, "")["layers"]


def hold(layers: str, user: str, shell: str, **part) -> None:
    if layers == "bubblewrap" and not at_best(user, layers)["files"].startswith("bubblewrap"):
        pytest.skip(f"bubblewrap does not work here: {at_best(user, layers)['files']}")
    found = besiege({**LAYERS[layers], **part}, user, SHELL[shell])
    assert found["came through"] == {}
    assert found["ran"] >= 10
    if shell:  # limits and masks are the caller's, and no reason to lose a layer
        assert found["layers"] == at_best(user, layers)


@pytest.mark.parametrize(
    ("layers", "user", "shell", "every"),
    [
        ("all layers", USERS[0], "", 2),
        ("a plain container", USERS[-1], "", 3),
        ("no layer", USERS[0], "", 8),
        ("all layers", USERS[0], "a hard limit on the stack", 12),
        ("all layers", USERS[0], "umask 077", 12),
    ],
)
def test_no_attack_comes_through(layers, user, shell, every):
    hold(layers, user, shell, every=every)


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "user", "shell"), [*itertools.product(LAYERS, USERS, SHELL)])
def test_no_attack_comes_through_in_any_configuration(layers, user, shell):
    hold(layers, user, shell)
