"""What runs cost: every attempt counts, however it ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from treediff import usage
from treediff.errors import Preempted, UserError
from treediff.report import report


def test_every_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(usage.time, "monotonic", iter(range(0, 10_000, 100)).__next__)
    with usage.attempt(tmp_path, "train", gpus=4):
        pass
    for error in (UserError("no"), Preempted("later"), KeyboardInterrupt(), ValueError()):
        with pytest.raises(type(error)), usage.attempt(tmp_path, "train", gpus=4):
            raise error
    monkeypatch.undo()
    states = sorted(a["state"] for a in usage.attempts(tmp_path))
    assert states == ["done", "failed", "failed", "stopped", "stopped"]
    found = usage.total(tmp_path)["train"]
    assert (found["attempts"], found["not_finished"]) == (5, 4)
    assert found["gpu_hours"] == pytest.approx(4 * found["seconds"] / 3600, abs=1e-3)
    assert found["seconds"] >= 500
    table = report.cost_table({"ast-seed0": {"train": found}})
    assert table.rows[0][:4] == ["ast-seed0", "train", 5, 4]


def test_work_that_was_there_leaves_no_account(tmp_path):
    with usage.attempt(tmp_path, "score", gpus=0):
        pass
    assert usage.total(tmp_path) == {}
    assert report.cost_table({}) is None


def test_a_killed_attempt_counts_to_its_last_sign(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from treediff import usage; usage.EVERY = 0.1\n"
        "with usage.attempt(Path(sys.argv[1]), 'sample', 2): print('begun', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"begun\n"
    time.sleep(0.6)
    assert [a["state"] for a in usage.attempts(tmp_path)] == ["running"]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    [found] = usage.attempts(tmp_path)
    assert found["state"] == "killed"
    assert 0.2 < found["seconds"] < 30
    assert usage.total(tmp_path)["sample"]["not_finished"] == 1


def test_a_package_s_counter_is_read_and_starts_anew_at_its_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "RAPL", tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:1", "intel-rapl:0:0"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("900000000")
        (tmp_path / name / "max_energy_range_uj").write_text("1000000000")
    meter = usage.Meter()
    assert meter.joules()["packages"] == 0
    (tmp_path / "intel-rapl:0/energy_uj").write_text("950000000")  # 50 J
    assert meter.joules()["packages"] == 50
    (tmp_path / "intel-rapl:0/energy_uj").write_text("20000000")  # 70 J, over the limit
    (tmp_path / "intel-rapl:0:0/energy_uj").write_text("990000000")  # within package 0: not counted twice
    assert meter.joules()["packages"] == 120


def test_a_machine_without_counters_says_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(usage, "RAPL", tmp_path)
    monkeypatch.setattr(usage, "_gpu_counters", list)
    assert usage.Meter().joules() == {}


def test_joules_are_summed_only_where_every_attempt_has_them(tmp_path, monkeypatch):
    counted = iter([{"gpus": 10.0, "packages": 1.0}, {"gpus": 5.0}])
    for found in counted:
        monkeypatch.setattr(usage.Meter, "joules", lambda _, found=found: found)
        with pytest.raises(ValueError), usage.attempt(tmp_path, "train", 1):  # noqa: PT011
            raise ValueError
    assert usage.total(tmp_path)["train"]["joules"] == {"gpus": 15.0}
