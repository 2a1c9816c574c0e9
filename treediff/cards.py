"""The model card of an adapter or export and the data card of a prepared set: what the kit knows, and what it does not.

    model_card(cfg, "adapter")               # adapter/README.md, beside PEFT's files
    data_card(cfg, stats)                    # README.md of a prepared data set

Both are Markdown with the front matter that a model hub reads. Nothing in them is written by hand or taken from
elsewhere: what no file of the run says stands under "Not known".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from treediff import usage
from treediff.config import Config, resolve
from treediff.files import read_json, read_jsonl
from treediff.strategies import STRATEGIES

LICENCES = {
    "GSAI-ML/LLaDA-8B-Instruct": "mit",
    "GSAI-ML/LLaDA-8B-Base": "mit",
    "GSAI-ML/LLaDA-1.5": "mit",
    "nvidia/OpenCodeReasoning": "cc-by-4.0",
    "tinycode": "apache-2.0",
    "stdlib": "psf-2.0",
    "stdlib_all": "psf-2.0",
}
"""As in THIRD_PARTY.md; TinyCode is made by this kit, `stdlib` is Python's own library."""
KINDS = {
    "adapter": "a LoRA adapter in PEFT's format",
    "model": "all weights, in LLaDA's checkpoint format",
    "export": "the backbone with the adapter merged into it, in LLaDA's checkpoint format",
}


def model_card(cfg: Config, kind: str, results: Sequence[str] = ()) -> str:
    """The card of a run's `adapter`, own `model` or `export`; `results`: lines on its ledgers."""
    about = _json(cfg.run_dir / "provenance.json")
    made = about.get("backbone") or cfg.backbone
    spot = "made on the spot by this kit" if cfg.backbone == "pretrain" else f"`{made}`, revision `{cfg.revision}`"
    rule = STRATEGIES[cfg.masking].title
    front: dict[str, Any] = {"library_name": "peft"} if kind == "adapter" else {}
    front |= {"tags": ["treediff", "diffusion", "code", *(["lora"] if kind == "adapter" else [])]}
    front |= {"base_model": cfg.backbone} if _on_hub(cfg.backbone) else {}
    front |= {"datasets": [cfg.data]} if _on_hub(cfg.data) else {}
    unknown = ["how it behaves on tasks other than those under Results, and in other programming languages"]
    unknown += ["any risk beyond wrong code: it was not evaluated for any"]
    if cfg.backbone != "pretrain" and cfg.backbone not in LICENCES:
        unknown.append("the backbone's licence, under which this stands: state it before you pass this on")
    if cfg.data not in LICENCES:
        unknown.append("the training data's licence and origin")
    evals = list(read_jsonl(p)) if (p := cfg.run_dir / "evals.jsonl").exists() else []
    lines = [
        *_front(front),
        f"# {cfg.run_dir.name}: {KINDS[kind]}",
        "",
        "A masked-diffusion language model for code, trained by the reproduction kit of *TreeDiff: AST-Guided Code "
        f"Generation with Diffusion LLMs*. This is no release of the paper's authors. Masking: {rule}.",
        "",
        "## What it comes from",
        "",
        f"- Backbone: {spot}; licence: {_licence(cfg.backbone)}",
        f"- Training data: `{cfg.data}`; licence: {_licence(cfg.data)}; data set {about.get('data', 'unknown')}",
        f"- Code: commit {about.get('commit') or 'unknown'}{_changed(about)}; time: {about.get('time', 'unknown')}",
        f"- Machine: {json.dumps(about.get('machine', 'unknown'))}; {_versions(about)}",
        f"- Optimiser steps: {about.get('steps', 'unknown')} of {cfg.rows_per_step} rows; seed {cfg.seed}",
        "",
        "Switches of the training that are not the paper's:",
        "",
        *_switches(cfg),
        "",
        "## What it cost",
        "",
        *_cost(cfg.run_dir),
        "",
        "## Results",
        "",
        *(results or ["None were scored when this was written."]),
        *([f"- Last held-out evaluation: `{json.dumps(evals[-1])}`"] if evals else []),
        "",
        "## Use",
        "",
        "Sample from it with this kit (`treediff sample`), which decodes as LLaDA does. Code that it writes is "
        "untrusted: run it in a sandbox only. One training run says nothing about a masking rule.",
        "",
        "## Not known",
        "",
        *(f"- {x}" for x in unknown),
    ]
    return "\n".join(lines) + "\n"


