"""The locks, the container's files and the Makefile agree with pyproject.toml and with what is installed."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from treediff.cli import COMMANDS
from treediff.masking.languages import LANGUAGES

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ("cpu", "cuda")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(r) for r in PROJECT["dependencies"] + EXTRAS["languages"] + EXTRAS["dev"]]
WANTED = [r for r in WANTED if r.name != "treediff"]  # an extra that brings another one


def pins(name: str) -> dict[str, str]:
    """Version by package. A line that is no plain pin (an address, a path, a build of one machine) fails."""
    lines = (ROOT / "docker" / f"{name}.lock").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.]*)", line) for line in lines]
    assert all(found), [line for line, pin in zip(lines, found, strict=True) if not pin]
    assert len({pin[1] for pin in found}) == len(lines)
    return {pin[1]: pin[2] for pin in found}


def installed(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:  # of another Python or machine
        return None


def needed(requirement: Requirement, python: str, seen: dict[str, set[str]]) -> None:
    """Into `seen`: every package (with its extras) that `requirement` leads to on `python`, by installed metadata."""
    name = canonicalize_name(requirement.name)
    if seen.setdefault(name, set()) >= (extras := {"", *requirement.extras}):
        return
    seen[name] |= extras
    found = installed(name)
    for extra in extras:
        for line in (found and found.requires) or []:
            ask = Requirement(line)
            if not ask.marker or ask.marker.evaluate({"python_version": python, "extra": extra}):
                needed(ask, python, seen)


@pytest.mark.parametrize("lock", LOCKS)
def test_the_lock_satisfies_pyproject(lock):
    have = pins(lock)
    wrong = [str(r) for r in WANTED if have.get(canonicalize_name(r.name), "") not in r.specifier]
    assert not wrong


def test_the_languages_extra_is_what_the_tables_name():

    grammars = {canonicalize_name(table.grammar) for table in LANGUAGES.values()}
    assert {Requirement(r).name for r in EXTRAS["languages"]} == grammars - {"tree-sitter-python"}
    assert "treediff[languages]" in EXTRAS["dev"]


def test_the_locks_differ_by_cuda_only():
    cpu, cuda = pins("cpu"), pins("cuda")
    assert cpu.items() <= cuda.items()
    assert {"triton", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"} <= cuda.keys() - cpu.keys()
    assert all(re.match(r"(nvidia|cuda)-|triton$", name) for name in cuda.keys() - cpu.keys())


def test_the_hashes_are_of_the_lock_s_versions():
    text = (ROOT / "docker/cuda.hashes").read_text(encoding="utf-8")
    blocks = re.findall(r"(?m)^([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text)
    assert {name: version for name, version, _ in blocks} == pins("cuda")
    assert "".join(f"{name}=={version} \\\n{hashes}" for name, version, hashes in blocks) == text  # and nothing else
    assert text.count("--hash=") > 2 * len(blocks)


def test_the_cpu_lock_is_complete_and_holds_nothing_else():
    have, cuda_only = pins("cpu").keys(), pins("cuda").keys() - pins("cpu").keys()
    seen: dict[str, dict[str, set[str]]] = {"3.11": {}, "3.12": {}}
    for python, packages in seen.items():
        for requirement in WANTED:
            needed(requirement, python, packages)
        assert packages.keys() - cuda_only <= have  # torch's CUDA build asks for the latter
    assert {name for name in have - seen["3.11"].keys() - seen["3.12"].keys() if installed(name)} == set()


@pytest.mark.parametrize("lock", LOCKS)
def test_packages_serve_the_oldest_python(lock):
    """Debian 12 has Python 3.11.2, which some newest releases refuse."""
    refuse = []
    for name, version in pins(lock).items():
        found = installed(name)
        if found and found.version.partition("+")[0] == version:
            asked = found.metadata["Requires-Python"] or ""
            if "3.11.2" not in SpecifierSet(asked):
                refuse.append(f"{name} {version}: {asked}")
    assert not refuse


def test_no_program_hides_a_command_of_the_container():
    """docker/entrypoint runs programs first: a command of treediff may not share a program's name."""

    assert "reproduce" in COMMANDS
    places = f"{sysconfig.get_path('scripts')}:/usr/local/bin:/usr/bin:/bin"
    assert not [name for name in COMMANDS if shutil.which(name, path=places)]


