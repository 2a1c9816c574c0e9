"""Builds the deepspeed command of a training run, starts it, follows its log, resumes it.

    run_dir = train(cfg)            # returns at once if the run is there

The training itself is train.py; it runs in processes of its own, so that a notebook stays small and alive.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from treediff import cards, progress, usage
from treediff.config import Config
from treediff.data import prepare
from treediff.errors import Preempted, UserError
from treediff.files import whole, write_json
from treediff.model import checkpoint
from treediff.runs import open_run
from treediff.training import batch, checkpoints, heartbeat, heldout, steplog

if TYPE_CHECKING:
    from tqdm import tqdm


log = logging.getLogger(__name__)

TRAINING_STAGES = ("data", "train")


def free_port() -> int:
    """A TCP port that is free on loopback now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def command(cfg: Config, run_dir: Path, backbone: str = "") -> list[str]:
    """The command that trains `run_dir`: deepspeed's on one node, the nodes of a host file, or this node of several.

    Of a single process its launcher, which imports everything twice over, is left out. `backbone` is the folder that a
    hub id was resolved to.
    """
    if cfg.processes == 1 and not cfg.hostfile:
        return [sys.executable, "-m", "treediff.training.train", str(run_dir), *([backbone] if backbone else [])]
    each = cfg.processes // cfg.nodes
    where = ["--num_gpus", str(each)]
    # DeepSpeed forgets which GPUs are visible when it is told how many to take.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[:each]
    if cfg.nodes == 1 and not cfg.hostfile and len(visible) == each and all(v.isdigit() for v in visible):
        where = ["--include", f"localhost:{','.join(visible)}"]
    if cfg.hostfile:
        where += ["--hostfile", cfg.hostfile] + (["--num_nodes", str(cfg.nodes)] if cfg.nodes > 1 else [])
    elif cfg.nodes > 1:
        hosts = run_dir / "hosts"  # names that nobody looks up: with --no_ssh only their number and slots count
        where = ["--hostfile", str(hosts), "--no_ssh", "--node_rank", str(cfg.node_rank)]
    else:
        where += ["--hostfile", os.devnull]  # else it would look for one at its own default place
    if not cfg.hostfile or cfg.master_addr != "127.0.0.1":  # with a host file DeepSpeed asks its first host
        where += ["--master_addr", cfg.master_addr]
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        *where,
        "--master_port",
        str(cfg.master_port or free_port()),
        "--module",
        "treediff.training.train",
        str(run_dir),
        *([backbone] if backbone else []),
    ]