def data_card(cfg: Config, stats: Mapping[str, Any]) -> str:
    """The card of a prepared data set; `stats` is its stats.json."""
    rows, found = stats["rows"], stats["contamination"]
    unknown = ["who wrote the rows, in which languages people speak, and what they say of persons: rows are not read"]
    if cfg.data not in LICENCES:
        unknown.insert(0, "the rows' licence and origin: state them before you pass this on")
    if not found.get("checked"):
        unknown.append("what of the benchmarks it holds: no benchmark's files were at hand")
    lines = [
        *_front({"tags": ["treediff", "code"], **({"source_datasets": [cfg.data]} if _on_hub(cfg.data) else {})}),
        f"# {rows['kept']:,} encoded rows of {cfg.data}",
        "",
        "A training set of the reproduction kit of *TreeDiff: AST-Guided Code Generation with Diffusion LLMs*: prompt, "
        "reasoning and code as token ids, with each token's region or syntax tier. Open it with "
        "`datasets.load_from_disk`; stats.json has all of this and more.",
        "",
        f"- Source: `{cfg.data}`, split `{cfg.data_split}`; licence: {_licence(cfg.data)}",
        f"- Language of the code: {cfg.language}; tokenizer: `{cfg.tokenizer}`; at most {cfg.max_length} tokens a row",
        f"- Fingerprint: `{stats['fingerprint']}`",
        "",
        "## Rows",
        "",
        "| rows | number |",
        "| --- | --- |",
        f"| read | {rows['read']:,} |",
        *(f"| dropped: {why} | {n:,} |" for why, n in rows["dropped"].items()),
        f"| can serve | {rows['usable']:,} |",
        f"| not chosen (`choice` {cfg.choice}, `data_seed` {cfg.data_seed}) | {rows['not_chosen']:,} |",
        f"| kept | {rows['kept']:,} |",
        "",
        "## Tokens",
        "",
        "| tokens of | number |",
        "| --- | --- |",
        *(f"| {label} | {n:,} |" for label, n in stats["tokens"].items()),
        "",
        f"Rows whose code does not parse whole: {stats['rows_with_parse_errors']:,} "
        f"({stats['parse_error_byte_share']:.2%} of the code's bytes).",
        "",
        "## Benchmarks in it",
        "",
        f"```json\n{json.dumps({k: v for k, v in found.items() if k not in ('nearest', 'embeddings')}, indent=1)}\n```",
        "",
        "## Switches",
        "",
        *(f"- `{k}`: {json.dumps(v)}" for k, v in cfg.as_dict("data").items()),
        "",
        "## Not known",
        "",
        *(f"- {x}" for x in unknown),
    ]
    return "\n".join(lines) + "\n"


def _front(values: Mapping[str, Any]) -> list[str]:
    return ["---", *(f"{k}: {json.dumps(v)}" for k, v in values.items()), "---", ""]  # JSON is YAML


def _on_hub(name: str) -> bool:
    return name.count("/") == 1 and not Path(name).exists()


def _licence(name: str) -> str:
    return LICENCES.get(name, "apache-2.0, made by this kit" if name == "pretrain" else "not known to the kit")


def _changed(about: Mapping[str, Any]) -> str:
    return ", with changes that were not committed" if about.get("changed_files") else ""


def _versions(about: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()) or "versions unknown"


def _switches(cfg: Config) -> list[str]:
    paper = resolve("paper", masking=cfg.masking, seed=cfg.seed).as_dict("data", "train")
    own = {k: v for k, v in cfg.as_dict("data", "train").items() if v != paper[k]}
    return [f"- `{k}`: {json.dumps(v)} (the paper's run: {json.dumps(paper[k])})" for k, v in own.items()] or ["- none"]


def _cost(run_dir: Path) -> list[str]:
    spent = usage.total(run_dir)
    if not spent:
        return ["Not known: no account was kept."]
    lines = ["| stage | attempts | of them not finished | seconds | GPU-hours | energy |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for stage, of in spent.items():
        energy = ", ".join(f"{k} {v / 3.6e6:.4g} kWh" for k, v in of["joules"].items()) or "no counter here"
        head = f"| {stage} | {of['attempts']} | {of['not_finished']} | {of['seconds']:,.0f}"
        lines.append(f"{head} | {of['gpu_hours']:.3g} | {energy} |")
    return lines


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}
