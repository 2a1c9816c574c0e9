"""Every switch of the kit: its meaning, unit, default and the paper's section; the three presets; the run directory.

A `Config` is one flat, frozen record. Build it with `resolve`:

    cfg = resolve("tiny", masking="ast", seed=1)
    cfg.run_dir                                # runs/tiny/ast-seed1

The dataclass defaults are the paper's values; `PRESETS` lists what `tiny` and `small` change. No code may ask
which preset it runs under: it asks the switches.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from treediff.errors import UserError
from treediff.strategies import STRATEGIES


def switch(default: Any, stage: str, text: str, paper: str = "") -> Any:
    """A dataclass field. `stage` says which outputs depend on it: run, data, train, sample or score."""
    meta = {"stage": stage, "help": text, "paper": paper}
    if isinstance(default, (dict, list)):
        return field(default_factory=lambda: type(default)(default), metadata=meta)
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Config:
    # --- which run -------------------------------------------------------------------------------------------
    preset: str = switch("paper", "run", "the preset these switches started from")
    masking: Literal[*STRATEGIES] = switch(
        "ast",
        "run",
        "corruption of the code region (`identifier` and `line` are not the paper's); `none`: the backbone alone",
        "3.4, C",
    )
    seed: int = switch(0, "run", "seed of data order, noise, masks, initialisation and sampling")

    # --- data ------------------------------------------------------------------------------------------------
    data: str = switch(
        "nvidia/OpenCodeReasoning", "data", "`tinycode`, a JSONL or Parquet file, or a hub data set", "4.1"
    )
    data_split: str = switch("split_0", "data", "configuration and split of a hub data set", "4.1")
    rows: int = switch(150_000, "data", "training rows to keep; 0 keeps all", "4.1")
    choice: Literal["seeded", "first"] = switch(
        "seeded",
        "data",
        "which rows: a seeded choice among all, or the first that can serve, behind 256 that are left to hold out; "
        "`first` reads no further",
    )
    data_seed: int = switch(0, "data", "seed of that choice, apart from `seed`, so that seeds share their rows")
    tokenizer: str = switch(
        "GSAI-ML/LLaDA-8B-Instruct",
        "data",
        "`train` (a byte-level BPE from the training rows), a folder or a hub id",
    )
    vocab_size: int = switch(640, "data", "entries of a tokenizer trained on the temporary, special tokens included")
    max_length: int = switch(4096, "data", "longest prompt + answer [tokens]", "4.1")
    overlong: Literal["drop", "trim_reasoning"] = switch(
        "drop", "data", "rows over max_length: drop, or cut the reasoning (the code always stays whole)"
    )
    language: str = switch(
        "python", "data", "language of the code region: python, javascript, typescript, java, c, cpp, go, rust"
    )
    tier_owner: Literal["innermost", "outermost", "keyword"] = switch(
        "innermost",
        "data",
        "which tiered node owns a leaf; `keyword`: only a node's own anonymous tokens",
        "Alg. 1",
    )
    token_owner: Literal["first_byte", "max_weight"] = switch(
        "first_byte",
        "data",
        "tier of a token that straddles leaves: its first non-blank byte, or the heaviest",
    )
    blank_owner: Literal["none", "enclosing"] = switch(
        "none",
        "data",
        "tier of a token of blanks alone: `none`, the default weight, or that of the node around it",
    )
    span_nodes: Literal["all", "tiered"] = switch(
        "all",
        "data",
        "nodes whose spans Algorithm 2 draws from: every one but the module, or those with a tier",
        "C",
    )

    decontaminate: bool = switch(
        False, "data", "leave out rows that hold a problem of `benchmarks` (see treediff/data/contamination.py)", "4.1"
    )
    embedder: str = switch(
        "", "run", "sentence-embedding model (folder or hub id) whose nearest pairs are listed as well; empty: none"
    )

    # --- corruption ------------------------------------------------------------------------------------------
    tier_weights: dict[str, float] = switch(
        {"skeleton": 0.15, "data": 0.42, "condition": 0.58, "control": 0.60},
        "train",
        "sampling weight of each tier",
        "Table 3",
    )
    default_weight: float = switch(0.15, "train", "weight of code outside all tiers (`default low weight`)", "Alg. 1")
    noise: Literal["cosine", "constant"] = switch(
        "cosine",
        "train",
        "eps_t falls from eps_max to eps_min by a cosine, or stays at eps_min (LLaDA)",
        "A.2",
    )
    eps_max: float = switch(0.1, "train", "noise floor at the first step", "A.2")
    eps_min: float = switch(0.001, "train", "noise floor at the last step", "A.2")
    budget: Literal["exact", "bernoulli"] = switch(
        "exact",
        "train",
        "AST masking: exactly floor(P L) code tokens, or each with its own probability",
        "Alg. 1",
    )
    random_budget: Literal["bernoulli", "exact"] = switch(
        "bernoulli",
        "train",
        "random masking of code: each token with probability P, or exactly floor(P L)",
        "4.1",
    )
    eos_padding: Literal["multiple", "batch", "one"] = switch(
        "multiple",
        "train",
        "answers end in EOS up to the next multiple of 128 tokens, or up to the longest of the global batch (LLaDA's "
        "recipe), or in one EOS; every EOS but padding behind one is trained on",
    )
    loss_weight: Literal["none", "inverse_p"] = switch(
        "none", "train", "weight of a masked token: 1 (Eq. 1), or 1/P (LLaDA)", "Eq. 1"
    )
    normaliser: Literal["masked", "answer"] = switch(
        "masked",
        "train",
        "the loss is a mean over the global batch's masked tokens, or over its answer tokens",
    )

    # --- backbone and adapter --------------------------------------------------------------------------------
    backbone: str = switch(
        "GSAI-ML/LLaDA-8B-Instruct", "train", "`pretrain` (made on the temporary), a LLaDA folder or a hub id", "A"
    )
    revision: str = switch("main", "train", "hub revision of backbone and tokenizer; pin a commit for a record")
    d_model: int = switch(4096, "train", "width of a backbone made on the temporary")
    n_layers: int = switch(32, "train", "its blocks")
    n_heads: int = switch(32, "train", "its attention heads")
    mlp_hidden: int = switch(12288, "train", "its feed-forward width")
    pretrain: dict[str, Any] = switch({}, "train", "switches that differ while a backbone is made on the temporary")
    lora_rank: int = switch(64, "train", "LoRA rank on the 7 matrices of each block; 0 trains all weights", "A.1")
    lora_alpha: float = switch(128.0, "train", "LoRA scale: updates are multiplied by alpha / rank", "A.1")
    lora_dropout: float = switch(0.1, "train", "dropout before the LoRA matrices", "A.1")

    # --- optimisation ----------------------------------------------------------------------------------------
    optimiser: Literal["adamw", "muon"] = switch("adamw", "train", "muon: matrices by Muon, the rest by AdamW", "A.1")
    lr: float = switch(5e-5, "train", "peak learning rate", "4.1")
    muon_lr: float = switch(0.02, "train", "peak learning rate of the matrices under muon")
    betas: list[float] = switch([0.9, 0.999], "train", "AdamW's moments", "A.1")
    weight_decay: float = switch(0.01, "train", "AdamW's weight decay (torch's default; unstated)")
    warmup: float = switch(0.1, "train", "share of the steps with a rising learning rate", "A.1")
    lr_floor: float = switch(0.0, "train", "the cosine ends at this share of the peak")
    grad_clip: float = switch(1.0, "train", "largest gradient norm; 0 does not clip")
    epochs: float = switch(3.0, "train", "passes over the training rows", "A.1")
    max_steps: int = switch(0, "train", "optimiser steps; 0 takes them from epochs")
    micro_batch: int = switch(1, "train", "rows per process and forward pass", "A.1")
    accumulation: int = switch(16, "train", "forward passes per optimiser step and process", "A.1")
    processes: int = switch(8, "train", "training processes, one per GPU", "A")
    precision: Literal["bf16", "fp32"] = switch("bf16", "train", "arithmetic of training and sampling", "A.1")
    zero_stage: int = switch(2, "train", "DeepSpeed ZeRO stage", "A")
    gradient_checkpointing: str = switch(
        "auto",
        "run",
        "blocks whose activations are computed again in the backward pass: `none`, `every_2`, `every_3`, ... or `all`; "
        "`auto`: as few as the GPU's free memory allows",
    )
    compile: bool = switch(
        False, "train", "fuse the elementwise work of each block by torch.compile (needs a compiler)"
    )
    checkpoint_every: int = switch(100, "run", "optimiser steps between checkpoints")
    eval_every: int = switch(250, "run", "optimiser steps between held-out evaluations while training; 0: none")
    eval_rows: int = switch(128, "run", "held-out rows, never trained on; evaluating changes nothing in the training")
    tracker: Literal["none", "tensorboard", "wandb"] = switch(
        "none", "run", "where the step log goes besides log.jsonl (the package must be installed)"
    )
    stall_timeout: float = switch(
        300.0, "run", "a run ends with an error if a rank shows no sign of life for so long [s]; 0 waits for ever"
    )
    peak_flops: float = switch(0.0, "run", "a device's FLOP/s, for the log's MFU; 0 takes those of known GPUs")
    gpu_memory: float = switch(0.0, "run", "memory of a GPU, for the plan [GB]; 0 takes that of the GPU that is there")
    hostfile: str = switch("", "run", "DeepSpeed host file of several nodes, reached by ssh (`host slots=8` a line)")
    nodes: int = switch(1, "run", "machines that `processes` are spread over; without a host file start one per node")
    node_rank: int = switch(0, "run", "which of them this is, when started by hand on each")
    master_addr: str = switch("127.0.0.1", "run", "address of the first node")
    master_port: int = switch(0, "run", "port of the first node; 0 picks a free one")

    # --- sampling --------------------------------------------------------------------------------------------
    model: str = switch("", "run", "a causal language model (folder or hub id) to sample in place of the run's own")
    benchmarks: list[str] = switch(["humaneval", "mbpp"], "run", "what to sample and score: humaneval, mbpp, tinycode")
    benchmark_files: dict[str, str] = switch(
        {}, "sample", "files of benchmarks by name, as EvalPlus packs them; one not named is downloaded by EvalPlus"
    )
    lengths: list[int] = switch([256, 512], "run", "T: generated tokens = denoising steps", "4.1")
    limit: int = switch(0, "sample", "benchmark problems to take, spread evenly; 0 takes all")
    block_length: int = switch(32, "sample", "tokens per semi-autoregressive block [tokens]", "A.1")
    tokens_per_step: int = switch(1, "sample", "tokens committed per denoising step (T steps for T tokens: 1)", "4.1")
    temperature: float = switch(0.0, "sample", "Gumbel noise on the logits; 0 is deterministic", "A.1")
    guidance: float = switch(
        0.0, "sample", "classifier-free guidance: how far from what the model says without the prompt; 0 is off"
    )
    remasking: Literal["low_confidence", "random"] = switch(
        "low_confidence", "sample", "committed first: the most confident tokens, or random ones", "A.1"
    )
    threshold: float = switch(
        0.0,
        "sample",
        "fast: commit all tokens of at least this confidence, and one at the least (Fast-dLLM: 0.9); 0 keeps T steps",
    )
    cache: Literal["none", "prefix", "dual"] = switch(
        "none", "sample", "fast: keys and values computed once per block for the tokens before it, or for all others"
    )
    early_exit: bool = switch(True, "sample", "an answer that has ended is not decoded any further")
    prompt_style: Literal["instruct", "prefill", "bare"] = switch(
        "instruct",
        "sample",
        "EvalPlus's instruction; the same with a pre-filled answer; or the problem text alone",
    )
    think: Literal["free", "open", "closed"] = switch(
        "free", "sample", "start of the answer: the model's choice, an open <think>, or an empty closed one"
    )
    eos_suppression: Literal["off", "logits", "confidence"] = switch(
        "off",
        "sample",
        "`logits`: EOS is never proposed (LLaDA's logits_eos_inf); `confidence`: EOS and EOT are committed only when "
        "nothing else is left (its confidence_eos_eot_inf)",
    )
    extract: Literal["sanitize", "first_fence"] = switch(
        "sanitize", "sample", "program out of the answer: EvalPlus's sanitize, or the first code fence"
    )
    samples_per_task: int = switch(1, "run", "samples per benchmark problem (pass@k); more need a temperature")
    sample_batch: int = switch(16, "run", "prompts decoded together at most; fewer if a GPU's memory asks for it")
    sample_processes: int = switch(0, "run", "processes that sample; 0: one per GPU, or one")

    # --- processes ---------------------------------------------------------------------------------------------
    workers: int = switch(0, "run", "processes that prepare rows, programs scored at a time; 0: one per core")

    def __post_init__(self) -> None:
        check(self)

    # --- where things lie ------------------------------------------------------------------------------------
    @property
    def preset_dir(self) -> Path:
        """runs/<preset>: what the runs of one preset share."""
        return runs_root() / self.preset

    @property
    def run_dir(self) -> Path:
        """runs/<preset>/<masking>-seed<k>: one run, the contract between the stages."""
        if self.model:
            return self.preset_dir / f"model-{re.sub('[^A-Za-z0-9._-]+', '-', self.model).strip('-.')}-seed{self.seed}"
        return self.preset_dir / f"{self.masking}-seed{self.seed}"

    @property
    def rows_per_step(self) -> int:
        """Rows per optimiser step, over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def but(self, **changes: Any) -> Config:
        """The same switches with some changed (checked again)."""
        return dataclasses.replace(self, **changes)

    def with_masking(self, masking: str) -> Config:
        """The run beside this one with another masking; `none` takes the switches in `pretrain` as well."""
        return self.but(masking=masking, **(self.pretrain if masking == "none" else {}))

    def weights(self) -> list[float]:
        """Weight by label (tokens.LABELS): prompt, reasoning, default, skeleton, data, condition, control."""
        tier = self.tier_weights
        return [
            0.0,
            0.0,
            self.default_weight,
            tier["skeleton"],
            tier["data"],
            tier["condition"],
            tier["control"],
        ]

    def as_dict(self, *stages: str) -> dict[str, Any]:
        """Switches by name; with `stages`, only those that the stages' outputs depend on."""
        return {f.name: getattr(self, f.name) for f in SWITCHES.values() if not stages or f.metadata["stage"] in stages}


