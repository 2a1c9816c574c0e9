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
    assert p["hours"]["A100"] == pytest.approx(p["flops"] / (8 * 312e12 * 0.43) / 3600)
    assert p["hours"]["H100 PCIe"] / p["hours"]["H100"] == pytest.approx(989 / 756)
    assert p["recomputed"] == "none"
    again = plan.plan(PAPER.but(gradient_checkpointing="all"))
    assert again["hours"]["A100"] == pytest.approx(p["flops"] / (8 * 312e12 * 0.30) / 3600)
    assert again["hours"]["H200"] == pytest.approx(p["flops"] / (8 * 989e12 * 0.21) / 3600)
    assert again["memory_total"] < 26e9 < p["memory_total"]
    assert p["memory"]["weights"] == 2 * 8_015_581_184
    assert p["memory_total"] == sum(p["memory"].values())
    assert p["memory_total"] < 60e9


def test_the_plan_is_printed_without_a_network_and_makes_nothing(runs, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    cli.main(["train", "--preset", "paper", "--plan"])
    said = capsys.readouterr().out
    assert "3,516 optimiser steps" in said
    assert "8,015,581,184 parameters" in said
    assert re.search(r"training on 8 GPUs: A100 15\.\d, .*H100 7\.\d, .*H200 7\.\d", said)
    assert re.search(r"hours of sampling 1,084 answers, .*A100 \d", said)
    assert "hours of scoring" in said
    assert not runs.exists()


def test_a_run_that_cannot_fit_is_refused_before_anything_is_fetched_with_the_switch_that_helps(runs, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(UserError, match=r"which has 40\.0 GB; --gradient_checkpointing auto"):
        pipeline.trained(PAPER.but(gpu_memory=40.0, gradient_checkpointing="none"))
    assert not runs.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": "none", "gpu_memory": 40.0},
        {"micro_batch": 16, "accumulation": 1, "gpu_memory": 28.0},
        {"lora_rank": 0, "zero_stage": 0, "gpu_memory": 60.0},
        {"processes": 4, "gpu_memory": 20.0},
        {"lora_rank": 0, "zero_stage": 0, "gradient_checkpointing": "none", "micro_batch": 8, "gpu_memory": 40.0},
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
    with pytest.raises(UserError, match=r"config\.json has no d_model"):
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


def test_auto_recomputes_as_little_as_the_memory_allows():
    s = plan.shape(PAPER)
    ways = [plan.recomputation(PAPER, s, room * 1e9) for room in (0, 140, 80, 55, 50, 46, 30)]
    assert ways == ["none", "none", "none", "every_4", "every_3", "every_2", "all"]
    for room in (80, 55, 50, 46, 30):
        chosen = PAPER.but(gradient_checkpointing=plan.recomputation(PAPER, s, room * 1e9))
        assert sum(memory.per_device(chosen, s).values()) <= room * 1e9
    assert plan.recomputation(PAPER.but(gradient_checkpointing="every_5"), s, 1e9) == "every_5"
    for wrong in ("some", "every_1", "every_0", "True"):
        with pytest.raises(UserError, match="gradient_checkpointing: knows auto, none, all and every_2"):
            PAPER.but(gradient_checkpointing=wrong)


def test_free_memory_counts_not_the_whole(monkeypatch, tmp_path):
    """A notebook's kernel that keeps 50 of 80 GB: the driver is asked, which opens nothing on the device."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 80000\necho 20000\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert plan.free_memory() == [80000 * 2**20, 20000 * 2**20]
    with pytest.raises(UserError, match=r"memory: the run needs 2\d\.\d GB on each GPU, which has free 21\.0 GB"):
        plan.require_room(PAPER.but(processes=2))


def test_the_disk_line_counts_what_prepare_leaves(tmp_path):
    def parts(cfg):
        return next(v for k, v in plan.disk(cfg, plan.shape(cfg)).items() if k.startswith("every row"))

    assert parts(PAPER) == 567_850 * 4096 * 14
    small = resolve("small")
    assert parts(small) == (15_000 + 256) * 2048 * 14
    (tmp_path / "d.jsonl").write_bytes(b"x" * 3000)
    assert parts(PAPER.but(data=str(tmp_path / "d.jsonl"))) == 14_000


def test_sampling_takes_longer_without_a_cache_and_shorter_with_more_processes():
    hours = {c: plan.plan(PAPER.but(cache=c))["sampling_hours"]["H100"] for c in ("none", "prefix", "dual")}
    assert hours["none"] > hours["prefix"] > hours["dual"] > 0
    two = plan.plan(PAPER.but(sample_processes=2))["sampling_hours"]["H100"]
    assert two == pytest.approx(4 * hours["none"])
    assert plan.plan(PAPER.but(workers=1))["scoring_hours"] == pytest.approx(2 * (164 * 0.22 + 378 * 0.5) / 3600)
