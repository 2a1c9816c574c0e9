"""Builds the deepspeed command of a training run, starts it, follows its log, resumes it.

    run_dir = trained(cfg)          # returns at once if the run is there, otherwise trains what is missing

The training itself is treediff/train.py; it runs in processes of its own, so that a notebook stays small and alive.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from treediff.config import Config, UserError, claim

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)

TRAINING_STAGES = ("data", "train")


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(cfg: Config, run_dir: Path) -> list[str]:
    """The deepspeed command that trains `run_dir`."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(cfg.processes),
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(cfg.master_port or free_port()),
        "--module",
        "treediff.train",
        str(run_dir),
    ]


def environment(cfg: Config) -> dict[str, str]:
    """The launcher's environment: on a CPU, one thread set per process and gloo on loopback."""
    import torch

    env = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1", TREEDIFF_STARTER=str(os.getpid()))
    if not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // cfg.processes)
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    return env


def is_trained(cfg: Config) -> bool:
    """Whether the run's weights are there (a backbone that is not made on the spot needs no training)."""
    if cfg.masking == "base" and cfg.backbone != "pretrain":
        return True
    return (cfg.run_dir / "adapter").is_dir() or (cfg.run_dir / "model").is_dir()


def trained(cfg: Config) -> Path:
    """Train the run of `cfg`, and first the backbone and the data it needs; what is there already is kept.

    Raises UserError if the run directory was made with other switches, or if training failed (with the words of the
    process that failed first).
    """
    run_dir = claim(cfg, *TRAINING_STAGES)
    if is_trained(cfg):
        return run_dir
    if cfg.masking != "base":
        trained(cfg.with_masking("base"))
    from treediff import corpus, prepare, tokens, train

    tokens.load_tokenizer(corpus.tokenizer_folder(cfg), cfg.revision)
    total = train.total_steps(cfg, len(prepare.prepared(cfg)))
    _run(cfg, run_dir.resolve(), total)
    if not is_trained(cfg):
        raise UserError(f"{run_dir}: training ended without weights; see {run_dir / 'train.log'}.")
    return run_dir


def _run(cfg: Config, run_dir: Path, total: int) -> None:
    from tqdm import tqdm

    for old in run_dir.glob("failure-rank*.txt"):
        old.unlink()
    with (run_dir / "train.log").open("ab") as out:
        process = subprocess.Popen(
            command(cfg, run_dir),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(cfg),
            start_new_session=True,
        )
        try:
            with tqdm(total=total, desc=f"train {cfg.masking}", unit=" steps", mininterval=2) as bar:
                while process.poll() is None:
                    time.sleep(0.5)
                    _advance(bar, run_dir / "log.jsonl")
                _advance(bar, run_dir / "log.jsonl")
        finally:
            _stop(process)
    if process.returncode:
        raise UserError(f"training of {run_dir} failed (exit {process.returncode}): {_reason(run_dir)}")


def _advance(bar: tqdm, path: Path) -> None:
    """Show the last complete line of the step log on the progress bar."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = [x for x in file.read().split(b"\n") if x.startswith(b'{"step"') and x.endswith(b"}")]
    if lines:
        last = json.loads(lines[-1])
        bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_s=f"{last['tokens_per_s']:.0f}", refresh=False)
        bar.update(last["step"] + 1 - bar.n)


def _stop(process: subprocess.Popen) -> None:
    """End the launcher and everything it started: nothing of a run outlives the call that made it."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _reason(run_dir: Path) -> str:
    """The words of the rank that failed first, or the end of the log."""
    failures = sorted(run_dir.glob("failure-rank*.txt"), key=lambda p: p.stat().st_mtime_ns)
    if failures:
        return f"{failures[0].stem.removeprefix('failure-')}: {failures[0].read_text().strip()}"
    tail = (run_dir / "train.log").read_text(errors="replace").splitlines()[-15:]
    return "\n".join(tail)