SWITCHES: dict[str, dataclasses.Field] = {f.name: f for f in dataclasses.fields(Config)}
_TYPES: dict[str, Any] = typing.get_type_hints(Config)

PRESETS: dict[str, dict[str, Any]] = {
    # The paper's run: 8 GPUs, LLaDA-8B-Instruct, 150,000 rows of OpenCodeReasoning.
    "paper": {},
    # One GPU and a local LLaDA folder: the paper's recipe on a tenth of the rows.
    "small": {
        "rows": 15_000,
        "choice": "first",
        "epochs": 1.0,
        "processes": 1,
        "accumulation": 32,
        "max_length": 2048,
        "lengths": [256],
    },
    # Two cores, no network, no data: everything is made on the temporary (see docs/results/tiny.md).
    "tiny": {
        "data": "tinycode",
        "rows": 4000,
        "tokenizer": "train",
        "max_length": 160,
        "backbone": "pretrain",
        "d_model": 128,
        "n_layers": 4,
        "n_heads": 4,
        "mlp_hidden": 320,
        "pretrain": {
            "rows": 20_000,
            "data_seed": 1,
            "lora_rank": 0,
            "optimiser": "muon",
            "lr": 3e-3,
            "weight_decay": 0.05,
            "warmup": 0.05,
            "lr_floor": 0.3,
            "max_steps": 1500,
            "micro_batch": 16,
            "zero_stage": 0,
            "checkpoint_every": 200,
            "eval_every": 250,
        },
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "lr": 5e-3,
        "max_steps": 300,
        "micro_batch": 16,
        "accumulation": 1,
        "processes": 2,
        "precision": "fp32",
        "eos_padding": "batch",
        "gradient_checkpointing": "none",
        "eval_every": 50,
        "eval_rows": 64,
        "benchmarks": ["tinycode"],
        "lengths": [64, 96],
        "limit": 120,
        "prompt_style": "bare",
        "extract": "first_fence",
        "sample_batch": 40,
    },
}


