"""Real training runs through the deepspeed launcher: two processes, ZeRO-2, a few steps."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from treediff import cli, pipeline
from treediff.config import resolve
from treediff.errors import Preempted, UserError
from treediff.files import write_json
from treediff.masking import tokens
from treediff.model import checkpoint
from treediff.sampling import diffusion
from treediff.training import checkpoints, heartbeat, launch, steplog, train

SHORT: dict = {
    "rows": 40,
    "max_steps": 60,
    "micro_batch": 2,
    "accumulation": 1,
    "processes": 2,
    "checkpoint_every": 12,
    "d_model": 32,
    "n_layers": 2,
    "mlp_hidden": 48,
    "eval_every": 20,
    "eval_rows": 10,
}
SHORT |= {"pretrain": {"rows": 60, "max_steps": 3, "micro_batch": 2}}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One finished run of each kind (a backbone, an AST fine-tune) that the tests look at."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TREEDIFF_RUNS", str(tmp_path_factory.mktemp("runs")))
    cfg = resolve("tiny", **SHORT)
    pipeline.trained(cfg)
    yield cfg
    patch.undo()


def test_a_run_leaves_what_the_contract_says(done):
    for run in (done, done.with_masking("none")):
        assert json.loads((run.run_dir / "config.json").read_text())["masking"] == run.masking
        provenance = json.loads((run.run_dir / "provenance.json").read_text())
        assert provenance["versions"]["torch"] == version("torch")
        log = steplog.read_log(run.run_dir)
        assert [r["step"] for r in log] == list(range(run.max_steps))
        assert all(len(r["uids"]) == run.rows_per_step for r in log)
        assert not list(run.run_dir.glob("*.tmp"))
    assert (done.run_dir / "adapter" / "adapter_config.json").exists()
    assert (done.with_masking("none").run_dir / "model" / "model.safetensors").exists()


def test_only_the_adapter_was_trained(done):
    weights = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert len(weights) == 2 * 7 * done.n_layers
    assert any(w.abs().max() > 0 for name, w in weights.items() if "lora_B" in name)  # B starts at 0
    base, tuned = diffusion.load_run(done.with_masking("none")), diffusion.load_run(done)
    same = [torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True)]
    assert sum(not s for s in same) == 7 * done.n_layers


def test_a_finished_run_is_used_again(done):
    before = (done.run_dir / "provenance.json").stat().st_mtime_ns
    pipeline.trained(done)
    assert (done.run_dir / "provenance.json").stat().st_mtime_ns == before


def ranks(run_dir):
    """Process ids of the ranks that have begun, by rank."""
    found = {}
    for path in sorted(run_dir.glob(".rank*.alive")):
        if pid := path.read_text().rpartition(":")[2]:
            found[int(path.name[5:-6])] = int(pid)
    return found


def gone(pids):
    """Whether the processes end within a moment."""
    for _ in range(50):
        if all(heartbeat.state(pid) in "ZX" for pid in pids):
            return True
        time.sleep(0.1)
    return False


def kill_rank(process, run_dir):
    os.kill(ranks(run_dir)[random.randrange(2)], signal.SIGKILL)


def kill_launcher(process, run_dir):
    os.kill(process.pid, signal.SIGKILL)


def kill_all(process, run_dir):
    os.killpg(process.pid, signal.SIGKILL)


def stop_rank(process, run_dir):
    os.kill(ranks(run_dir)[1], signal.SIGSTOP)


def interrupted(monkeypatch, cfg, way, step, error, most=0):
    """Train until the log shows `step`, do `way` to it, and see `error`; nothing of it may be left running."""
    real = launch.subprocess.Popen
    alive, limits = [], {}
    if most:  # what a rank may write to one file [bytes]
        limits["preexec_fn"] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    def popen(*args, **kwargs):
        process = real(*args, **kwargs, **limits)
        threading.Thread(target=act, args=(process,)).start()
        return process

    def act(process):
        while process.poll() is None:
            if len(steplog.read_log(cfg.run_dir)) > step and len(ranks(cfg.run_dir)) == 2:
                alive.extend(ranks(cfg.run_dir).values())
                time.sleep(random.uniform(0, 0.05))
                return way(process, cfg.run_dir) if way else None
            time.sleep(0.002)

    with monkeypatch.context() as patch:
        patch.setattr(launch.subprocess, "Popen", popen)
        with pytest.raises(error[0], match=error[1]):
            pipeline.trained(cfg)
    assert not launch.is_trained(cfg)
    assert gone(alive)


def logged(run_dir):
    """What the log says of the training itself."""
    return [{k: r[k] for k in ("step", "loss", "p", "uids", "grad_norm")} for r in steplog.read_log(run_dir)]


def rewind(folder):
    """Leave no checkpoint after step 24, so that there is room for another end; the last one's step."""
    for step in checkpoints.steps(folder):
        if step > 24:
            shutil.rmtree(folder / f"step-{step}")
    return max(checkpoints.steps(folder), default=0)


