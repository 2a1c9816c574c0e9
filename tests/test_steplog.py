"""The step log's trackers: optional packages, asked for when they are wanted, fed with the record's numbers."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from treediff.config import resolve
from treediff.errors import UserError
from treediff.training import loss, steplog

RECORD = {
    "step": 7,
    "loss": 1.5,
    "loss_by_noise": [1.0, None, 2.0, 3.0, 4.0],
    "loss_by_label": {"control": 0.5},
    "p": [0.1],
    "uids": [3],
    "mfu": None,
    "lr": 1e-3,
}


def test_a_record_s_numbers_have_paths():
    assert steplog.scalars(RECORD) == {
        "loss": 1.5,
        "loss_by_noise/0-0.2": 1.0,
        "loss_by_noise/0.4-0.6": 2.0,
        "loss_by_noise/0.6-0.8": 3.0,
        "loss_by_noise/0.8-1": 4.0,
        "loss_by_label/control": 0.5,
        "lr": 1e-3,
    }


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_package_is_named(monkeypatch, name):
    monkeypatch.setattr(steplog, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"tracker: {name} is not installed; pip install {name}"):
        steplog.check_tracker(resolve("tiny", tracker=name))
    steplog.check_tracker(resolve("tiny"))


def test_tensorboard_gets_every_number(runs, monkeypatch):
    said = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            said.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            said.append((name, value, step))

        def flush(self):
            pass

    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(steplog, "find_spec", lambda _: True)
    cfg = resolve("tiny", tracker="tensorboard")
    steplog.tracker(cfg, 5)(RECORD)
    assert said[0] == (str(cfg.run_dir / "tensorboard"), 5)
    assert ("loss_by_label/control", 0.5, 7) in said
    assert len(said) == 1 + len(steplog.scalars(RECORD))


def test_wandb_goes_on_with_the_same_run(runs, monkeypatch):
    said = []
    run = SimpleNamespace(log=lambda values, step: said.append((values, step)))
    stand_in = ModuleType("wandb")
    stand_in.init = lambda **k: said.append(k) or run
    monkeypatch.setitem(sys.modules, "wandb", stand_in)
    monkeypatch.setattr(steplog, "find_spec", lambda _: True)
    steplog.tracker(resolve("tiny", tracker="wandb"), 5)(RECORD)
    assert said[0]["resume"] == "allow"
    assert said[1] == (steplog.scalars(RECORD), 7)
    steplog.tracker(resolve("tiny", tracker="wandb"), 9)
    monkeypatch.setenv("TREEDIFF_RUNS", "elsewhere")
    steplog.tracker(resolve("tiny", tracker="wandb"), 9)
    first, again, elsewhere = (k["id"] for k in said if isinstance(k, dict))
    assert first == again != elsewhere


def test_a_line_is_written_when_the_next_step_has_come(runs):
    cfg = resolve("tiny")
    cfg.run_dir.mkdir(parents=True)
    log = steplog.StepLog(cfg, 0, vocabulary=500, flops=2e6, peak=1e9)
    for step in range(3):
        sums = loss.no_sums(torch.device("cpu"))
        sums[0, 1], sums[1, 1], sums[0, -1], sums[1, -1] = 6.0 * 4, 4, 6.0, 4
        fake = SimpleNamespace(
            tokens=100, row_tokens=100, step=step, uid=torch.tensor([77]), p=torch.ones(1), ids=torch.zeros(2, 50)
        )
        log.add(fake, sums, torch.tensor(0.5), 0.0, data_wait_s=0.0)
        assert [r["step"] for r in steplog.read_log(cfg.run_dir)] == list(range(step))
    log.flush()
    last = steplog.read_log(cfg.run_dir)[-1]
    assert last["step"] == 2
    assert last["loss_by_noise"] == [None, 6.0, None, None, None]
    assert last["grad_norm"] == 0.5
    assert last["tokens"] == 100
    assert last["mfu"] == pytest.approx(last["tokens_per_s"] * 2e6 / 1e9, rel=0.01, abs=1e-4)