def resolve(preset: str = "tiny", **switches: Any) -> Config:
    """The switches of a preset, with some changed by name; texts (of a command line) are read by the switch's type.

    Raises UserError for an unknown preset, an unknown switch or a value that the switch does not take.
    """
    if preset not in PRESETS:
        raise UserError(f"preset: there is no {preset!r}; choose one of {', '.join(PRESETS)}.")
    unknown = [name for name in switches if name not in SWITCHES]
    if unknown:
        raise UserError(f"{unknown[0]}: there is no such switch; the switches are {', '.join(SWITCHES)}.")
    values = dict(PRESETS[preset])
    for name, value in switches.items():
        read = _read(name, value)
        if isinstance(read, dict):  # a mapping's entries are set one by one
            default = SWITCHES[name].default_factory()
            read = {**default, **values.get(name, {}), **{k: _entry(name, k, v) for k, v in read.items()}}
        values[name] = read
    return Config(**{**values, "preset": preset}).with_masking(values.get("masking", "ast"))


def from_notebook(namespace: Mapping[str, Any], own: tuple[str, ...] = ()) -> Config:
    """The switches that a notebook's parameters cell (and papermill's injected one) set, every other name refused.

    Call it in the first cell after the parameters, with `globals()` and the names of the notebook's own parameters.
    Any switch may be given, also one that the cell does not list. When the cell is run again by hand, the names that
    the notebook made since are let be. Raises UserError naming the valid parameters.
    """
    hidden = ("In", "Out", "exit", "quit", "open")
    plain = (str, int, float, bool, list, dict, type(None))
    given = {k: v for k, v in namespace.items() if k[0] != "_" and k not in hidden and isinstance(v, plain)}
    unknown = [k for k in given if k not in SWITCHES and k not in own]
    if unknown and not any(isinstance(v, Config) for v in namespace.values()):
        valid = ", ".join([*own, *SWITCHES])
        raise UserError(f"{unknown[0]}: this notebook has no such parameter; the valid ones are {valid}.")
    return resolve(given.get("preset", "tiny"), **{k: v for k, v in given.items() if k in SWITCHES and k != "preset"})


