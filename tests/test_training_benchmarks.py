"""The training benchmarks run, at a scale whose figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from treediff.config import resolve
from treediff.training import memory
from treediff.training.memory import Shape

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "variants",
    [
        "all,all_logits",
        pytest.param("attention_mask,boolean_index,plain_adamw,recomputation", marks=pytest.mark.slow),
    ],
)
def test_gpu_training_at_tiny_scale(tmp_path, variants):
    out = tmp_path / "gpu.json"
    run(str(FOLDER / "gpu_train.py"), "--scale", "tiny", "--steps", "1", "--variants", variants, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["versions"]["torch"]
    assert list(found["variants"]) == variants.split(",")
    for result in found["variants"].values():
        assert result["tokens_per_s"] > 0
        assert result["mfu"] > 0
        assert result["loss_is_finite"]


@pytest.mark.gpu
def test_the_memory_plan_holds_on_a_gpu(tmp_path):
    out = tmp_path / "gpu.json"
    run(str(FOLDER / "gpu_train.py"), "--scale", "1b", "--variants", "all,recomputation", "--out", str(out))
    for result in json.loads(out.read_text())["variants"].values():
        assert result["planned_memory"] == pytest.approx(result["peak_memory"], rel=0.15)


def test_the_training_benchmark_compares_equal_gradients(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import training

    monkeypatch.setattr(training, "VOCABULARY", 2000)
    monkeypatch.setattr(training, "MASK", 1999)
    draw = training.torch.randint
    monkeypatch.setattr(training.torch, "randint", lambda low, high, *a, **k: draw(low, 1900, *a, **k))
    sizes = {"d_model": 32, "n_layers": 1, "rows": 2, "length": 24, "runs": 1, "share": 0.5}
    found = training.compare(training.argparse.Namespace(**sizes))
    assert found["gradient_difference"] < 1e-5
    assert found["loss_difference"] < 1e-6
    assert found["ratio"] > 0


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_paper_s_run_is_rehearsed(short):
    """From a stand-in hub: no prompt, no warning, nothing fetched twice, nothing outside the folders."""
    said = run(str(FOLDER / "rehearse.py"), *(["--short"] if short else []))
    assert "no prompt, no warning, no second download, nothing outside" in said


def test_what_waits_for_a_gpu_goes_on_where_it_stopped(tmp_path, monkeypatch):
    """One piece at a scale that means nothing; a result that is there is kept, and no GPU is an error."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    assert all(name in gpu.PIECES for name in ("tests", "train-all", "sample-256-1", "rehearsal", "tiny-ast"))
    argv = [str(FOLDER / "gpu.py"), "--out", str(tmp_path), "--cpu", "--only", "train-all"]
    assert "done" in run(*argv)
    result = json.loads((tmp_path / "gpu" / "train-all.json").read_text())
    assert result["figures"]["variants"]["all"]["loss_is_finite"]
    assert "train-all" in (tmp_path / "gpu.md").read_text()
    assert "done" in run(str(FOLDER / "gpu.py"), "--out", str(tmp_path), "--list")
    if not gpu.torch.cuda.is_available():
        done = subprocess.run([sys.executable, str(FOLDER / "gpu.py")], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "no GPU" in done.stderr


def test_wheels_are_those_that_the_machine_lacks(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import wheels

    lock = wheels.pins(wheels.ROOT / "docker" / "cuda.lock")
    old = {**lock, "transformers": "5.17.0"}
    del old["deepspeed"]
    assert wheels.lacking(old) == [f"{name}=={lock[name]}" for name in ("transformers", "deepspeed")]
    every = {line.partition("==")[0] for line in wheels.lacking({})}
    assert {"deepspeed", "pydantic", "pydantic-core", "transformers", "peft"} <= every
    assert not any(name.startswith(("nvidia", "triton", "torch")) for name in every)


def test_what_a_block_asks_of_a_device_is_counted(monkeypatch):
    """The bytes kept are the plan's, but for the mask that dropout keeps; the narrow scale moves fewer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import traffic

    monkeypatch.setattr(traffic.torch.nn.functional, "scaled_dot_product_attention", None)  # replaced, and put back
    (count, kept), (wide, _) = traffic.training(256), traffic.training(256, peft=True)
    assert count.elementwise < wide.elementwise
    assert count.matrices == wide.matrices
    cfg = resolve("paper", max_length=256, gradient_checkpointing="none")
    one, two = (memory.per_device(cfg, Shape(4096, n, 32, 32, 12288, 126464), cuda=False) for n in (1, 2))
    assert kept == pytest.approx(two["activations kept"] - one["activations kept"], rel=0.02)
    assert traffic.sampling().kernels < 60
