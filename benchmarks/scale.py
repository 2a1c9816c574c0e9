"""The paper's run on 1, 8, 64 and 1,024 GPUs: what the plan says of each, and what breaks first.

    python benchmarks/scale.py            # prints docs/scale.md

Nothing is run: every figure follows from `treediff train --plan`'s functions (training/plan.py, training/memory.py) and
the assumptions named here. A test holds docs/scale.md to it.
"""

from __future__ import annotations

import math
import sys

from treediff.config import Config, resolve
from treediff.training import plan

GPUS = (1, 8, 64, 1024)
NODE = 8
"""GPUs of a node."""
NETWORK = 50e9
"""Bytes/s in and out of a GPU over the network: 400 Gb/s each; assumed."""
STORAGE = 10e9
"""Bytes/s that the shared file system gives all nodes together; assumed."""
CORES = 64
"""Cores of a node that scores; assumed."""
SHOWN = ("A100", "H100")


def layout(gpus: int) -> tuple[int, Config]:
    """How many runs of the paper's 128 rows an update go on at once, and the switches of one."""
    cfg = resolve("paper", gpu_memory=80, workers=CORES)
    rows = cfg.rows_per_step
    each = min(gpus, rows // cfg.micro_batch)
    switches = {"processes": each, "accumulation": rows // (each * cfg.micro_batch), "nodes": math.ceil(each / NODE)}
    return gpus // each, cfg.but(**switches, master_port=29500)


def network_share(cfg: Config, hours: float) -> float:
    """The time to add up gradients over the computing time: ZeRO-2 does it for every micro-batch, in bf16, by rings
    (each GPU sends and takes nearly all gradients once), and sends the new weights to all once an update."""
    p = plan.plan(cfg)
    sent = 2.0 * p["trained"] * (cfg.processes - 1) / cfg.processes
    return (cfg.accumulation + 1) * sent / NETWORK * p["steps"] / (hours * 3600)


def sampling(gpus: int, device: str) -> tuple[int, float]:
    """Prompts of the GPU that has the most of them, and hours until it has answered them at both T."""
    cfg = resolve("paper", gpu_memory=80)
    prompts = plan.plan(cfg)["answers"] // len(cfg.lengths)
    most = math.ceil(prompts / gpus)
    alone = cfg.but(sample_processes=1, sample_batch=min(cfg.sample_batch, most))
    return most, plan.plan(alone)["sampling_hours"][device] * most / prompts


def loading(gpus: int) -> float:
    """Seconds until every node has read the backbone from the shared file system."""
    weights = plan.plan(resolve("paper", gpu_memory=80))["memory"]["weights"]
    return math.ceil(gpus / NODE) * weights / STORAGE


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def page() -> str:
    """docs/scale.md."""
    paper = resolve("paper", gpu_memory=80, workers=CORES)
    p = plan.plan(paper)
    train, sample, load = [], [], []
    for gpus in GPUS:
        runs, cfg = layout(gpus)
        of = plan.plan(cfg)
        row = [f"{gpus:,}", str(runs), str(cfg.processes), str(cfg.accumulation)]
        row += [f"{of['hours'][d]:,.1f}" for d in SHOWN]
        row += [f"{100 * network_share(cfg, of['hours'][d]):.2f} %" for d in SHOWN]
        row += [f"{of['memory_total'] / 1e9:.1f} GB", of["recomputed"]]
        train.append(row)
        most = str(sampling(gpus, SHOWN[0])[0])
        sample.append([f"{gpus:,}", most, *(f"{3600 * sampling(gpus, d)[1]:,.0f} s" for d in SHOWN)])
        load.append([f"{gpus:,}", f"{math.ceil(gpus / NODE):,}", f"{loading(gpus):,.0f} s"])
    rows, steps = paper.rows_per_step, p["steps"]
    wider = plan.plan(paper.but(processes=1024, accumulation=1))
    checkpoint = p["disk"]["checkpoints (3 while one is written)"] / 3
    encoded = p["disk"]["every row that can serve, encoded, of which those are chosen (at most)"]
    lines = [
        "# From one GPU to a thousand",
        "",
        "Written by `python benchmarks/scale.py` from the functions behind `treediff train --preset paper --plan`; a "
        "test holds the page to it. Nothing here was run: the hours are the plan's "
        f"([training.md](training.md)), and besides on {NETWORK / 1e9:.0f} GB/s of network a GPU, "
        f"{STORAGE / 1e9:.0f} GB/s of shared file system, {NODE} GPUs and {CORES} cores a node. No run of this kit has "
        "used more than one machine.",
        "",
        "## Training",
        "",
        f"An update has {rows} rows, as in the paper, and there are {steps:,} updates, one after the other. GPUs share "
        "out an update's rows: `processes` times `accumulation` times `micro_batch` stays the same, and so do the "
        "rows, their masks and, but for rounding, the weights.",
        "",
        *table(
            ["GPUs", "runs at once", "`processes` of a run", "`accumulation`"]
            + [f"hours of a run, {d}" for d in SHOWN]
            + [f"of it network, {d}" for d in SHOWN]
            + ["memory a GPU", "recomputed"],
            train,
        ),
        "",
        f"**What breaks first: the update.** With more GPUs than its {rows} rows there is nothing to share out. "
        f"{GPUS[-1]:,} GPUs make {GPUS[-1] // rows} runs of {rows} GPUs at once: other maskings and seeds, which a "
        "comparison needs anyway (`treediff study` says how many). One run over all of them would have "
        f"{wider['rows_per_step']:,} rows an update and {wider['steps']:,} updates: another recipe, with a learning "
        "rate that nobody has looked for.",
        "",
        "Before that, the hours above stop falling as they should: with one row a GPU and update, all wait for the "
        "longest row. The hours count every row at its longest, so they hold; what shorter rows save on one GPU is "
        f"lost on {rows}. The network is no limit: the adapter's {p['trained'] / 1e6:.0f} million gradients are "
        f"{2 * p['trained'] / 1e6:.0f} MB, once a micro-batch (within a node, NVLink is faster than assumed). With all "
        f"{p['parameters'] / 1e9:.2f} billion weights trained (`lora_rank` 0) they would be "
        f"{p['parameters'] / p['trained']:.0f} times as many.",
        "",
        f"A checkpoint is {checkpoint / 1e9:.2f} GB for all GPUs together, each writing its share. A run that is "
        f"stopped by SLURM loses nothing; one that dies loses up to {paper.checkpoint_every} of {steps:,} updates, "
        f"{100 * paper.checkpoint_every / steps:.1f} % of the run, and dies the more often the more nodes it has.",
        "",
        "`sbatch slurm/train.sh --preset paper --masking ast` takes one node's GPUs, `sbatch --nodes=8 slurm/train.sh "
        "--preset paper --masking ast --accumulation 2` eight nodes'.",
        "",
        "## Loading",
        "",
        f"Every node reads the backbone ({p['memory']['weights'] / 1e9:.0f} GB); a node's GPUs share what it has read.",
        "",
        *table(["GPUs", "nodes", "until all have read it"], load),
        "",
        "**What breaks first: the file system.** Copy the backbone to the nodes' own disks once and give that folder "
        "by `--backbone`.",
        "",
        "## Sampling",
        "",
        f"A run answers {p['answers'] // len(paper.lengths)} problems at T = {' and '.join(map(str, paper.lengths))}, "
        f"up to {paper.sample_batch} of them together. The table has the GPU with the most problems, without the time "
        "to load the model.",
        "",
        *table(["GPUs", "problems a GPU", *(f"until all are answered, {d}" for d in SHOWN)], sample),
        "",
        "**What breaks first: the steps, then loading.** The T steps of an answer follow each other, so no number of "
        f"GPUs is quicker than one problem alone; and {GPUS[-1]:,} GPUs take {loading(GPUS[-1]):,.0f} s to read a "
        f"model that answers in {3600 * sampling(GPUS[-1], SHOWN[1])[1]:,.0f} s. Give a run a node and sample several "
        "runs at once: `sbatch slurm/sample.sh --preset paper --masking ast`, one job a run. Fewer steps, by "
        "`--threshold` and `--cache`, help on any number ([results/sampling.md](results/sampling.md)).",
        "",
        "## Preparing and scoring",
        "",
        f"Preparing reads every row once and leaves at most {encoded / 1e9:.0f} GB. `sbatch --array=0-15 "
        "slurm/prepare.sh --preset paper` has each element encode every sixteenth chunk; the same script without an "
        "array, sent with `--dependency=afterok`, puts them together. Every element reads the whole source: what "
        "breaks first is that reading, when it takes as long as an element's share of the encoding.",
        "",
        f"Scoring a run takes {3600 * p['scoring_hours']:,.0f} s on {CORES} cores, programs that run into their time "
        'limit left out. `sbatch --array=0-11 slurm/score.sh "none random ast_span ast" "0 1 2" --preset paper` scores '
        "a run an element. What breaks first is the limit of one program: a run is never done before its slowest.",
        "",
        "## What was tried",
        "",
        "`tests/test_slurm.py` runs the four scripts with SLURM's variables set and `srun` and `scontrol` played by "
        "small scripts, on one machine: two shares of a data set made at once and put together, a training that is "
        "warned, checkpoints, asks for its requeue and goes on (of one node, and of two), two nodes' sampling under "
        "torchrun, an array job's scoring. Not tried: SLURM itself, several machines, several GPUs.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
