"""A run directory: opened for one set of switches and refused for any other; where its results come from.

run_dir = open_run(cfg, "data", "train")
write_json(run_dir / "provenance.json", provenance(steps=300))
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from treediff.config import SWITCHES, Config
from treediff.errors import UserError
from treediff.files import read_json, write_json


def open_run(cfg: Config, *stages: str) -> Path:
    """The run directory, made for these switches, or refused if it was made for others.

    Raises UserError naming the first switch that differs among those the `stages` depend on.
    """
    path = cfg.run_dir / "config.json"
    if path.exists():
        found, mine = read_json(path), json.loads(json.dumps(cfg.as_dict(*stages)))
        for made in (found, mine):
            made["pretrain"] = of_stages(made.get("pretrain", {}), *stages)
        for name, value in mine.items():
            if found.get(name) != value and not _idle(cfg, name):
                raise UserError(
                    f"{cfg.run_dir}: this run was made with {name} = {found.get(name)!r}, not {value!r}; "
                    f"give {name} that value, or set TREEDIFF_RUNS to another folder, or delete this one."
                )
    else:
        write_json(path, cfg.as_dict())
    return cfg.run_dir


def of_stages(values: Mapping[str, Any], *stages: str) -> dict[str, Any]:
    """Those of some switches' values that the outputs of the stages depend on; of a nested `pretrain` likewise."""
    kept = {k: v for k, v in values.items() if k in SWITCHES and SWITCHES[k].metadata["stage"] in stages}
    return kept | ({"pretrain": of_stages(kept["pretrain"], *stages)} if "pretrain" in kept else {})


def _idle(cfg: Config, name: str) -> bool:
    """Whether switch `name` cannot matter to this run: a backbone has no adapter and no tiers in its training."""
    if cfg.masking != "none":
        return False
    without = ("lora_alpha", "lora_dropout", "tier_weights", "default_weight", "budget")
    return name in without or (cfg.backbone != "pretrain" and name not in ("backbone", "revision"))


def provenance(**facts: Any) -> dict[str, Any]:
    """Where a result comes from: versions, commit, hardware, time, and the given facts."""
    import platform
    import subprocess
    import time
    from importlib.metadata import PackageNotFoundError, version

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
