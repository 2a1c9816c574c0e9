"""What this machine has and lacks for a run: `treediff doctor --preset paper`.

    checks = examine(cfg)            # one record each: name, state, what was found, what that costs, how to get it
    worst(checks)                    # 0 if the run can be made here, 1 if something is missing without which it cannot

Nothing is downloaded, made or changed. What a run needs is read off its switches: a backbone that is made on the spot
needs no hub, one process needs no NCCL.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal, NamedTuple

from treediff.config import Config, runs_root
from treediff.errors import UserError

State = Literal["ok", "lacking", "missing"]
PROJECT = Path(__file__).resolve().parents[1]
HUB_PATIENCE = 5.0  # seconds that the hub has to answer


class Check(NamedTuple):
    """One thing. `lacking`: the run can be made without it, at the cost named; `missing`: it cannot."""

    name: str
    state: State
    found: str
    costs: str = ""
    get: str = ""


def examine(cfg: Config) -> list[Check]:
    """All checks for the run of `cfg`. A check that fails itself is `missing`, with its error."""
    out = []
    for check in (python, packages, gpu, driver, deepspeed, nccl, memory, disk, hub, benchmarks, languages, sandbox):
        try:
            out.extend(check(cfg))
        except UserError as e:
            out.append(Check(check.__name__, "missing", str(e), "the run is refused", "do what the sentence says"))
        except Exception as e:  # a broken installation may raise anything, and that is what is to be told
            found = f"{type(e).__name__}: {e}"
            out.append(Check(check.__name__, "missing", found, "nothing is known of it", "make venv, then ask again"))
    return [c._replace(costs="", get="") if c.state == "ok" else c for c in out]


def worst(checks: list[Check]) -> int:
    """The exit code: 0, or 1 if anything is missing."""
    return int(any(c.state == "missing" for c in checks))


def text(checks: list[Check]) -> str:
    """The checks to read: one line each, and under what is not ok what it costs and how to get it."""
    width, lines = max(len(c.name) for c in checks), []
    for c in checks:
        lines.append(f"{c.state:<8} {c.name:<{width}}  {c.found}")
        lines += [f"{'':<{width + 11}}{said}" for said in (c.costs, c.get and f"to get it: {c.get}") if said]
    return "\n".join(lines)


# --- Python and its packages ---------------------------------------------------------------------------------------
def python(cfg: Config) -> Iterator[Check]:
    """The interpreter's version against the project's own bound."""
    from packaging.specifiers import SpecifierSet

    asked = importlib.metadata.metadata("treediff")["Requires-Python"] or ""
    ok = platform.python_version() in SpecifierSet(asked)
    yield Check(
        "Python",
        "ok" if ok else "missing",
        f"{platform.python_version()} ({sys.executable})",
        f"the kit needs Python {asked}",
        "make venv PYTHON=python3.12",
    )


def lock() -> dict[str, str]:
    """Version by package in the lock that fits the installed torch; without a checkout the project's own pins."""
    import torch

    path = PROJECT / "docker" / f"{'cuda' if torch.version.cuda else 'cpu'}.lock"
    if path.is_file():
        return dict(line.split("==") for line in path.read_text(encoding="utf-8").split())
    pins = (re.match(r"([\w.-]+)==([\w.]+)$", line) for line in importlib.metadata.requires("treediff") or [])
    return {pin[1]: pin[2] for pin in pins if pin}


def packages(cfg: Config) -> Iterator[Check]:
    """What is installed, against the lock; torch's CUDA libraries are part of it."""
    pins, absent, other = lock(), [], []
    for name, version in pins.items():
        try:
            if (have := importlib.metadata.version(name).partition("+")[0]) != version:
                other.append(f"{name} {have}, not {version}")
        except importlib.metadata.PackageNotFoundError:
            absent.append(name)
    wanted = [
        re.split(r"[^\w.-]", line)[0] for line in importlib.metadata.requires("treediff") or [] if ";" not in line
    ]
    needed = [name for name in absent if name in wanted]
    found = f"{len(pins) - len(absent) - len(other)} of {len(pins)} as in the lock"
    for kind, names in (("other versions", other), ("not installed", absent)):
        found += f"; {kind}: {', '.join(names[:5])}{f' and {len(names) - 5} more' * (len(names) > 5)}" if names else ""
    yield Check(
        "packages",
        "missing" if needed else "lacking" if absent or other else "ok",
        found,
        f"no stage runs without {needed[0]}" if needed else "results may differ from those of the lock's versions",
        "make venv",
    )


# --- the accelerator -----------------------------------------------------------------------------------------------
def _smi() -> list[list[str]]:
    """Name, memory [MiB] and driver of each GPU, as the driver says; none where it does not answer."""
    ask = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(ask, capture_output=True, text=True, check=True, timeout=30).stdout
        return [[x.strip() for x in line.split(",")] for line in said.splitlines() if line.count(",") == 2]
    return []


