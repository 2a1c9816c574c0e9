"""The training benchmarks run, at a scale whose figures mean nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(*argv: str) -> str:
    done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "variants",
    [
        "all,all_logits",
        pytest.param("attention_mask,boolean_index,plain_adamw,no_recomputation", marks=pytest.mark.slow),
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
    run(str(FOLDER / "gpu_train.py"), "--scale", "1b", "--variants", "all,no_recomputation", "--out", str(out))
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
