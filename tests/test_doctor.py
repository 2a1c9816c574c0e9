"""treediff doctor: what is missing is told with its price and a way out, and the exit code follows."""

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from treediff import cli, doctor
from treediff.config import resolve
from treediff.sandbox import client


def one(check, cfg=None) -> doctor.Check:
    (found,) = check(cfg or resolve("tiny"))
    return found


def test_a_tiny_run_can_be_made_here_and_json_says_the_same(runs):
    ask = [sys.executable, "-m", "treediff.cli", "doctor", "--json"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=200)
    checks = json.loads(done.stdout)
    assert done.returncode == any(c["state"] == "missing" for c in checks) == 0, done.stdout
    assert max(Counter(c["name"] for c in checks).values()) == 1
    for c in checks:
        assert (c["costs"] != "" and c["get"] != "") == (c["state"] != "ok"), c
    assert {"Python", "packages", "GPU", "CUDA", "DeepSpeed", "NCCL", "disk", "hub", "sandbox"} <= {
        c["name"] for c in checks
    }
    assert not runs.exists()


def test_the_paper_s_run_lacks_what_it_needs_and_the_exit_code_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "reached", lambda address: f"{address} does not answer")
    monkeypatch.setattr(doctor, "deepspeed", lambda cfg: [])
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**15))
    with pytest.raises(SystemExit, match=r"^1$"):
        cli.main(["doctor", "--preset", "paper", "--benchmark_files.mbpp", "/nowhere"])
    lines = capsys.readouterr().out.splitlines()
    assert [x.split()[1] for x in lines if x.startswith("missing")] == ["GPU", "hub", "humaneval", "mbpp"]
    assert any("no such file" in x for x in lines)


def test_local_copies_need_no_hub(tmp_path):
    there = dict.fromkeys(("backbone", "tokenizer", "data"), str(tmp_path))
    assert one(doctor.hub, resolve("paper", **there)).state == "ok"


@pytest.mark.parametrize(("driver", "cuda", "state"), [("580.95", "13.0", "ok"), ("570.1", "13.0", "lacking")])
def test_the_driver_must_be_new_enough_for_torch_s_cuda(monkeypatch, driver, cuda, state):
    monkeypatch.setattr(doctor, "_smi", lambda: [["NVIDIA H100", "81559", driver]])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = one(doctor.driver)
    assert found.state == state
    assert ("580" in found.costs) == (state != "ok")


def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch):
    monkeypatch.setattr(doctor, "_smi", lambda: [["NVIDIA H100", "81559", "580.95"]])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "cannot use" in one(doctor.gpu).found
    assert "cuda.lock" in one(doctor.driver).get


def test_packages_are_held_against_the_lock(monkeypatch):
    pins = doctor.lock()
    assert pins["torch"] == torch.__version__.partition("+")[0]
    monkeypatch.setattr(doctor, "lock", lambda: {**pins, "numpy": "0.0.1"})
    found = one(doctor.packages)
    assert (found.state, "numpy" in found.found) == ("lacking", True)
    real = doctor.importlib.metadata.version

    def without(name):
        if name == "deepspeed":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", without)
    found = one(doctor.packages)
    assert (found.state, "deepspeed" in found.costs) == ("missing", True)


def test_a_layer_that_does_not_hold_is_told(monkeypatch):
    whole = client.Sandbox
    monkeypatch.setattr(client, "Sandbox", lambda: whole(without=["network", "seccomp"]))
    found = one(doctor.sandbox)
    assert (found.state, "seccomp: absent" in found.found) == ("lacking", True)


def test_a_disk_too_small_is_missing(monkeypatch, runs):
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda where: usage._replace(free=1000))
    assert one(doctor.disk).state == "missing"


def test_a_check_that_fails_is_a_finding(monkeypatch):
    def broken(cfg):
        raise ImportError("libtorch_cuda.so: cannot open")

    monkeypatch.setattr(doctor, "nccl", broken)
    monkeypatch.setattr(doctor, "deepspeed", lambda cfg: [])
    found = [c for c in doctor.examine(resolve("tiny")) if "libtorch" in c.found]
    assert [c.state for c in found] == ["missing"]