WAYS = [
    (kill_rank, (UserError, "failed")),
    (kill_launcher, (UserError, "failed")),
    (kill_all, (UserError, "failed")),
    (stop_rank, (UserError, r"hung: a rank showed no sign of life for 4 s .*rank1: does not answer")),
]


@pytest.mark.parametrize("rounds", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_like_one_that_is_not(
    done, monkeypatch, tmp_path, rounds
):
    """A rank, the launcher or everything is killed, a rank hangs, the disk is full; each time the run goes on."""
    seed = random.randrange(10**6)
    random.seed(seed)
    print(f"random seed {seed}")
    shutil.copytree(done.preset_dir, tmp_path / "runs" / "tiny")
    want = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    log, evals = logged(done.run_dir), steplog.read_log(done.run_dir, "evals.jsonl")
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    shutil.rmtree(done.run_dir / "adapter")
    (done.run_dir / "log.jsonl").unlink()
    cfg = done.but(stall_timeout=4.0)
    folder = cfg.run_dir / "checkpoints"
    for _ in range(rounds):
        for way, error in random.sample(WAYS, len(WAYS)):
            first = rewind(folder)
            interrupted(monkeypatch, cfg, way, random.randrange(first, 30), error)
            assert len(checkpoints.steps(folder)) <= checkpoints.KEEP
    (cfg.run_dir / "train.log").unlink()
    if not rewind(folder):
        interrupted(monkeypatch, cfg, kill_all, 14, (UserError, "failed"))
    kept = checkpoints.steps(folder)
    full = r"rank\d: .*step-\d+: the checkpoint cannot be written .*Make room"
    interrupted(monkeypatch, cfg, None, 0, (UserError, full), most=40_000)
    assert checkpoints.steps(folder) == kept != []
    assert {p.name for p in folder.glob("step-*")} == {f"step-{k}" for k in kept}
    pipeline.trained(cfg)
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert logged(done.run_dir) == log
    assert steplog.read_log(done.run_dir, "evals.jsonl") == evals
    assert not folder.exists()


def test_a_killed_starter_leaves_no_ranks(done):
    """kill -9 of the process that called `trained`, a notebook's kernel, say."""
    cfg = done.but(seed=4, masking="ast", max_steps=2000)
    shutil.copytree(done.with_masking("none").run_dir, cfg.with_masking("none").run_dir)
    config = cfg.with_masking("none").run_dir / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 4}))
    code = "import json, sys; from treediff import config, pipeline\n"
    code += "pipeline.trained(config.Config(**json.loads(sys.argv[1])))"
    starter = subprocess.Popen([sys.executable, "-c", code, json.dumps(cfg.as_dict())], stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 120
        while len(ranks(cfg.run_dir)) < 2:
            assert starter.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        alive = ranks(cfg.run_dir).values()
    finally:
        starter.kill()
        starter.wait()
    assert gone(alive)


def test_ctrl_c_ends_the_ranks(done, monkeypatch):
    cfg = done.but(seed=3, masking="ast", max_steps=400)
    shutil.copytree(done.with_masking("none").run_dir, cfg.with_masking("none").run_dir)
    config = cfg.with_masking("none").run_dir / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "seed": 3}))
    alive = []

    def sleep(seconds, real=time.sleep):
        if threading.current_thread() is threading.main_thread() and len(ranks(cfg.run_dir)) == 2:
            alive.extend(ranks(cfg.run_dir).values())
            raise KeyboardInterrupt
        real(seconds)

    with monkeypatch.context() as patch:
        patch.setattr(launch.time, "sleep", sleep)
        with pytest.raises(KeyboardInterrupt):
            pipeline.trained(cfg)
    assert alive
    assert gone(alive)


