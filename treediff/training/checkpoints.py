"""Checkpoints of a running training: complete or worth nothing, the last two kept; and the trained weights at its end.

    first = resume(engine, folder, rank)                  # 0 without a checkpoint
    save(engine, folder, step, rank)                      # all ranks together
    publish(cfg, net, rank)                               # adapter/ in PEFT's format, or model/ in LLaDA's

A checkpoint is complete when it holds the file `complete`, written after everything else is on the disk.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from treediff.config import Config
from treediff.errors import UserError
from treediff.files import whole
from treediff.model import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


KEEP = 2  # checkpoints


def steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending."""
    return sorted(int(p.parent.name.removeprefix("step-")) for p in folder.glob("step-*/complete"))


def save(engine: Any, folder: Path, step: int, rank: int) -> None:
    """Write checkpoints/step-N. Raises UserError if the disk is full; the checkpoints before it stay as they are."""
    spot = folder / f"step-{step}"
    try:
        engine.save_checkpoint(
            str(folder),
            tag=spot.name,
            client_state={"step": step},
            exclude_frozen_parameters=True,
            save_latest=False,
        )
        # Each rank answers for what it wrote itself.
        for path in spot.glob(f"*rank_{rank}_*") if rank else spot.rglob("*"):
            if path.is_file():
                _sync(path)
    except (OSError, RuntimeError) as e:  # torch's writer says RuntimeError where the disk said no
        shutil.rmtree(spot, ignore_errors=True)
        kept = steps(folder)
        last = f"step-{kept[-1]}" if kept else "the beginning"
        free = shutil.disk_usage(folder).free / 1e9
        raise UserError(
            f"{spot}: the checkpoint cannot be written ({str(e).strip().splitlines()[0]}); {free:.1f} GB are free. "
            f"Make room, then start the run again: it goes on from {last}."
        ) from e
    torch.distributed.barrier()
    if rank == 0:
        (spot / "complete").touch()
        _sync(spot)
        for old in steps(folder)[:-KEEP]:
            (folder / f"step-{old}" / "complete").unlink()  # first, so that a half deleted one is none
            shutil.rmtree(folder / f"step-{old}", ignore_errors=True)
    torch.distributed.barrier()


def require_shared(run_dir: Path, rank: int, wait: float = 30.0) -> None:
    """Raises UserError on every rank if one of them does not see the run's folder as rank 0 does."""
    mark = run_dir / ".shared"
    said = [secrets.token_hex(8)]
    if rank == 0:
        mark.write_text(said[0])
    torch.distributed.broadcast_object_list(said)
    until = time.monotonic() + wait  # a network's file system may show a new file late
    while not (seen := mark.is_file() and mark.read_text() == said[0]) and time.monotonic() < until:
        time.sleep(0.5)
    every: list[bool] = [False] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(every, seen)
    if blind := [str(r) for r, sees in enumerate(every) if not sees]:
        raise UserError(
            f"{run_dir}: this folder is not the same for every rank ({', '.join(blind)} see another one than rank 0): "
            "set TREEDIFF_RUNS to a folder that all machines share."
        )


def _sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def resume(engine: Any, folder: Path, rank: int) -> int:
    """Load the last complete checkpoint, if there is one, and delete what is incomplete; the step to go on with."""
    said = [steps(folder)]
    torch.distributed.broadcast_object_list(said)  # rank 0's word: all go on from the same step
    found = said[0]
    if rank == 0:
        for path in folder.glob("step-*"):
            if not (path / "complete").exists():
                shutil.rmtree(path, ignore_errors=True)
    torch.distributed.barrier()
    if not found:
        return 0
    spot = folder / f"step-{found[-1]}"
    try:
        _, state = engine.load_checkpoint(str(folder), tag=spot.name, load_module_strict=False)
    except Exception as e:  # a damaged file raises what its format pleases
        raise UserError(f"{spot}: damaged ({str(e).strip().splitlines()[0]}); {_delete(found)}") from e
    if state is None:
        raise UserError(f"{spot}: DeepSpeed cannot load this checkpoint; {_delete(found)}")
    return state["step"]


def _delete(found: list[int]) -> str:
    before = f"step-{found[-2]}" if len(found) > 1 else "the beginning"
    return f"delete it and start the run again: it goes on from {before}."


def publish(cfg: Config, net: nn.Module, rank: int) -> None:
    """Write the trained weights: adapter/ in PEFT's format, or model/ in LLaDA's if all weights were trained."""
    trained = [p for p in net.parameters() if p.requires_grad]
    with _gathered(trained):  # ZeRO 3 has split them: all ranks bring them together, rank 0 writes
        if rank == 0 and hasattr(net, "peft_config"):
            with whole(cfg.run_dir / "adapter") as spot:
                net.save_pretrained(str(spot))
        elif rank == 0:
            checkpoint.save_backbone(net, cfg.run_dir / "model")


@contextmanager
def _gathered(parameters: list[Any]) -> Iterator[None]:
    import deepspeed

    if any(hasattr(p, "ds_id") for p in parameters):
        with deepspeed.zero.GatheredParameters(parameters):
            yield
    else:
        yield
