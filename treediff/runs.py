"""A run directory: opened for one set of switches and refused for any other; where its results come from.

    run_dir = open_run(cfg, "data", "train")
    write_json(run_dir / "provenance.json", provenance(steps=300))

Later calls with other switches are refused, with the switch named.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from treediff.config import SWITCHES, Config
from treediff.errors import UserError
from treediff.files import read_json, write_json

SHARED_OUT = ("micro_batch", "accumulation", "processes")
"""Switches whose product is the rows of an update. How a run shares them out changes its rounding, not its meaning."""


def open_run(cfg: Config, *stages: str) -> Path:
    """The run directory, made for these switches, or refused if it was made for others.

    A trained run may have shared out the rows of its updates over other processes: it is what it is. Raises UserError
    naming the first switch that differs among those the `stages` depend on.
    """
    path = cfg.run_dir / "config.json"
    if path.exists():
        found, wanted = read_json(path), json.loads(json.dumps(cfg.as_dict(*stages)))
        for made in (found, wanted):
            made["pretrain"] = of_stages(made.get("pretrain", {}), *stages)
        done = (cfg.run_dir / "adapter").is_dir() or (cfg.run_dir / "model").is_dir()
        if done and rows_per_step(found) == rows_per_step(cfg.as_dict()):
            found, wanted = comparable(found), comparable(wanted)
        for name, value in wanted.items():
            if found.get(name) != value and not idle(cfg, name):
                raise UserError(
                    f"{cfg.run_dir}: this run was made with {name} = {found.get(name)!r}, not {value!r}; "
                    f"give {name} that value, or set TREEDIFF_RUNS to another folder, or delete this one."
                )
    else:
        write_json(path, cfg.as_dict())
    return cfg.run_dir


def rows_per_step(made: Mapping[str, Any]) -> tuple[int, int]:
    """Rows of an update of a run and of its backbone, by the switches in its config.json."""
    return tuple(math.prod(x.get(n, 0) for n in SHARED_OUT) for x in (made, {**made, **made.get("pretrain", {})}))


def comparable(made: Mapping[str, Any]) -> dict[str, Any]:
    """The switches of a config.json without how the rows of an update were shared out."""
    kept = {k: v for k, v in made.items() if k not in SHARED_OUT}
    if "pretrain" in kept:
        kept["pretrain"] = {k: v for k, v in kept["pretrain"].items() if k not in SHARED_OUT}
    return kept


def of_stages(values: Mapping[str, Any], *stages: str) -> dict[str, Any]:
    """Those of some switches' values that the outputs of the stages depend on; of a nested `pretrain` likewise."""
    kept = {k: v for k, v in values.items() if k in SWITCHES and SWITCHES[k].stage in stages}
    return kept | ({"pretrain": of_stages(kept["pretrain"], *stages)} if "pretrain" in kept else {})


def idle(cfg: Config, name: str) -> bool:
    """Whether switch `name` cannot matter to this run: a backbone has no adapter and no tiers in its training."""
    if cfg.masking != "none":
        return False
    without = ("lora_alpha", "lora_dropout", "tier_weights", "default_weight", "budget")
    return name in without or (cfg.backbone != "pretrain" and name not in ("backbone", "revision"))


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a result comes from: versions, commit, hardware, time, and the given facts."""

    def git(*args: str) -> str | None:
        if not shutil.which("git"):
            return None
        here = Path(__file__).resolve().parent
        done = subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    versions = {}
    for package in ("treediff", "torch", "transformers", "peft", "deepspeed", "tree-sitter", "evalplus"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": os.environ.get("TREEDIFF_COMMIT") or git("rev-parse", "HEAD"),
        "changed_files": None if changed is None else bool(changed),  # None: this is no checkout
        "python": platform.python_version(),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), "gpus": gpus},
        "versions": versions,
        **facts,
    }