def test_strategies_see_the_same_samples_in_the_same_order_at_the_same_noise(done):
    logs = {}
    for masking in ("random", "ast_span", "ast"):
        logs[masking] = steplog.read_log(pipeline.trained(done.with_masking(masking)))
    for step, (a, b, c) in enumerate(zip(*logs.values(), strict=True)):
        for name in ("step", "uids", "p", "lr", "eps_t", "tokens"):
            assert a[name] == b[name] == c[name], (step, name)
        # Reasoning (and the end of text) is masked alike; of code, other tokens.
        for other in (b, c):
            assert a["masked_by_label"]["reasoning"] == other["masked_by_label"]["reasoning"]
    assert logs["random"][0]["masked_by_label"] != logs["ast"][0]["masked_by_label"]
    held = [steplog.read_log(done.with_masking(m).run_dir, "evals.jsonl") for m in logs]
    assert held[0][0] == held[1][0] == held[2][0]  # before the first step
    assert [r["step"] for r in held[0]] == [0, 20, 40, 60]
    assert len({r[-1]["loss"] for r in held}) == 3


def test_two_nodes_of_one_process_without_evaluation_are_one_of_two_with_it(done, monkeypatch, tmp_path):
    shutil.copytree(done.preset_dir, tmp_path / "runs" / "tiny")
    want = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    shutil.rmtree(done.run_dir)
    port = str(launch.free_port())
    argv = [sys.executable, "-m", "treediff.cli", "train", "--masking", "ast", "--nodes", "2", "--master_port", port]
    for name, value in {**SHORT, "eval_every": 0}.items():
        argv += [f"--{name}", json.dumps(value)]
    nodes = [
        subprocess.Popen([*argv, "--node_rank", str(n)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        for n in range(2)
    ]
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 0, said.decode()[-2000:]
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert not (done.run_dir / "evals.jsonl").exists()


def cli_of(cfg, *more):
    """A `treediff train` of these switches, in a process of its own."""
    argv = [sys.executable, "-m", "treediff.cli", "train", "--masking", "ast", *more]
    for name, value in SHORT.items():
        argv += [f"--{name}", json.dumps(value)]
    return argv


def test_sigterm_ends_a_run_after_a_checkpoint_and_the_same_command_goes_on(done, monkeypatch, tmp_path):
    """To the very same weights; the exit code says that it was asked to stop."""
    shutil.copytree(done.preset_dir, tmp_path / "runs" / "tiny")
    want = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    log, evals = logged(done.run_dir), steplog.read_log(done.run_dir, "evals.jsonl")
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    shutil.rmtree(done.run_dir)
    starter = subprocess.Popen(cli_of(done), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 300
    while len(steplog.read_log(done.run_dir)) < 4 and time.monotonic() < until:
        assert starter.poll() is None
        time.sleep(0.01)
    alive = list(ranks(done.run_dir).values())
    starter.terminate()
    _, said = starter.communicate(timeout=200)
    assert starter.returncode == Preempted.EXIT, said.decode()[-2000:]
    assert gone(alive)
    steps = checkpoints.steps(done.run_dir / "checkpoints")
    assert f"stopped as asked; the same command goes on from checkpoints/step-{steps[-1]}" in said.decode()
    assert len(steplog.read_log(done.run_dir)) == steps[-1] < done.max_steps
    pipeline.trained(done)
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(got[k], want[k]) for k in want)
    assert logged(done.run_dir) == log
    assert steplog.read_log(done.run_dir, "evals.jsonl") == evals


def test_nodes_that_do_not_share_the_runs_folder_are_refused(done, monkeypatch, tmp_path):
    port = str(launch.free_port())
    nodes = []
    for n in range(2):
        shutil.copytree(done.preset_dir, tmp_path / f"runs{n}" / "tiny")
        shutil.rmtree(tmp_path / f"runs{n}" / "tiny" / done.run_dir.name)
        argv = cli_of(done, "--nodes", "2", "--master_port", port, "--node_rank", str(n))
        env = {**os.environ, "TREEDIFF_RUNS": str(tmp_path / f"runs{n}")}
        nodes.append(subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env))
    for node in nodes:
        _, said = node.communicate(timeout=300)
        assert node.returncode == 2
        assert "this folder is not the same for every rank (1 see another one than rank 0)" in said.decode()


def test_by_ssh_ranks_are_told_where_the_models_lie(done, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", "/share/hf")
    env = launch.passed_on(tmp_path, launch.environment(done))
    lines = Path(env["DS_ENV_FILE"]).read_text().splitlines()
    assert "HF_HOME=/share/hf" in lines
    assert all("=" in line for line in lines)
    assert launch.command(done, tmp_path, "/share/hf/snapshot")[-2:] == [str(tmp_path), "/share/hf/snapshot"]
    with pytest.raises(UserError, match=r"backbone: /share/hf/none is not on .*; set HF_HOME"):
        train.network(done, None, torch.device("cpu"), "/share/hf/none")


@pytest.mark.slow
def test_one_process_with_two_micro_batches_makes_the_same_updates_as_two_processes(done, monkeypatch, tmp_path):
    shutil.copytree(done.preset_dir, tmp_path / "runs" / "tiny")
    want, log = load_file(done.run_dir / "adapter" / "adapter_model.safetensors"), logged(done.run_dir)
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    shutil.rmtree(done.run_dir)
    cfg = done.but(processes=1, accumulation=2)
    write_json(cfg.with_masking("none").run_dir / "config.json", cfg.with_masking("none").as_dict())
    pipeline.trained(cfg)
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(got[k], want[k], atol=1e-4) for k in want)  # AdamW divides by what may be rounding
    for a, b in zip(log, logged(done.run_dir), strict=True):
        assert (a["uids"], a["p"]) == (b["uids"], b["p"])
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6)


