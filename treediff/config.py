"""Every switch of the kit: its type, range, default, meaning, unit and the paper's section; the three presets.

A `Config` is one flat, frozen record. Build it with `resolve`:

    cfg = resolve("tiny", masking="ast", seed=1)
    cfg.run_dir                                # runs/tiny/ast-seed1

The fields' defaults are the paper's values; `PRESETS` lists what `tiny` and `small` change. No code may ask
which preset it runs under: it asks the switches. Texts (of a command line, say) are read by the switch's type.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from treediff.errors import UserError
from treediff.protocols import OURS, PROTOCOLS
from treediff.strategies import STRATEGIES

HOLE_SETS = ("ast", "single-line", "multi-line", "random-span", "random-span-light")


def switch(default: Any, stage: str, text: str, paper: str = "", **limits: Any) -> Any:
    """A field of `Config`. `stage` says which outputs depend on it: run, data, train or sample; `limits` are
    pydantic's: ge, gt, le, lt (numbers), min_length, max_length (lists)."""
    return Field(default, description=text, json_schema_extra={"stage": stage, "paper": paper}, **limits)


def _json(value: Any) -> Any:
    """The list or mapping that a text holds as JSON; anything else as it is, for the type to judge."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) and value.strip()[:1] in ("{", "[") else value
    return value


def _items(value: Any) -> Any:
    """A list from a text of items between commas, from a JSON text or from one item."""
    value = _json(value)
    value = value.split(",") if isinstance(value, str) else value
    return value if isinstance(value, (list, tuple)) else [value]


K, V = TypeVar("K"), TypeVar("V")
Items = Annotated[list[V], BeforeValidator(_items)]
Entries = Annotated[dict[K, V], BeforeValidator(_json)]
Tier = Literal["skeleton", "data", "condition", "control"]
Share = Annotated[float, Field(ge=0, le=1)]


_OF_THE_RUN = {"preset", "masking", "seed", "variant", "backbone_seed", "pretrain"}


class Config(BaseModel):
    """All switches of one run. Raises UserError that names the switch, its value and what it takes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True)

    # --- which run -------------------------------------------------------------------------------------------
    preset: str = switch("paper", "run", "the preset these switches started from")
    masking: Literal[*STRATEGIES] = switch(
        "ast",
        "run",
        "corruption of the code region (`identifier`, `line`, `ast_hole`: not the paper's); `none`: the backbone alone",
        "3.4, C",
    )
    seed: int = switch(0, "run", "seed of data order, noise, masks, initialisation and sampling", ge=0)
    variant: str = switch(
        "",
        "run",
        "a name for runs of other switches: their directory is <masking>-<variant>-seed<k>",
        pattern="^[a-z0-9_]*$",
    )

    # --- data ------------------------------------------------------------------------------------------------
    data: str = switch(
        "nvidia/OpenCodeReasoning",
        "data",
        "`tinycode`, `stdlib` (or `stdlib_all`), a JSONL or Parquet file, or a hub data set",
        "4.1",
    )
    data_split: str = switch("split_0", "data", "configuration and split of a hub data set", "4.1")
    rows: int = switch(150_000, "data", "training rows to keep; 0 keeps all", "4.1", ge=0)
    choice: Literal["seeded", "first"] = switch(
        "seeded",
        "data",
        "which rows: a seeded choice among all, or the first that can serve, behind 256 that are left to hold out; "
        "`first` reads no further",
    )
    data_seed: int = switch(0, "data", "seed of that choice, apart from `seed`, so that seeds share their rows", ge=0)
    tokenizer: str = switch(
        "GSAI-ML/LLaDA-8B-Instruct",
        "data",
        "`train` (a byte-level BPE from the training rows), a folder or a hub id",
    )
    vocab_size: int = switch(640, "data", "entries of a tokenizer trained on the spot, special tokens included", ge=1)
    max_length: int = switch(4096, "data", "longest prompt + answer [tokens]", "4.1", ge=1)
    overlong: Literal["drop", "trim_reasoning"] = switch(
        "drop", "data", "rows over max_length: drop, or cut the reasoning (the code always stays whole)"
    )
    empty_reasoning: Literal["drop", "keep"] = switch(
        "drop", "data", "rows whose <think> block is empty: drop, or keep (the answer begins with an empty block)"
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
    tier_weights: Entries[Tier, Share] = switch(
        {"skeleton": 0.15, "data": 0.42, "condition": 0.58, "control": 0.60},
        "train",
        "sampling weight of each tier",
        "Table 3",
    )
    default_weight: float = switch(
        0.15, "train", "weight of code outside all tiers (`default low weight`)", "Alg. 1", ge=0, le=1
    )
    noise: Literal["cosine", "constant"] = switch(
        "cosine",
        "train",
        "eps_t falls from eps_max to eps_min by a cosine, or stays at eps_min (LLaDA)",
        "A.2",
    )
    eps_max: float = switch(0.1, "train", "noise floor at the first step", "A.2", ge=0, le=1)
    eps_min: float = switch(0.001, "train", "noise floor at the last step", "A.2", ge=0, le=1)
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
    loss_weight: Literal["none", "inverse_p", "cart"] = switch(
        "none",
        "train",
        "weight of a masked token: 1 (Eq. 1); 1/P (LLaDA; with the normaliser `masked` Dream's `original`); or `cart` "
        "(Dream): the more, the more known tokens are near",
        "Eq. 1",
    )
    cart_p: float = switch(0.1, "train", "cart: share of a known token's weight that its neighbour takes", gt=0, lt=1)
    normaliser: Literal["masked", "answer"] = switch(
        "masked",
        "train",
        "the loss is a mean over the global batch's masked tokens, or over its answer tokens",
    )

    # --- backbone and adapter --------------------------------------------------------------------------------
    backbone: str = switch(
        "GSAI-ML/LLaDA-8B-Instruct", "train", "`pretrain` (made on the spot), a LLaDA folder or a hub id", "A"
    )
    backbone_seed: int = switch(
        -1,
        "train",
        "a backbone made on the spot is that of the run none-seed<k> of this seed k; -1: of the same",
        ge=-1,
    )
    revision: str = switch("main", "train", "hub revision of backbone and tokenizer; pin a commit for a record")
    d_model: int = switch(4096, "train", "width of a backbone made on the spot", ge=1)
    n_layers: int = switch(32, "train", "its blocks", ge=1)
    n_heads: int = switch(32, "train", "its attention heads", ge=1)
    mlp_hidden: int = switch(12288, "train", "its feed-forward width", ge=1)
    pretrain: Entries[str, Any] = switch({}, "train", "switches that differ while a backbone is made on the spot")
    lora_rank: int = switch(64, "train", "LoRA rank on the 7 matrices of each block; 0 trains all weights", "A.1", ge=0)
    lora_alpha: float = switch(128.0, "train", "LoRA scale: updates are multiplied by alpha / rank", "A.1", ge=0)
    lora_dropout: float = switch(0.1, "train", "dropout before the LoRA matrices", "A.1", ge=0, lt=1)

    # --- optimisation ----------------------------------------------------------------------------------------
    optimiser: Literal["adamw", "muon"] = switch("adamw", "train", "muon: matrices by Muon, the rest by AdamW", "A.1")
    lr: float = switch(5e-5, "train", "peak learning rate", "4.1", ge=0)
    muon_lr: float = switch(0.02, "train", "peak learning rate of the matrices under muon", ge=0)
    betas: Items[Annotated[float, Field(ge=0, lt=1)]] = switch(
        [0.9, 0.999], "train", "AdamW's moments", "A.1", min_length=2, max_length=2
    )
    weight_decay: float = switch(0.01, "train", "AdamW's weight decay (torch's default; unstated)", ge=0)
    warmup: float = switch(0.1, "train", "share of the steps with a rising learning rate", "A.1", ge=0, le=1)
    lr_floor: float = switch(0.0, "train", "the cosine ends at this share of the peak", ge=0, le=1)
    grad_clip: float = switch(1.0, "train", "largest gradient norm; 0 does not clip", ge=0)
    epochs: float = switch(3.0, "train", "passes over the training rows", "A.1", ge=0)
    max_steps: int = switch(0, "train", "optimiser steps; 0 takes them from epochs", ge=0)
    micro_batch: int = switch(1, "train", "rows per process and forward pass", "A.1", ge=1)
    accumulation: int = switch(16, "train", "forward passes per optimiser step and process", "A.1", ge=1)
    processes: int = switch(8, "train", "training processes, one per GPU", "A", ge=1)
    precision: Literal["bf16", "fp32"] = switch("bf16", "train", "arithmetic of training and sampling", "A.1")
    zero_stage: int = switch(2, "train", "DeepSpeed ZeRO stage", "A", ge=0, le=3)
    gradient_checkpointing: str = switch(
        "auto",
        "run",
        "blocks whose activations are computed again in the backward pass: `none`, `every_2`, `every_3`, ... or `all`; "
        "`auto`: as few as the GPU's free memory allows",
    )
    compile: bool = switch(
        False, "train", "fuse the elementwise work of each block by torch.compile (needs a compiler)"
    )
    checkpoint_every: int = switch(100, "run", "optimiser steps between checkpoints", ge=1)
    eval_every: int = switch(250, "run", "optimiser steps between held-out evaluations while training; 0: none", ge=0)
    eval_rows: int = switch(
        128, "run", "held-out rows, never trained on; evaluating changes nothing in the training", ge=0
    )
    tracker: Literal["none", "tensorboard", "wandb"] = switch(
        "none", "run", "where the step log goes besides log.jsonl (the package must be installed)"
    )
    stall_timeout: float = switch(
        300.0, "run", "a run ends with an error if a rank shows no sign of life for so long [s]; 0 waits for ever", ge=0
    )
    peak_flops: float = switch(0.0, "run", "a device's FLOP/s, for the log's MFU; 0 takes those of known GPUs", ge=0)
    gpu_memory: float = switch(
        0.0, "run", "memory of a GPU, for the plan [GB]; 0 takes that of the GPU that is there", ge=0
    )
    hostfile: str = switch("", "run", "DeepSpeed host file of several nodes, reached by ssh (`host slots=8` a line)")
    nodes: int = switch(
        1, "run", "machines that `processes` are spread over; without a host file start one per node", ge=1
    )
    node_rank: int = switch(0, "run", "which of them this is, when started by hand on each", ge=0)
    master_addr: str = switch("127.0.0.1", "run", "address of the first node")
    master_port: int = switch(0, "run", "port of the first node; 0 picks a free one", ge=0, le=65535)

    # --- sampling --------------------------------------------------------------------------------------------
    model: str = switch("", "run", "a causal language model (folder or hub id) to sample in place of the run's own")
    benchmarks: Items[Literal["humaneval", "mbpp", "tinycode"]] = switch(
        ["humaneval", "mbpp"], "run", "what to sample and score: humaneval, mbpp, tinycode; may be empty"
    )
    benchmark_files: Entries[str, str] = switch(
        {}, "sample", "files of benchmarks by name, as EvalPlus packs them; one not named is downloaded by EvalPlus"
    )
    decoding: str = switch(
        "",
        "run",
        "also `--as`: a name for these sampling switches; samples and ledgers that carry it stand beside others",
        pattern="^[a-z0-9_]*$",
    )
    protocol: Literal["none", *PROTOCOLS] = switch(
        "none",
        "run",
        "a published evaluation (docs/protocols.md): sets its switches for each benchmark and refuses other values",
    )
    lengths: Items[Annotated[int, Field(ge=1)]] = switch(
        [256, 512], "run", "T: generated tokens = denoising steps", "4.1", min_length=1
    )
    limit: int = switch(0, "sample", "benchmark problems to take, spread evenly; 0 takes all", ge=0)
    block_length: int = switch(32, "sample", "tokens per semi-autoregressive block [tokens]", "A.1", ge=1)
    tokens_per_step: int = switch(
        1, "sample", "tokens committed per denoising step (T steps for T tokens: 1)", "4.1", ge=1
    )
    temperature: float = switch(0.0, "sample", "Gumbel noise on the logits; 0 is deterministic", "A.1", ge=0)
    guidance: float = switch(
        0.0, "sample", "classifier-free guidance: how far from what the model says without the prompt; 0 is off", ge=0
    )
    remasking: Literal["low_confidence", "random", "maskgit", "margin", "entropy", "origin"] = switch(
        "low_confidence",
        "sample",
        "committed first: the most confident tokens, or random ones; Dream's: by probability after temperature, top_p "
        "and top_k (`maskgit`), by its lead over the second token's (`margin`), by the least `entropy`; `origin`: each "
        "token by chance",
        "A.1",
    )
    schedule: Literal["even", "timestep"] = switch(
        "even", "sample", "tokens a step: as many at each, or by Dream's times, fewer at first and more at last"
    )
    top_p: float = switch(
        1.0, "sample", "only the likeliest tokens that have this share of the probability together", gt=0, le=1
    )
    top_k: int = switch(
        0, "sample", "only so many tokens, the likeliest; 0: all (Dream's own generate takes 50 unless told)", ge=0
    )
    threshold: float = switch(
        0.0,
        "sample",
        "fast: commit all tokens of at least this confidence, and one at the least (Fast-dLLM: 0.9); 0 keeps T steps",
        ge=0,
        le=1,
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

    # --- holes (`treediff infill`; not the paper's) ------------------------------------------------------------------
    holes: Literal[*HOLE_SETS] = switch(
        "ast",
        "run",
        "`ast`: whole nodes of the programs of `benchmarks`; or a set of HumanEval-Infilling: single-line, multi-line, "
        "random-span, random-span-light",
    )
    tier: Literal["any", "skeleton", "data", "condition", "control"] = switch(
        "any", "sample", "tier of the nodes that are taken out; `any`: some of each tier"
    )
    holes_per_program: int = switch(
        1, "sample", "nodes of each tier that are taken out of a program, one at a time", ge=1
    )
    hole_seed: int = switch(
        0, "sample", "seed of their choice, apart from `seed`, so that all runs fill the same holes", ge=0
    )
    hole_length: str = switch(
        "search",
        "sample",
        "tokens of a hole: `oracle`, the true number; a number, where an end of text in the hole ends it earlier; or "
        "`search`, that of hole_lengths in which the model is surest on average",
        pattern="^(oracle|search|[0-9]{1,4})$",
    )
    hole_lengths: Items[Annotated[int, Field(ge=0)]] = switch(
        [1, 2, 4, 8, 16, 32], "sample", "what `search` tries [tokens]", min_length=1
    )
    hole_context: Literal["answer", "program"] = switch(
        "answer",
        "sample",
        "around a hole: the problem in the user's turn and the program as an answer, behind TinyCode's reasoning or an "
        "empty one; or the program alone",
    )
    verdicts: Literal["own", "evalplus"] = switch(
        "own", "run", "right programs that EvalPlus 0.3.1 fails (docs/sandbox.md) pass, or are counted as it does"
    )
    samples_per_task: int = switch(
        1, "run", "samples per benchmark problem (pass@k); more need a temperature", ge=1, le=256
    )
    sample_batch: int = switch(16, "run", "prompts decoded together at most; fewer if a GPU's memory asks for it", ge=1)
    sample_processes: int = switch(0, "run", "processes that sample; 0: one per GPU, or one", ge=0)
    sample_compile: bool = switch(
        False, "sample", "fuse the elementwise work of each block by torch.compile (needs a compiler; other rounding)"
    )

    # --- processes ---------------------------------------------------------------------------------------------
    workers: int = switch(0, "run", "processes that prepare rows, programs scored at a time; 0: one per core", ge=0)

    def __init__(self, **switches: Any) -> None:
        for name in switches:
            known(name, SWITCHES)
        try:
            super().__init__(**{k: str(v) if isinstance(v, Path) else v for k, v in switches.items()})
        except ValidationError as e:
            wrong = e.errors(include_url=False)[0]
            where = ".".join(part for part in wrong["loc"] if isinstance(part, str) and part != "[key]")
            raise UserError(f"{where}: {wrong['msg'].replace('Input', repr(wrong['input']), 1)}.") from None

    @model_validator(mode="after")
    def _agree(self) -> Config:
        """Refuse values that do not go together, and read those of `pretrain` by their switches' types."""
        by_hand = self.nodes > 1 and not self.hostfile
        odd = [t for t in self.lengths if t % self.block_length]
        for ok, name, text in (
            (self.processes % self.nodes == 0, "nodes", f"must divide processes {self.processes}"),
            (self.node_rank < self.nodes, "node_rank", f"must lie in [0, {self.nodes})"),
            (not by_hand or self.master_port, "master_port", "must be given, the same on every node"),
            (
                self.samples_per_task == 1 or self.temperature > 0,
                "samples_per_task",
                "more than one sample needs a temperature, or all are the same",
            ),
            (
                re.fullmatch("auto|none|all|every_([2-9]|[1-9][0-9]+)", self.gradient_checkpointing),
                "gradient_checkpointing",
                f"knows auto, none, all and every_2, every_3, ..., not {self.gradient_checkpointing!r}",
            ),
            (self.eps_min <= self.eps_max, "eps_min", f"must not be above eps_max {self.eps_max}"),
            (self.d_model % self.n_heads == 0, "n_heads", f"must divide d_model {self.d_model}"),
            (
                len(self.tier_weights) == len(get_args(Tier)),
                "tier_weights",
                f"must name {', '.join(get_args(Tier))}",
            ),
            (not odd, "block_length", f"must divide each of lengths; {odd} are no multiples of {self.block_length}"),
            (
                self.optimiser != "muon" or self.zero_stage == 0,
                "optimiser",
                "muon needs whole matrices, which ZeRO splits: set zero_stage to 0",
            ),
            (
                self.decoding not in PROTOCOLS,
                "decoding",
                f"{self.decoding} is a protocol; give --protocol {self.decoding}, or another name",
            ),
            (
                self.protocol == "none" or not self.decoding,
                "decoding",
                "a protocol names its switches itself; leave this name off",
            ),
            *self._pinned(),
            (
                not self.pretrain.keys() & _OF_THE_RUN,
                "pretrain",
                "must not hold preset, masking, seed, variant, backbone_seed or pretrain",
            ),
        ):
            if not ok:
                raise UserError(f"{name}: {text}.")
        if self.pretrain:
            try:
                made = self.but(**self.pretrain, pretrain={})
            except UserError as e:
                raise UserError(f"pretrain.{e}") from None
            self.pretrain.update({name: getattr(made, name) for name in self.pretrain})
        return self

    def _pinned(self) -> Iterator[tuple[bool, str, str]]:
        """What does not agree with the protocol, as `_agree` has it."""
        if self.protocol == "none":
            return
        protocol, what = PROTOCOLS[self.protocol], f"protocol {self.protocol}"
        other = [b for b in self.benchmarks if b not in protocol.benchmarks]
        yield not other, "benchmarks", f"{what} is for {', '.join(protocol.benchmarks)}, not {', '.join(other)}"
        records = [protocol.switches(b) for b in self.benchmarks]
        for name in OURS if records else ():
            mine, theirs = getattr(self, name), [r[name] for r in records]
            ok = mine in theirs if name != "lengths" else any(set(mine) <= set(t) for t in theirs)
            yield ok, name, f"{what} has {' or '.join(map(str, dict.fromkeys(map(str, theirs))))}, not {mine}"

    # --- what is sampled -------------------------------------------------------------------------------------
    def of(self, benchmark: str) -> Config:
        """The switches under which one benchmark is sampled: a protocol may have its own for each."""
        if self.protocol == "none":
            return self
        pinned = PROTOCOLS[self.protocol].switches(benchmark)
        lengths = [t for t in self.lengths if t in pinned["lengths"]] or pinned["lengths"]
        return self.but(benchmarks=[benchmark], **{**pinned, "lengths": lengths})

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """Every benchmark with every T that it is sampled at."""
        return [(benchmark, length) for benchmark in self.benchmarks for length in self.of(benchmark).lengths]

    @property
    def label(self) -> dict[str, str]:
        """What samples and ledgers say of their sampling switches' name: `protocol` or `decoding`, or nothing."""
        names = {"protocol": self.protocol.removeprefix("none"), "decoding": self.decoding}
        return {k: v for k, v in names.items() if v}

    # --- where things lie ------------------------------------------------------------------------------------
    @property
    def preset_dir(self) -> Path:
        """runs/<preset>: what the runs of one preset share."""
        return runs_root() / self.preset

    @property
    def run_dir(self) -> Path:
        """runs/<preset>/<masking>[-<variant>]-seed<k>: one run, the contract between the stages."""
        if self.model:
            return self.preset_dir / f"model-{re.sub('[^A-Za-z0-9._-]+', '-', self.model).strip('-.')}-seed{self.seed}"
        variant = f"-{self.variant}" if self.variant else ""
        return self.preset_dir / f"{self.masking}{variant}-seed{self.seed}"

    def named(self, stem: str) -> str:
        """What samples, ledgers and reports are called: `stem`, or <stem>-<protocol or decoding>."""
        return "-".join([stem, *self.label.values()])

    @property
    def rows_per_step(self) -> int:
        """Rows per optimiser step, over all processes."""
        return self.micro_batch * self.accumulation * self.processes

    def but(self, **changes: Any) -> Config:
        """The same switches with some changed (checked again)."""
        return Config(**{**self.as_dict(), **changes})

    def with_masking(self, masking: str) -> Config:
        """The run beside this one with another masking. `none` is the backbone that this run is fine-tuned from: of
        `backbone_seed`, with the switches in `pretrain` as well."""
        if masking != "none":
            return self.but(masking=masking)
        seed = self.seed if self.backbone_seed < 0 else self.backbone_seed
        return self.but(masking=masking, seed=seed, backbone_seed=-1, variant="", **self.pretrain)

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
        return {s.name: getattr(self, s.name) for s in SWITCHES.values() if not stages or s.stage in stages}


class Switch(NamedTuple):
    """What a command line, a table or a run directory needs to know of a switch."""

    name: str
    stage: str  # which outputs depend on it: run, data, train or sample
    help: str
    paper: str  # the paper's section, or empty
    default: Any  # the paper's
    takes: str  # its choices, or its type and range


def _takes(kind: Any) -> str:
    """A type in words: the choices of a Literal, `list of int`, `mapping`."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) in (list, Annotated):
        return ("list of " if get_origin(kind) is list else "") + _takes(get_args(kind)[0])
    return "mapping" if get_origin(kind) is dict else "true|false" if kind is bool else kind.__name__


_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
SWITCHES: dict[str, Switch] = {}
for _name, _field in Config.model_fields.items():
    _limits = [f" {sign} {getattr(m, key)}" for m in _field.metadata for key, sign in _SIGNS.items() if hasattr(m, key)]
    _more, _text = _field.json_schema_extra, _takes(_field.annotation) + ",".join(_limits)
    SWITCHES[_name] = Switch(_name, _more["stage"], _field.description, _more["paper"], _field.default, _text)

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
    # Two cores, no network, no data: everything is made on the spot (see docs/results/tiny.md).
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
            "lr_floor": 0.1,
            "max_steps": 650,
            "zero_stage": 0,
            "checkpoint_every": 200,
            "eval_every": 130,
        },
        "lora_rank": 16,
        "lora_alpha": 32.0,
        "lora_dropout": 0.0,
        "lr": 5e-3,
        "max_steps": 150,
        "micro_batch": 16,
        "accumulation": 2,
        "processes": 1,
        "precision": "fp32",
        "eos_padding": "batch",
        "gradient_checkpointing": "none",
        "eval_every": 50,
        "eval_rows": 64,
        "benchmarks": ["tinycode"],
        "hole_lengths": [1, 2, 3, 4, 6, 8, 12, 16, 24, 32],
        "lengths": [96],  # the longest answer has 75 tokens
        "cache": "dual",
        "prompt_style": "bare",
        "extract": "first_fence",
        "sample_batch": 40,
    },
    # Two cores, real code: functions of Python's own standard library (see docs/stdlib.md).
    "stdlib": {
        "data": "stdlib",
        "rows": 0,
        "empty_reasoning": "keep",
        "tokenizer": "train",
        "vocab_size": 2048,
        "max_length": 192,
        "eos_padding": "one",
        "backbone": "pretrain",
        "d_model": 160,
        "n_layers": 4,
        "n_heads": 4,
        "mlp_hidden": 448,
        "pretrain": {  # functions without a docstring, too; with LLaDA's own loss
            "data": "stdlib_all",
            "eps_min": 0.05,
            "loss_weight": "inverse_p",
            "normaliser": "answer",
            "lr": 3e-3,
            "muon_lr": 0.02,
            "warmup": 0.05,
            "lr_floor": 0.05,
            "max_steps": 3000,
            "micro_batch": 4,
            "accumulation": 2,
            "processes": 2,
            "checkpoint_every": 250,
            "eval_every": 1000,
        },
        "lora_rank": 0,
        "optimiser": "muon",
        "lr": 1e-3,
        "muon_lr": 0.005,
        "weight_decay": 0.05,
        "max_steps": 200,
        "micro_batch": 4,
        "accumulation": 4,
        "processes": 1,
        "precision": "fp32",
        "zero_stage": 0,
        "gradient_checkpointing": "none",
        "eval_every": 1000,
        "eval_rows": 256,
        "benchmarks": [],
    },
}


def resolve(preset: str = "tiny", **switches: Any) -> Config:
    """The switches of a preset, with some changed by name; a mapping's entries are set one by one.

    Raises UserError for an unknown preset, an unknown switch or a value that the switch does not take.
    """
    if preset not in PRESETS:
        raise UserError(f"preset: there is no {preset!r}; choose one of {', '.join(PRESETS)}.")
    values = {**PRESETS[preset], "preset": preset}
    if switches.get("protocol") in PROTOCOLS:
        benchmarks = _items(switches.get("benchmarks", values.get("benchmarks", SWITCHES["benchmarks"].default)))
        values |= PROTOCOLS[switches["protocol"]].switches(benchmarks[0] if benchmarks else "")
    for name, value in switches.items():
        default = known(name, SWITCHES) and SWITCHES[name].default
        if isinstance(default, dict) and isinstance(value := _json(value), Mapping):
            value = {**default, **values.get(name, {}), **value}
        values[name] = value
    cfg = Config(**values)
    return cfg.with_masking(cfg.masking)


def known(name: str, names: Iterable[str], what: str = "there is no such switch") -> str:
    """`name` if it is one of `names`. Raises UserError that says `what` is wrong and gives the nearest names."""
    if name not in (names := list(names)):
        import difflib

        near = difflib.get_close_matches(name, names, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`treediff switches` lists all of them."
        raise UserError(f"{name}: {what}; {hint}")
    return name


def from_notebook(namespace: Mapping[str, Any], own: tuple[str, ...] = ()) -> Config:
    """The switches that a notebook's parameters cell (and papermill's injected one) set, every other name refused.

    Call it in the first cell after the parameters, with `globals()` and the names of the notebook's own parameters.
    Any switch may be given, also one that the cell does not list. When the cell is run again by hand, the names that
    the notebook made since are let be. Raises UserError naming the nearest valid parameters.
    """
    hidden = ("In", "Out", "exit", "quit", "open")
    plain = (str, int, float, bool, list, dict, type(None))
    named = {k: v for k, v in namespace.items() if k[0] != "_" and k not in hidden and not k.isupper()}  # no constants
    given = {k: v for k, v in named.items() if isinstance(v, plain)}
    if not any(isinstance(v, Config) for v in namespace.values()):
        for name in given:
            known(name, [*own, *SWITCHES], "this notebook has no such parameter")
    return resolve(**{k: v for k, v in given.items() if k in SWITCHES})


def runs_root() -> Path:
    """$TREEDIFF_RUNS, or `runs` in the project folder above the current one, or `runs` here."""
    if os.environ.get("TREEDIFF_RUNS"):
        return Path(os.environ["TREEDIFF_RUNS"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "notebooks" / "01_ast.ipynb").is_file():
            return folder / "runs"
    return here / "runs"