def _read(name: str, value: Any) -> Any:
    """`value`, if need be read from text, as the type of switch `name`."""
    want = _TYPES[name]
    origin = typing.get_origin(want) or want
    wrong = UserError(f"{name}: {value!r} is not {_describe(want)}.")
    if origin is Literal:
        if value not in typing.get_args(want):
            raise wrong
        return value
    if isinstance(value, str) and origin in (dict, list):
        try:
            value = json.loads(value) if value.strip()[:1] in "{[" else value.split(",")
        except json.JSONDecodeError:
            raise wrong from None
    if origin is list:
        item = typing.get_args(want)[0]
        try:
            return [item(v) for v in (value if isinstance(value, (list, tuple)) else [value])]
        except (TypeError, ValueError):
            raise wrong from None
    if origin is dict:
        if not isinstance(value, Mapping):
            raise wrong
        return dict(value)
    if origin is bool:
        truths = {"true": True, "1": True, "false": False, "0": False}
        if str(value).lower() not in truths:
            raise wrong
        return truths[str(value).lower()]
    try:
        number = origin(value)
    except (TypeError, ValueError):
        raise wrong from None
    if origin is int and isinstance(value, (float, bool)) and value != number:
        raise wrong
    return number


def _entry(name: str, key: str, value: Any) -> Any:
    """An entry of a mapping switch, read by its type: a switch's in `pretrain`, else a number or a text."""
    if name == "pretrain":
        if key not in SWITCHES or key == "pretrain":
            raise UserError(f"pretrain: holds {key!r}, which is no switch.")
        return _read(key, value)
    if name == "tier_weights":
        try:
            return float(value)
        except (TypeError, ValueError):
            raise UserError(f"{name}.{key}: {value!r} is not a number.") from None
    return value