def _large(cfg: Config) -> bool:
    """Whether the run is hopeless on a CPU: more than 10^17 FLOPs of training, weeks of a few cores."""
    from treediff.training import plan

    return plan.plan(cfg)["flops"] > 1e17


def gpu(cfg: Config) -> Iterator[Check]:
    """The GPUs that torch can use."""
    import torch

    from treediff.training import plan

    if not torch.cuda.is_available():
        smi = _smi()
        hopeless = _large(cfg)
        here = f"{len(smi)} x {smi[0][0]}, which torch {torch.__version__} cannot use" if smi else "none"
        costs = (
            f"{plan.plan(cfg)['flops']:.1e} FLOPs of training are out of reach of a CPU"
            if hopeless
            else "training and sampling run on the CPU (minutes with the preset tiny)"
        )
        get = (
            "install from docker/cuda.lock" if smi else "a machine with an NVIDIA GPU, or the container with --gpus all"
        )
        yield Check("GPU", "missing" if hopeless else "lacking", here, costs, get)
        return
    each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = f"{len(each)} x {each[0].name}, {min(p.total_memory for p in each) / 1e9:.0f} GB"
    wanted = max(1, cfg.processes // cfg.nodes)
    short = wanted > len(each)
    yield Check(
        "GPU",
        "missing" if short else "ok",
        found,
        f"training by {wanted} processes on this node is refused",
        f"--processes {len(each)} --accumulation {cfg.accumulation * wanted // len(each)} makes the same updates",
    )
    theirs = {f"sm_{p.major}{p.minor}" for p in each}
    old = sorted(theirs - set(torch.cuda.get_arch_list()))
    if old and not any(a.startswith("compute_") for a in torch.cuda.get_arch_list()):
        get = "another GPU, or a build of torch for this one"
        yield Check("GPU's kernels", "lacking", f"torch has none built for {', '.join(old)}", "it may not start", get)


def driver(cfg: Config) -> Iterator[Check]:
    """The driver against the CUDA that torch was built for."""
    import torch

    smi, cuda = _smi(), torch.version.cuda
    if not smi and not cuda:
        yield Check("CUDA", "ok", f"torch {torch.__version__} is built without it, and there is no driver")
        return
    needs = {"12": 525, "13": 580}.get((cuda or "").partition(".")[0], 0)
    have = int(smi[0][2].partition(".")[0]) if smi else 0
    found = f"torch {torch.__version__} with CUDA {cuda or 'left out'}, driver {smi[0][2] if smi else 'none'}"
    if cuda and have >= needs:
        yield Check("CUDA", "ok", found)
    elif not cuda:
        yield Check("CUDA", "lacking", found, "the GPU is not used", "install from docker/cuda.lock")
    else:
        costs = f"CUDA {cuda} needs a driver of at least {needs}" if smi else "CUDA's libraries lie idle"
        yield Check("CUDA", "lacking", found, costs, "the machine's administrator installs drivers")


def deepspeed(cfg: Config) -> Iterator[Check]:
    """Whether DeepSpeed loads, in a process of its own."""
    code = "import deepspeed; print(deepspeed.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    words = [x for x in (done.stderr if done.returncode else done.stdout).splitlines() if x.strip()] or ["no word"]
    yield Check(
        "DeepSpeed", "missing" if done.returncode else "ok", words[-1].strip(), "nothing can be trained", "make venv"
    )


def nccl(cfg: Config) -> Iterator[Check]:
    """What processes of one training talk by."""
    import torch
    from torch import distributed

    if cfg.processes == 1:
        yield Check("NCCL", "ok", "not needed: one process")
    elif torch.cuda.is_available() and distributed.is_nccl_available():
        yield Check("NCCL", "ok", ".".join(map(str, torch.cuda.nccl.version())))
    else:
        costs = f"{cfg.processes} processes talk by gloo, over the CPU"
        yield Check("NCCL", "lacking", "not available", costs, "a GPU, and torch's CUDA build (docker/cuda.lock)")


# --- room ----------------------------------------------------------------------------------------------------------
def memory(cfg: Config) -> Iterator[Check]:
    """The machine's memory, and each GPU's for the run's worst batch."""
    from treediff.training import plan

    have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Check(
        "memory",
        "ok" if have >= 6e9 else "lacking",
        f"{have / 1e9:.0f} GB, {len(os.sched_getaffinity(0))} cores",
        "a training and its launcher take about 4 GB",
        "--processes 1, and nothing else beside it",
    )
    if free := plan.free_memory():
        need, room = plan.plan(cfg)["memory_total"], min(free)
        yield Check(
            "GPU memory",
            "ok" if need <= room else "missing",
            f"{room / 1e9:.1f} GB free on each, the run needs {need / 1e9:.1f}",
            "the training is refused",
            "treediff train --plan names the switch that helps",
        )


def disk(cfg: Config) -> Iterator[Check]:
    """Free room where runs lie, against the plan's."""
    from treediff.training import plan

    where = runs_root().resolve()
    while not where.exists():
        where = where.parent
    need, free = sum(plan.disk(cfg, plan.shape(cfg)).values()), shutil.disk_usage(where).free
    writable = os.access(where, os.W_OK)
    yield Check(
        "disk",
        "ok" if writable and need <= free else "missing",
        f"{free / 1e9:.1f} GB free in {where}, a run takes at most {need / 1e9:.2f}"
        + ", not writable" * (not writable),
        "the run is refused",
        "set TREEDIFF_RUNS to a folder on another disk",
    )


# --- what is fetched -----------------------------------------------------------------------------------------------
def hub(cfg: Config) -> Iterator[Check]:
    """Whether the model, tokenizer and data that the run names are at hand or can be fetched."""
    from huggingface_hub import constants, try_to_load_from_cache

    from treediff.data import stdlib

    local = {"backbone": ("pretrain",), "tokenizer": ("train",), "data": ("tinycode", *stdlib.SOURCES), "model": ("",)}
    remote = {n: getattr(cfg, n) for n, own in local.items() if getattr(cfg, n) not in own}
    remote = {n: x for n, x in remote.items() if not Path(x).exists()}
    if not remote:
        yield Check("hub", "ok", "not needed: model, tokenizer and data are made here or lie here")
        return
    kept = {n for n, x in remote.items() if n != "data" and isinstance(_cached(try_to_load_from_cache, x, cfg), str)}
    offline = constants.HF_HUB_OFFLINE
    said = "HF_HUB_OFFLINE is set" if offline else reached(constants.ENDPOINT)
    ok = not said or kept >= remote.keys()
    found = ", ".join(f"{x} ({'in the cache' if n in kept else n})" for n, x in remote.items())
    yield Check(
        "hub",
        "ok" if ok else "missing",
        f"{constants.ENDPOINT} answers: {found}" if not said else f"{said}: {found}",
        "what is not in the cache cannot be fetched",
        "give local copies by --backbone, --tokenizer and --data, or a network",
    )


def _cached(look: Callable[..., object], name: str, cfg: Config) -> object:
    """What the cache has of a model; a name that is none on the hub has nothing there."""
    with suppress(Exception):
        return look(name, "config.json", revision=cfg.revision)
    return None


def reached(address: str) -> str:
    """Nothing if a web address answers at all, or what went wrong."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_PATIENCE).close()
    except urllib.error.HTTPError:  # an answer
        return ""
    except (OSError, ValueError) as e:
        return f"{address} does not answer ({getattr(e, 'reason', e)})"
    return ""


def benchmarks(cfg: Config) -> Iterator[Check]:
    """Where the problems of the run's benchmarks are. EvalPlus downloads its own at the first use."""
    from evalplus.data.utils import CACHE_DIR

    for name in cfg.benchmarks:
        path = cfg.benchmark_files.get(name) or os.environ.get(f"{name.upper()}_OVERRIDE_PATH")
        kept = sorted(Path(CACHE_DIR).glob({"humaneval": "HumanEvalPlus-*", "mbpp": "MbppPlus-*"}.get(name, "-")))
        if name == "tinycode":
            yield Check("tinycode", "ok", "made here")
        elif path:
            ok = Path(path).is_file()
            get = f"--benchmark_files.{name} FILE"
            yield Check(name, "ok" if ok else "missing", f"{path}{'' if ok else ': no such file'}", "no score", get)
        elif kept:
            yield Check(name, "ok", str(kept[-1]))
        else:
            said = reached("https://github.com")
            get = f"--benchmark_files.{name} FILE, a file as EvalPlus packs it"
            found = said or "EvalPlus downloads it at the first use"
            yield Check(name, "missing" if said else "ok", found, "nothing can be sampled or scored", get)


def languages(cfg: Config) -> Iterator[Check]:
    """The grammars that are installed."""
    from treediff.masking import tiers
    from treediff.masking.languages import LANGUAGES

    have = tiers.installed()
    lacks = [name for name in LANGUAGES if name not in have]
    state: State = "missing" if cfg.language in lacks else "lacking" if lacks else "ok"
    costs = f"{', '.join(lacks)} cannot be parsed"
    yield Check("grammars", state, ", ".join(have), costs, "pip install 'treediff[languages]'")


def sandbox(cfg: Config) -> Iterator[Check]:
    """The layers that hold a generated program here, each tried on a real one."""
    from treediff.sandbox.client import Broken, Sandbox
    from treediff.sandbox.isolation import absent

    try:
        with Sandbox() as box:
            layers = box.layers
    except Broken as e:
        yield Check("sandbox", "missing", str(e), "nothing can be scored", "see docs/sandbox.md")
        return
    lost = {name: why for name, why in layers.items() if absent(layers, name)}
    if len(lost) == len(layers):
        costs, state = "programs run with limits only: with the rights of this user", "lacking"
    else:
        costs, state = "docs/sandbox.md says what remains possible without it", "lacking" if lost else "ok"
    found = ", ".join(f"{name}: {how}" for name, how in layers.items())
    yield Check("sandbox", state, found, costs, "install bubblewrap, or allow user namespaces (docs/sandbox.md)")
