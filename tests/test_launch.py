"""Real training runs through the deepspeed launcher: two processes, ZeRO-2, a few steps."""

import json
import os
import shutil
import signal
import threading
import time
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import load_file

from treediff import answers, launch, steplog, train
from treediff.config import UserError, resolve

SHORT: dict = {
    "rows": 40,
    "max_steps": 20,
    "micro_batch": 2,
    "checkpoint_every": 4,
    "d_model": 32,
    "n_layers": 2,
    "mlp_hidden": 48,
}
SHORT |= {"pretrain": {"rows": 60, "max_steps": 3, "micro_batch": 2}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run of each kind (a backbone, an AST fine-tune) that the tests look at."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TREEDIFF_RUNS", str(tmp_path_factory.mktemp("runs")))
    cfg = resolve("tiny", **SHORT)
    launch.trained(cfg)
    yield cfg
    patch.undo()


def test_a_run_leaves_what_the_contract_says(done):
    for run in (done, done.with_masking("base")):
        assert json.loads((run.run_dir / "config.json").read_text())["masking"] == run.masking
        provenance = json.loads((run.run_dir / "provenance.json").read_text())
        assert provenance["versions"]["torch"] == version("torch")
        log = steplog.read_log(run.run_dir)
        assert [r["step"] for r in log] == list(range(run.max_steps))
        assert all(len(r["uids"]) == run.rows_per_step for r in log)
        assert not list(run.run_dir.glob("*.tmp"))
    assert (done.run_dir / "adapter" / "adapter_config.json").exists()
    assert (done.with_masking("base").run_dir / "model" / "model.safetensors").exists()


def test_only_the_adapter_was_trained(done):
    weights = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * done.n_layers
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)  # B starts at 0
    base, tuned = answers.load_run(done.with_masking("base")), answers.load_run(done)
    same = [torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)]
    assert sum(not s for s in same) == 7 * done.n_layers


def test_a_finished_run_is_used_again(done):
    before = (done.run_dir / "provenance.json").stat().st_mtime_ns
    launch.trained(done)
    assert (done.run_dir / "provenance.json").stat().st_mtime_ns == before


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(done, monkeypatch, tmp_path):
    """Stop at a checkpoint (as after kill -9), go on, and compare with the run that was never stopped."""
    root = tmp_path / "runs" / "tiny"
    shutil.copytree(done.preset_dir, root)
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    want = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    log = (done.run_dir / "log.jsonl").read_text()
    shutil.rmtree(done.run_dir / "adapter")
    real = launch.subprocess.Popen

    def popen(*args, **kwargs):
        process = real(*args, **kwargs)
        threading.Thread(target=kill, args=(process,)).start()
        return process

    def kill(process):
        while process.poll() is None:
            if list((done.run_dir / "checkpoints").glob("step-*/complete")):
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.002)

    with monkeypatch.context() as patch:
        patch.setattr(launch.subprocess, "Popen", popen)
        with pytest.raises(UserError, match="failed"):
            launch.trained(done)
    assert not launch.is_trained(done)
    launch.trained(done)
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    losses = [
        [json.loads(x)["loss"] for x in text.splitlines()] for text in (log, (done.run_dir / "log.jsonl").read_text())
    ]
    assert losses[0] == losses[1]


def test_the_error_shown_is_the_rank_s_own(done):
    with pytest.raises(UserError, match=r"rank\d: loss is nan at step \d"):
        launch.trained(done.but(seed=1, lr=1e30, pretrain={**done.pretrain, "lr": 1e30, "muon_lr": 1e30}))


def test_the_command_is_deepspeed_s(done):
    command = launch.command(done, done.run_dir)
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    assert command[-3:] == ["--module", "treediff.train", str(done.run_dir)]
    assert train.deepspeed_config(done, 100)["zero_optimization"]["stage"] == 2