def _describe(want: Any) -> str:
    origin = typing.get_origin(want) or want
    if origin is Literal:
        return "one of " + ", ".join(typing.get_args(want))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    if origin is list:
        return "a list of " + {int: "whole numbers", float: "numbers", str: "texts"}[typing.get_args(want)[0]]
    return names.get(origin, 'a mapping such as {"name": value}')


def check(cfg: Config) -> None:
    """Refuse values that no stage can work with. Raises UserError naming the switch."""
    for name in ("rows", "limit", "max_steps", "lora_rank", "seed", "workers", "master_port", "eval_every"):
        _demand(getattr(cfg, name) >= 0, name, "must not be negative")
    for name in ("max_length", "d_model", "n_layers", "n_heads", "mlp_hidden", "micro_batch", "accumulation"):
        _demand(getattr(cfg, name) >= 1, name, "must be at least 1")
    for name in ("processes", "checkpoint_every", "block_length", "tokens_per_step", "sample_batch"):
        _demand(getattr(cfg, name) >= 1, name, "must be at least 1")
    for name in ("eval_rows", "stall_timeout", "peak_flops", "gpu_memory"):
        _demand(getattr(cfg, name) >= 0, name, "must not be negative")
    _demand(cfg.nodes >= 1 and cfg.processes % cfg.nodes == 0, "nodes", f"must divide processes {cfg.processes}")
    _demand(0 <= cfg.node_rank < cfg.nodes, "node_rank", f"must lie in [0, {cfg.nodes})")
    by_hand = cfg.nodes > 1 and not cfg.hostfile
    _demand(not by_hand or cfg.master_port > 0, "master_port", "must be given, the same on every node")
    _demand(1 <= cfg.samples_per_task <= 256, "samples_per_task", "must lie in [1, 256]")
    _demand(
        cfg.samples_per_task == 1 or cfg.temperature > 0,
        "samples_per_task",
        "more than one sample needs a temperature, or all are the same",
    )
    for name in ("temperature", "guidance", "sample_processes"):
        _demand(getattr(cfg, name) >= 0, name, "must not be negative")
    _demand(0 <= cfg.threshold <= 1, "threshold", "must lie in [0, 1]")
    _demand(0 <= cfg.eps_min <= cfg.eps_max <= 1, "eps_min", "must lie in 0 <= eps_min <= eps_max <= 1")
    _demand(
        re.fullmatch("auto|none|all|every_([2-9]|[1-9][0-9]+)", cfg.gradient_checkpointing) is not None,
        "gradient_checkpointing",
        f"knows auto, none, all and every_2, every_3, ..., not {cfg.gradient_checkpointing!r}",
    )
    _demand(0 <= cfg.lora_dropout < 1, "lora_dropout", "must lie in [0, 1)")
    _demand(0 <= cfg.warmup <= 1, "warmup", "must be a share between 0 and 1")
    _demand(cfg.zero_stage in (0, 1, 2, 3), "zero_stage", "must be 0, 1, 2 or 3")
    _demand(cfg.d_model % cfg.n_heads == 0, "n_heads", f"must divide d_model {cfg.d_model}")
    _demand(
        set(cfg.tier_weights) == {"skeleton", "data", "condition", "control"},
        "tier_weights",
        "must name skeleton, data, condition and control",
    )
    for tier, weight in [*cfg.tier_weights.items(), ("default_weight", cfg.default_weight)]:
        _demand(math.isfinite(weight) and 0 <= weight <= 1, f"tier_weights ({tier})", "must lie in [0, 1]")
    for length in cfg.lengths:
        _demand(
            length % cfg.block_length == 0,
            "block_length",
            f"must divide each of lengths; {length} is not a multiple of {cfg.block_length}",
        )
    for name in cfg.benchmarks:
        _demand(
            name in ("humaneval", "mbpp", "tinycode"),
            "benchmarks",
            f"knows humaneval, mbpp and tinycode, not {name!r}",
        )
    _demand(
        not (cfg.optimiser == "muon" and cfg.zero_stage > 0),
        "optimiser",
        "muon needs whole matrices, which ZeRO splits: set zero_stage to 0",
    )
    for name in cfg.pretrain:
        _demand(name in SWITCHES and name != "pretrain", "pretrain", f"holds {name!r}, which is no switch")


def _demand(ok: bool, name: str, text: str) -> None:
    if not ok:
        raise UserError(f"{name}: {text}.")


# --- files: written whole or not at all ---------------------------------------------------------------------------
def runs_root() -> Path:
    """$TREEDIFF_RUNS, or `runs` in the project folder above the current one, or `runs` here."""
    if os.environ.get("TREEDIFF_RUNS"):
        return Path(os.environ["TREEDIFF_RUNS"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "01_ast.ipynb").is_file():
            return folder / "runs"
    return here / "runs"