def test_zero_3_trains_resumes_and_leaves_the_same_adapter(done, monkeypatch, tmp_path):
    shutil.copytree(done.preset_dir, tmp_path / "runs" / "tiny")
    want = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path / "runs"))
    shutil.rmtree(done.run_dir)
    cfg = done.but(zero_stage=3)
    interrupted(monkeypatch, cfg, kill_all, 26, (UserError, "failed"))
    assert checkpoints.steps(cfg.run_dir / "checkpoints")
    pipeline.trained(cfg)
    got = load_file(done.run_dir / "adapter" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.allclose(got[k], want[k], atol=1e-5) for k in want)


def test_the_exported_model_is_the_merged_one(done, tmp_path, capsys):
    argv = ["export", str(tmp_path / "out"), "--masking", "ast"]
    for name, value in SHORT.items():
        argv += [f"--{name}", json.dumps(value)]
    cli.main(argv)
    net, merged = checkpoint.load_backbone(str(tmp_path / "out")), diffusion.load_run(done)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), merged.parameters(), strict=True))
    checkpoint.check_tokenizer(net, tokens.load_tokenizer(str(tmp_path / "out")))
    with pytest.raises(SystemExit):
        cli.main(argv)
    assert "exists already" in capsys.readouterr().err


def test_the_error_shown_is_the_rank_s_own(done):
    with pytest.raises(UserError, match=r"rank\d: loss is nan at step \d"):
        pipeline.trained(done.but(seed=1, lr=1e30, pretrain={**done.pretrain, "lr": 1e30, "muon_lr": 1e30}))


def test_the_command_is_deepspeed_s(done, monkeypatch):
    command = launch.command(done, done.run_dir)
    assert command[1:5] == ["-m", "deepspeed.launcher.runner", "--num_gpus", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,6")
    assert launch.command(done, done.run_dir)[3:5] == ["--include", "localhost:3,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert launch.command(done, done.run_dir)[3:5] == ["--num_gpus", "2"]
    assert command[-3:] == ["--module", "treediff.training.train", str(done.run_dir)]
    assert train.deepspeed_config(done, 100)["zero_optimization"]["stage"] == 2
    assert "data_types" not in train.deepspeed_config(done, 100)  # float32 as it is
    assert train.deepspeed_config(done.but(precision="bf16"), 100)["data_types"] == {"grad_accum_dtype": "fp32"}


def test_the_command_for_several_nodes(done, tmp_path):
    with pytest.raises(UserError, match="master_port: must be given"):
        done.but(nodes=2)
    by_hand = launch.command(done.but(nodes=2, node_rank=1, master_port=29500, master_addr="10.0.0.1"), tmp_path)
    for words in (["--no_ssh", "--node_rank", "1"], ["--master_addr", "10.0.0.1"], ["--master_port", "29500"]):
        at = by_hand.index(words[0])
        assert by_hand[at : at + len(words)] == words
    by_ssh = launch.command(done.but(nodes=2, hostfile="hosts"), tmp_path)
    assert by_ssh[3:9] == ["--num_gpus", "1", "--hostfile", "hosts", "--num_nodes", "2"]
    assert "--master_addr" not in by_ssh
    with pytest.raises(UserError, match="nodes: must divide processes 2"):
        done.but(nodes=3)
    with pytest.raises(UserError, match="hostfile: there is no file"):
        pipeline.trained(done.but(seed=9, masking="none", hostfile=str(tmp_path / "none")))
