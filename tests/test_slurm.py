"""The batch scripts in slurm/, run as SLURM would, with its variables set and its commands played by small scripts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sampling_run import run  # noqa: F401 (a fixture)

from treediff.config import SWITCHES, resolve
from treediff.data import prepare
from treediff.files import read_json
from treediff.sampling.run import samples_path
from treediff.scoring.run import ledger_path
from treediff.training import steplog

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "slurm").glob("*.sh"))
SRUN = """#!/bin/bash
# The command once for each node, at once; SIGTERM goes to all; the worst exit code counts.
while [[ "$1" == --* ]]; do shift; done
for ((n = 0; n < ${SLURM_JOB_NUM_NODES:-1}; n++)); do SLURM_NODEID=$n "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
worst=0
for pid in "${pids[@]}"; do
    wait "$pid"; code=$?
    while [ $code -gt 128 ] && kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
    if [ $code -gt $worst ]; then worst=$code; fi
done
exit $worst
"""
SCONTROL = """#!/bin/bash
case "$1" in
    show) echo 127.0.0.1; echo another ;;
    *) echo "$*" >>"$REQUEUED" ;;
esac
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts a script of slurm/ with these variables of SLURM's."""
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def start(script, *args, **variables):
        own = {f"SLURM_{k.upper()}": str(v) for k, v in variables.items()}
        env = {**os.environ, "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}", **own}
        env |= {"REQUEUED": str(tmp_path / "requeued"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        env.setdefault("SLURM_JOB_ID", "4242")
        command = ["bash", ROOT / "slurm" / script, *map(str, args)]
        out = (tmp_path / "out").open("ab")
        return subprocess.Popen(command, env=env, stdout=out, stderr=out, cwd=tmp_path, start_new_session=True)

    yield lambda *a, **v: start(*a, **v)
    shutil.rmtree(stubs)


def options(cfg):
    """The switches of a configuration that are not its preset's, as a command line has them."""
    usual = resolve(cfg.preset, masking=cfg.masking, seed=cfg.seed)
    found = []
    for name in SWITCHES:
        if (value := getattr(cfg, name)) != getattr(usual, name):
            found += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_is_sound_and_its_head_shows_how_it_is_sent(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).returncode == 0
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/bin/bash\n")
    assert re.search(rf"(?m)^#   .*sbatch .*slurm/{script.name} ", text)
    for line in re.findall(r"(?m)^#SBATCH (.*)$", text):
        assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", word) for word in line.split()), line
    # A directive behind the first command is none.
    first = next(i for i, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in text.splitlines()[first:])


def test_an_array_job_prepares_shares_and_a_last_job_puts_them_together(slurm, tmp_path, runs):
    out = tmp_path / "data"
    args = ("--preset", "tiny", "--rows", 60, "--vocab_size", 400, "--workers", 1, "--out", out)
    elements = [slurm("prepare.sh", *args, array_task_id=k, array_task_count=2) for k in range(2)]
    assert [e.wait(300) for e in elements] == [0, 0]
    assert not out.exists()
    assert list(tmp_path.glob(".data.parts/*/*.arrow"))
    assert slurm("prepare.sh", *args).wait(300) == 0
    cfg = resolve("tiny", rows=60, vocab_size=400, workers=1)
    in_one_call = prepare.prepare(cfg)
    assert prepare.load(cfg, out)["uid"][:].tolist() == in_one_call["uid"][:].tolist()
    assert len(in_one_call) > 20
    assert slurm("prepare.sh", *args, array_task_id=5, array_task_count=2).wait(300) == 2
    assert "share: 5/2 is none of 0/2 to 1/2" in (tmp_path / "out").read_text()


SHORT = ("--preset", "tiny", "--masking", "ast", "--rows", 40, "--micro_batch", 2, "--d_model", 32, "--n_layers", 2)
SHORT += ("--mlp_hidden", 48, "--eval_rows", 4, "--eval_every", 0, "--checkpoint_every", 50, "--zero_stage", 2)
SHORT += ("--pretrain.rows", 60, "--pretrain.max_steps", 2, "--pretrain.micro_batch", 2)


def stopped_and_sent_again(slurm, tmp_path, runs, steps, **variables):
    """A training job is warned in its middle, checkpoints, asks for its requeue, and ends well when it comes again."""
    args = (*SHORT, "--max_steps", steps, "--accumulation", 1)
    job = slurm("train.sh", *args, **variables)
    log = runs / "tiny/ast-seed0/log.jsonl"
    until = time.monotonic() + 400
    while not (log.exists() and log.read_text().count("\n") > 5):
        assert job.poll() is None, (tmp_path / "out").read_text()
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)  # B:TERM: to the batch script alone
    assert job.wait(200) == 75, (tmp_path / "out").read_text()
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 4242"]
    assert len(steplog.read_log(log.parent)) < steps
    assert slurm("train.sh", *args, **variables).wait(500) == 0, (tmp_path / "out").read_text()
    assert [r["step"] for r in steplog.read_log(log.parent)] == list(range(steps))
    assert (log.parent / "adapter").is_dir()
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
    made = read_json(log.parent / "config.json")
    processes = variables.get("job_num_nodes", 1) * variables["gpus_on_node"]
    assert (made["processes"], made["nodes"]) == (processes, variables.get("job_num_nodes", 1))


@pytest.mark.slow
def test_a_preempted_training_job_goes_back_into_the_queue_and_on_from_there(slurm, tmp_path, runs):
    stopped_and_sent_again(slurm, tmp_path, runs, 400, gpus_on_node=1)


@pytest.mark.slow
def test_two_nodes_train_one_run_and_are_stopped_together(slurm, tmp_path, runs):
    nodes = {"job_num_nodes": 2, "job_nodelist": "node[0-1]"}
    stopped_and_sent_again(slurm, tmp_path, runs, 150, gpus_on_node=1, **nodes)


def test_the_script_hands_the_warning_on_and_requeues_a_training_that_ends_with_75(slurm, tmp_path):
    """With a stand-in for treediff, so that it is quick; the two slow tests above do it with real trainings."""
    (tmp_path / "bin" / "treediff").write_text(
        f"#!{sys.executable}\nimport signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.5), sys.exit(75)))\n"
        "open('begun', 'w').close()\ntime.sleep(60)\n"
    )
    (tmp_path / "bin" / "treediff").chmod(0o755)
    job = slurm("train.sh", "--masking", "ast", gpus_on_node=1)
    until = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait(60) == 75
    assert (tmp_path / "requeued").read_text() == "requeue 4242\n"


def test_a_training_that_fails_is_not_sent_again(slurm, tmp_path, runs):
    assert slurm("train.sh", *SHORT, "--max_stepps", 3).wait(300) == 2
    assert "did you mean max_steps" in (tmp_path / "out").read_text()
    assert not (tmp_path / "requeued").exists()


@pytest.mark.slow
def test_two_nodes_share_the_prompts(slurm, tmp_path, run):  # noqa: F811
    args = ("--preset", "tiny", "--masking", "none", *options(run.but(limit=4)))
    nodes = {"job_num_nodes": 2, "job_nodelist": "node[0-1]", "gpus_on_node": 1}
    assert slurm("sample.sh", *args, **nodes).wait(500) == 0, (tmp_path / "out").read_text()
    path = samples_path(run, "tinycode", 32)
    assert len(path.read_text().splitlines()) == 4
    assert not list(path.parent.glob(".*.part"))
    assert (tmp_path / "out").read_text().count(f"{path}\n") == 3  # both nodes, and the script at the end


def test_an_element_of_an_array_job_scores_its_run(slurm, tmp_path, run):  # noqa: F811
    args = ("--preset", "tiny", *options(run.but(limit=4)))
    job = slurm("score.sh", "random none", "3 0", *args, array_task_id=3)
    assert job.wait(500) == 0, (tmp_path / "out").read_text()
    assert len(read_json(ledger_path(run, "tinycode", 32))["tasks"]) == 4
    assert slurm("score.sh", "random none", "3 0", *args, array_task_id=4).wait(60) == 2
    assert "element 4 of 4; give --array=0-3" in (tmp_path / "out").read_text()
    assert slurm("score.sh", "none", "0").wait(60) != 0
    assert "start it as an array job" in (tmp_path / "out").read_text()