def environment(cfg: Config) -> dict[str, str]:
    """The launcher's environment: on a CPU the cores shared out (unless OMP_NUM_THREADS says otherwise), and gloo on
    loopback if all processes are here.
    """
    import torch

    env = dict(os.environ, TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1", TREEDIFF_STARTER=heartbeat.starter())
    if not torch.cuda.is_available():
        threads = max(1, (os.cpu_count() or 1) // (cfg.processes // cfg.nodes))
        env = {"OMP_NUM_THREADS": str(threads), **env, "DS_ACCELERATOR": "cpu"}
        if cfg.master_addr == "127.0.0.1":
            env["GLOO_SOCKET_IFNAME"] = "lo"
    if cfg.processes == 1 and not cfg.hostfile:  # what a launcher would say
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        env |= alone | {"MASTER_PORT": str(cfg.master_port or free_port())}
    return env


PASSED_ON = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM")
"""What ranks on other machines need of the environment; by ssh DeepSpeed passes little on but what a file names."""


def passed_on(run_dir: Path, env: dict[str, str]) -> dict[str, str]:
    """The variable that names DeepSpeed's file of them, which is written here."""
    with whole(run_dir / "deepspeed_env") as temporary:
        temporary.write_text("".join(f"{name}={env[name]}\n" for name in PASSED_ON if name in env))
    return {"DS_ENV_FILE": str(run_dir / "deepspeed_env")}


def is_trained(cfg: Config) -> bool:
    """Whether the run's weights are there (a backbone that is not made on the spot needs no training)."""
    if cfg.masking == "none" and cfg.backbone != "pretrain":
        return True
    return (cfg.run_dir / "adapter").is_dir() or (cfg.run_dir / "model").is_dir()


def train(cfg: Config) -> Path:
    """Train the run of `cfg` on its prepared data, from its backbone; a run that is there already is kept.

    Raises UserError if backbone or data are not there, if the run directory was made with other switches, or if
    training failed (with the words of the process that failed first).
    """
    run_dir = open_run(cfg, *TRAINING_STAGES)
    if is_trained(cfg):
        return run_dir
    backbone = cfg.with_masking("none")
    if cfg.masking != "none" and not is_trained(backbone):
        raise UserError(f"{backbone.run_dir}: no backbone yet; run `treediff train --masking none` first.")
    steplog.check_tracker(cfg)
    if cfg.hostfile and not Path(cfg.hostfile).is_file():  # DeepSpeed would go on without it, on this machine alone
        raise UserError(f"hostfile: there is no file {cfg.hostfile}.")
    total = batch.total_steps(cfg, len(prepare.load(cfg)))
    if len(heldout.rows(cfg)) < cfg.eval_rows and cfg.eval_every:
        log.warning("%s: fewer than eval_rows = %d rows are left to hold out.", cfg.data, cfg.eval_rows)
    with usage.attempt(run_dir, "train", _gpus(cfg.processes)) if cfg.node_rank == 0 else nullcontext():
        _run(cfg, run_dir.resolve(), total)
    if cfg.node_rank == 0 and is_trained(cfg):  # now what it cost is known, too
        for kind in ("adapter", "model"):
            if (run_dir / kind).is_dir():
                with whole(run_dir / kind / "README.md") as temporary:
                    temporary.write_text(cards.model_card(cfg, kind), encoding="utf-8")
    if not is_trained(cfg):
        raise UserError(f"{run_dir}: training ended without weights; see {run_dir / 'train.log'}.")
    return run_dir


def _gpus(processes: int) -> int:
    """How many GPUs so many processes take: none on a machine without."""
    import torch

    return processes if torch.cuda.is_available() else 0


def _run(cfg: Config, run_dir: Path, total: int) -> None:
    if cfg.node_rank == 0:
        for old in run_dir.glob("failure-rank*.txt"):
            old.unlink()
        heartbeat.end(run_dir)
        write_json(run_dir / "config.json", cfg.as_dict())  # what may change between two starts is taken from here
    if cfg.nodes > 1 and not cfg.hostfile:
        lines = [f"node{i} slots={cfg.processes // cfg.nodes}\n" for i in range(cfg.nodes)]
        with whole(run_dir / "hosts") as temporary:
            temporary.write_text("".join(lines))
    backbone = ""
    if cfg.masking != "none" and cfg.backbone != "pretrain" and not Path(cfg.backbone).is_dir():
        backbone = str(checkpoint.fetch(cfg.backbone, cfg.revision))  # downloaded once, before any rank starts
    env = environment(cfg)
    if cfg.hostfile:
        env |= passed_on(run_dir, env)
    hung, began, told, early = "", time.time(), False, False
    with (run_dir / "train.log").open("ab") as out:
        process = subprocess.Popen(
            command(cfg, run_dir, backbone),
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            title = f"train {cfg.masking}"
            with progress.bar(total=total, desc=title, unit=" steps", mininterval=2) as bar, _asked_to_stop() as asked:
                while process.poll() is None and not hung:
                    time.sleep(0.2)
                    _advance(bar, run_dir / "log.jsonl")
                    if cfg.stall_timeout and heartbeat.silence(run_dir, began) > cfg.stall_timeout:
                        hung = heartbeat.stacks(run_dir, began)
                    if asked.is_set() and not told:
                        told = True
                        ranks = heartbeat.here(run_dir, began).values()
                        if early := not ranks:  # no step has begun
                            break
                        for pid in ranks:
                            os.kill(pid, signal.SIGUSR2)
                _advance(bar, run_dir / "log.jsonl")
        finally:
            stop(process)
    if hung:
        raise UserError(
            f"training of {run_dir} hung: a rank showed no sign of life for {cfg.stall_timeout:g} s (stall_timeout). "
            f"{hung}. Start it again: it goes on from its last checkpoint."
        )
    if early or process.returncode == Preempted.EXIT:
        kept = checkpoints.steps(run_dir / "checkpoints")
        where = f"checkpoints/step-{kept[-1]}" if kept else "its beginning"
        raise Preempted(f"{run_dir}: stopped as asked; the same command goes on from {where}.")
    if process.returncode:
        raise UserError(f"training of {run_dir} failed (exit {process.returncode}): {_reason(run_dir)}")
    heartbeat.end(run_dir)


@contextmanager
def _asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, where this thread is one that signals reach."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def _advance(bar: tqdm, path: Path) -> None:
    """Show the last complete line of the step log on the progress bar."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        lines = [x for x in file.read().split(b"\n") if x.startswith(b'{"step"') and x.endswith(b"}")]
    with suppress(IndexError, ValueError):  # no line yet, or one that is cut short
        last = json.loads(lines[-1])
        bar.set_postfix(loss=f"{last['loss']:.3f}", tokens_s=f"{last['tokens_per_s']:.0f}", refresh=False)
        bar.update(last["step"] + 1 - bar.n)


def stop(process: subprocess.Popen) -> None:
    """End the launcher and everything it started: nothing of a run outlives the call that made it.

    The ranks are in the launcher's process group, and outlive it if it was killed.
    """
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _reason(run_dir: Path) -> str:
    """The words of the rank that failed first, or the end of the log."""
    failures = sorted(run_dir.glob("failure-rank*.txt"), key=lambda p: p.stat().st_mtime_ns)
    if failures:
        return f"{failures[0].stem.removeprefix('failure-')}: {failures[0].read_text().strip()}"
    tail = (run_dir / "train.log").read_text(errors="replace").splitlines()[-15:]
    return "\n".join(tail)


def sampling(
    cfg: Config, jobs: Sequence[tuple[str, int | None]], processes: int, total: int, made: Callable[[], int]
) -> None:
    """Make the missing samples of some (benchmark, length) with processes, one per GPU; `made` counts those there are.

    Raises UserError with the words of a process that failed; what the others had finished is kept.
    """
    task = {"switches": cfg.as_dict(), "jobs": list(jobs)}
    run = ["--nproc-per-node", str(processes), "--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    run += ["-m", "treediff.sampling.run", json.dumps(task)]
    path = cfg.run_dir / "sample.log"
    with path.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *run],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment(cfg.but(processes=processes)),
            start_new_session=True,
        )
        try:
            looked = time.monotonic()
            what = ", ".join(f"{benchmark} T={length}" if length else benchmark for benchmark, length in jobs)
            title = f"sample {cfg.run_dir.name} {what}, {processes} processes"
            with progress.bar(total=total, initial=made(), desc=title, unit=" answers", mininterval=2) as bar:
                while process.poll() is None:
                    time.sleep(0.2)
                    if (now := time.monotonic()) > looked + 2:  # counting reads all that was made
                        looked = now
                        bar.update(made() - bar.n)
                bar.update(made() - bar.n)
        finally:
            stop(process)
    if process.returncode:
        lines = path.read_text(errors="replace").splitlines()
        said = [x for x in lines if re.match(r"rank\d+: ", x)] or lines[-15:]
        raise UserError(f"sampling of {cfg.run_dir} failed (exit {process.returncode}): " + "\n".join(said))
