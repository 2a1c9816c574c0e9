"""The plan of the paper's run, what is refused before anything is fetched, and the advice that goes with it."""

import json
import re

import pytest

from treediff import cli, pipeline
from treediff.config import resolve
from treediff.errors import UserError
from treediff.training import memory, plan

PAPER = resolve("paper")


def test_the_paper_s_run():
    p = plan.plan(PAPER)
    assert p["parameters"] == 8_015_581_184
    assert p["trained"] == 167_772_160
    assert p["steps"] == 3516
    assert p["tokens"] == 3516 * 128 * 4096
    assert p["flops"] == pytest.approx(3516 * 128 * 4096 * 4 * 8_015_581_184)
    assert p["hours"]["A100"] == pytest.approx(p["flops"] / (8 * 312e12 * 0.4) / 3600)
    assert p["memory"]["weights"] == 2 * 8_015_581_184
    assert p["memory_total"] == sum(p["memory"].values())
    assert p["memory_total"] < 60e9


def test_the_plan_is_printed_without_a_network_and_makes_nothing(runs, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    cli.main(["train", "--preset", "paper", "--plan"])
    said = capsys.readouterr().out
    assert "3,516 optimiser steps" in said
    assert "8,015,581,184 parameters" in said
    assert re.search(r"A100 16\.\d, H100 5\.\d, H200 5\.\d", said)
    assert not runs.exists()


def test_a_run_that_cannot_fit_is_refused_before_anything_is_fetched_with_the_switch_that_helps(runs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(UserError, match=r"which has 40\.0 GB; --gradient_checkpointing true"):
        pipeline.trained(PAPER.but(gpu_memory=40.0, gradient_checkpointing=False))
    assert not runs.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": False, "gpu_memory": 40.0},
        {"micro_batch": 16, "accumulation": 1, "gpu_memory": 28.0},
        {"lora_rank": 0, "zero_stage": 0, "gpu_memory": 60.0},
        {"processes": 4, "gpu_memory": 20.0},
        {"lora_rank": 0, "zero_stage": 0, "gradient_checkpointing": False, "micro_batch": 8, "gpu_memory": 40.0},
    ],
)
def test_the_advice_is_true(changes):
    cfg = PAPER.but(**changes)
    with pytest.raises(UserError) as refused:
        plan.require_room(cfg)
    advice = dict(re.findall(r"--(\w+) (\w+)", str(refused.value)))
    assert advice
    better = resolve("paper", **{**changes, **advice})
    assert sum(memory.per_device(better, plan.shape(better)).values()) <= better.gpu_memory * 1e9


def test_what_no_switch_can_mend_is_said_so():
    with pytest.raises(UserError, match="larger GPUs"):
        plan.require_room(PAPER.but(gpu_memory=4.0))


def test_a_full_disk_is_refused(runs, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1e9}))
    with pytest.raises(UserError, match=r"disk: the run needs \d+\.\d GB in .*, 1\.0 GB are free"):
        plan.require_room(PAPER)


def test_a_folder_s_shape_is_read_and_an_unknown_one_is_not_guessed(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**plan.LLADA_8B, "n_layers": 2}))
    assert plan.shape(PAPER.but(backbone=str(tmp_path))).layers == 2
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"config\.json: d_model is missing"):
        plan.shape(PAPER.but(backbone=str(tmp_path)))
    with pytest.raises(UserError, match="the shape of someone/else is not known"):
        plan.plan(PAPER.but(backbone="someone/else"))


def test_tiny_has_a_plan_too():
    p = plan.plan(resolve("tiny"))
    assert p["steps"] == 150
    assert "150 optimiser steps of 32 rows" in plan.text(p)
    assert "first the backbone, made on the spot: 650" in plan.text(p)


def test_a_plan_that_cannot_be_is_shown_and_refused(runs, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["train", "--preset", "paper", "--plan", "--gpu_memory", "20"])
    assert end.value.code == 2
    said = capsys.readouterr()
    assert "3,516 optimiser steps" in said.out
    assert "memory: the run needs" in said.err


def test_an_unknown_number_of_rows_is_not_guessed():
    with pytest.raises(UserError, match="rows: 0 keeps all"):
        plan.plan(PAPER.but(rows=0))
    assert plan.plan(PAPER.but(rows=0, max_steps=7))["steps"] == 7