def entrypoint(folder: Path, *args: str) -> list[str]:
    """What docker/entrypoint would start: the last program's name and arguments."""
    for name in ("treediff", "papermill", "jupyter"):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (folder / name).chmod(0o755)
    out = folder / "out"
    out.mkdir(exist_ok=True)
    script = folder / "entrypoint"
    script.write_text((ROOT / "docker" / "entrypoint").read_text(encoding="utf-8").replace("/out", str(out)))
    env = {"PATH": f"{folder}:/usr/bin:/bin", "TREEDIFF_NOTEBOOKS": str(ROOT / "notebooks")}
    done = subprocess.run(["sh", script, *args], env=env, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize(
    ("args", "started"),
    [
        ([], "treediff reproduce"),
        (["train", "--seed", "1"], "treediff train --seed 1"),
        (["--help"], "treediff --help"),
        (["reprodcue"], "treediff reprodcue"),  # which says what it knows
        (["papermill", "a.ipynb"], "papermill a.ipynb"),
        (["lab", "--ip", "0.0.0.0"], "jupyter lab --no-browser --ip 0.0.0.0"),
    ],
)
def test_the_entrypoint_starts(args, started, tmp_path):
    assert entrypoint(tmp_path, *args) == started.split()


def test_the_dockerfile_takes_its_base_and_lock_from_arguments():
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    steps = [line for line in lines if line and not line.startswith(("#", " "))]
    assert re.fullmatch(r"ARG BASE_IMAGE=nvidia/cuda:13\.\S+@sha256:[0-9a-f]{64}", steps[0])
    assert steps[1] == "FROM ${BASE_IMAGE}"
    assert not [line for line in lines if line.startswith("# syntax=")]
    installed_by_apt = " ".join(lines).partition("apt-get install")[2].partition("rm -rf")[0].split()
    assert {"gcc", "libc6-dev", "python3-dev", "tini", "bubblewrap"} <= set(installed_by_apt)  # Triton's compiler
    default = next(step for step in steps if step.startswith("ARG LOCK=")).partition("=")[2]
    assert (ROOT / default).is_file()
    # a change of the code must not install the packages again
    assert steps.index("COPY ${LOCK} /app/lock") < steps.index("COPY treediff /app/src/treediff")


def test_what_the_dockerfile_copies_is_in_its_context():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for line in re.findall(r"^COPY (.+)", text, flags=re.M):
        for source in line.split()[:-1]:
            assert source == "${LOCK}" or source.split("/")[0] in allowed
            assert source == "${LOCK}" or (ROOT / source).exists()


def test_conda_installs_the_lock():
    spec = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = next(d for d in spec["dependencies"] if isinstance(d, str) and d.startswith("python="))
    assert python.partition("=")[2] in SpecifierSet(PROJECT["requires-python"])
    lines = spec["dependencies"][-1]["pip"]
    assert "-e ." in lines
    assert (ROOT / next(x for x in lines if x.startswith("-r ")).removeprefix("-r ")) in (ROOT / "docker").glob(
        "*.lock"
    )


def test_the_licence_is_the_declared_one():
    assert PROJECT["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text


def make(*args: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    return subprocess.run(["make", "-C", folder, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("page", ["README.md", "docker/README.md", ".ci/run"])
def test_the_documented_make_targets_exist(page):
    named = set(re.findall(r"^ *(?:\$ )?make ([a-z]+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.M))
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    assert named <= known


def test_an_old_python_is_refused_in_one_sentence(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "cpu.lock").write_text("")
    (tmp_path / "pyproject.toml").write_text("")
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = make("venv", f"PYTHON={old}", "LOCK=docker/cpu.lock", folder=tmp_path)
    assert done.returncode == 2
    assert "older than 3.11; name a newer one: make PYTHON=" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_a_venv_is_remade_for_another_lock_and_goes_on_after_a_cut(tmp_path):
    """The Makefile's two stages with a pip that only counts its calls: no network, no minutes."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("a.lock", "b.lock"):
        (tmp_path / name).write_text(f"# {name}\n")
    (tmp_path / "pyproject.toml").write_text("")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
-c*|-V) exec {sys.executable} "$@" ;;
"-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo made >>events ;;
"-m pip install "*" -r "*) echo "installed $6" >>events; [ ! -e cut ] ;;
esac
"""
    )
    python.chmod(0o755)

    def events(lock: str) -> list[str]:
        (tmp_path / "events").write_text("")
        make("venv", f"PYTHON={python}", f"LOCK={lock}", folder=tmp_path)
        return (tmp_path / "events").read_text().splitlines()

    (tmp_path / "cut").touch()
    assert events("a.lock") == ["made", "installed a.lock"]
    (tmp_path / "cut").unlink()
    assert events("a.lock") == ["installed a.lock"]  # goes on
    assert events("a.lock") == []  # nothing to do
    assert events("b.lock") == ["made", "installed b.lock"]
    assert events("b.lock") == []
