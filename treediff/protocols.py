"""Published evaluations of code models: one record of switches each, with its source and what was published under it.

    PROTOCOLS["llada"].switches("humaneval")        # {"lengths": [512], "block_length": 512, ...}
    python -m treediff.protocols > docs/protocols.md

`--protocol NAME` sets a record's switches and refuses any other value of them. The same checkpoint scores 35 to 49 on
HumanEval under them, so a rate says nothing without its protocol. What a source does not state has our default, and the
record says that it is unknown.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OURS: dict[str, Any] = {
    "lengths": [256, 512],
    "block_length": 32,
    "tokens_per_step": 1,
    "temperature": 0.0,
    "guidance": 0.0,
    "remasking": "low_confidence",
    "threshold": 0.0,
    "cache": "none",
    "prompt_style": "instruct",
    "think": "free",
    "eos_suppression": "off",
    "extract": "sanitize",
    "verdicts": "own",
}
"""Every switch that a protocol fixes, with its value where a source does not state it."""


@dataclass(frozen=True)
class Published:
    """A rate that somebody published under a protocol [% of tasks]."""

    model: str
    benchmark: str  # HE, HE+, MBPP, MBPP+
    rate: float
    where: str  # length, and whose figure it is


@dataclass(frozen=True)
class Protocol:
    """How somebody evaluated: the switches that the source states, and which it does not."""

    name: str
    title: str
    source: str
    stated: Mapping[str, Any]
    by_benchmark: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # stated for one benchmark alone
    published: tuple[Published, ...] = ()
    notes: tuple[str, ...] = ()

    benchmarks = ("humaneval", "mbpp")
    """Those that every protocol speaks of."""

    def switches(self, benchmark: str) -> dict[str, Any]:
        """The value of every switch of OURS under which the benchmark is sampled and counted."""
        return {**OURS, **self.stated, **self.by_benchmark.get(benchmark, {})}

    def unknown(self, benchmark: str) -> list[str]:
        """The switches that the source does not state for a benchmark: they have our defaults."""
        return [n for n in OURS if n not in self.stated and n not in self.by_benchmark.get(benchmark, {})]

    def differences(self, benchmark: str, made: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Switches of samples (`settings` of a line) that are not the protocol's: (theirs, the protocol's)."""
        wanted = self.switches(benchmark)
        lengths = wanted.pop("lengths")
        found = {n: (made[n], v) for n, v in wanted.items() if n in made and made[n] != v}
        return found | ({"T": (made["T"], lengths)} if made["T"] not in lengths else {})


_LLADA = "LLaDA's own evaluation settings (EVAL.md of its repository)"
_BOTH = "internal harness", "OpenCompass"


def _llada(model: str, at: str, benchmark: str, *rates: float) -> tuple[Published, ...]:
    return tuple(Published(model, benchmark, r, f"{at}, {who}") for r, who in zip(rates, _BOTH, strict=True))


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol(
            "treediff",
            "The TreeDiff paper's",
            "arXiv 2508.01473 v3, section 4.1, appendix A and Table 1",
            {"lengths": [256, 512], "tokens_per_step": 1, "temperature": 0.0, "remasking": "low_confidence"}
            | {"verdicts": "evalplus"},
            published=tuple(
                Published(model, benchmark, rate, f"T = {t}, the paper's Table 1")
                for model, at in (
                    ("LLaDA-8B-Instruct", {256: (39.6, 34.8, 51.9, 43.1), 512: (36.6, 31.7, 39.4, 31.7)}),
                    ("with random masking", {256: (39.6, 35.4, 52.9, 43.9), 512: (38.4, 32.3, 41.5, 32.8)}),
                    ("with AST masking (TreeDiff)", {256: (42.1, 37.2, 52.9, 44.2), 512: (40.2, 36.6, 42.3, 33.3)}),
                )
                for t, rates in at.items()
                for benchmark, rate in zip(("HE", "HE+", "MBPP", "MBPP+"), rates, strict=True)
            ),
            notes=(
                "T is both the longest answer and the number of denoising steps.",
                "The tasks are EvalPlus's (164, and 378 of MBPP+ v0.2.0), so its verdicts are taken; which version "
                "judged is unknown.",
            ),
        ),
        Protocol(
            "llada",
            "LLaDA's own, for LLaDA-8B-Instruct",
            _LLADA,
            {},
            {
                "humaneval": {"lengths": [512], "block_length": 512, "eos_suppression": "logits"}
                | {"extract": "first_fence"},
                "mbpp": {"lengths": [256], "block_length": 256, "eos_suppression": "confidence"},
            },
            (
                *_llada("LLaDA-8B-Instruct", "512 tokens, block 512", "HE", 49.4, 47.0),
                *_llada("LLaDA-8B-Instruct", "256 tokens, block 256", "MBPP", 41.0, 39.6),
            ),
            ("Another account of the 49.4 has EOS's confidence suppressed, where EVAL.md has its logits.",),
        ),
        Protocol(
            "llada15",
            "LLaDA's own, for LLaDA-1.5",
            _LLADA,
            {"lengths": [512], "block_length": 32, "eos_suppression": "confidence"},
            published=(
                *_llada("LLaDA-1.5", "512 tokens, block 32", "HE", 52.4, 51.2),
                *_llada("LLaDA-1.5", "512 tokens, block 32", "MBPP", 42.8, 42.6),
            ),
        ),
        Protocol(
            "fast_dllm",
            "Fast-dLLM's, with its parallel decoding",
            "Fast-dLLM's published figures, and an independent rerun of it",
            {"lengths": [256, 512], "block_length": 32, "threshold": 0.9},
            published=(
                Published("LLaDA-8B-Instruct", "HE", 41.5, "T = 256, Fast-dLLM"),
                Published("LLaDA-8B-Instruct", "HE", 43.9, "T = 512, Fast-dLLM"),
                Published("LLaDA-8B-Instruct", "HE", 38.4, "T = 256, an independent rerun"),
                Published("LLaDA-8B-Instruct", "HE", 48.2, "T = 512, an independent rerun"),
            ),
            notes=(
                "In which of its modes (plain, threshold, cache) these rates were taken is not known here.",
                "The rerun lost nothing on HumanEval by the threshold and 2 to 7 points by the cache; its MBPP at 512 "
                "fell from 32.2 to 7.6.",
            ),
        ),
        Protocol(
            "open_dllm",
            "Open-dLLM's harness",
            "Open-dLLM's published figures; its settings are not known here",
            {},
            published=tuple(
                Published("LLaDA-8B", benchmark, rate, "length unknown, Open-dLLM")
                for benchmark, rate in (("HE", 35.4), ("HE+", 30.5), ("MBPP", 38.8), ("MBPP+", 52.6))
            ),
            notes=("Every switch has our default: a rate under this name is no reproduction until they are known.",),
        ),
        Protocol(
            "evalplus_chat",
            "EvalPlus's chat mode",
            "EvalPlus 0.3.1: evalplus/codegen.py, evalplus/provider/base.py, evalplus/provider/utility.py",
            {"lengths": [768], "temperature": 0.0, "prompt_style": "prefill", "think": "free"}
            | {"extract": "sanitize", "verdicts": "evalplus"},
            notes=(
                "Made for autoregressive models (`--model`), whose answers end after at most 768 tokens; block, steps "
                "and EOS mean nothing to them.",
                "No figure is known here that states this mode. The paper's Table 1 quotes EvalPlus's leaderboard, "
                "which has several.",
            ),
        ),
    )
}
"""By name."""


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown() -> str:
    """docs/protocols.md: every record as it stands here."""
    lines = [
        "# Evaluation protocols",
        "",
        "Written from the records in `treediff/protocols.py` by `python -m treediff.protocols`; a test holds them "
        "together.",
        "",
        "The same LLaDA-8B-Instruct scores from 35 to 49 percent on HumanEval, by who evaluates it. A protocol is the "
        "set of switches behind such a figure. `treediff score --preset paper --masking none --protocol llada` sets "
        "them, each benchmark's own; any other value of one of them is refused. Samples and ledgers carry the "
        "protocol's name, so that several stand side by side, and `treediff report --preset paper --protocol llada` "
        "makes the report of one of them. It names the protocol in the title and at every table of ours, shows what "
        "was published under it, refuses samples that were made otherwise, and sets the paper's own rates beside ours "
        "under `treediff` alone. A report without a protocol says which one its samples agree with.",
        "",
        "What a source does not state has our default and is named as unknown. Rates are percent of tasks.",
    ]
    for p in PROTOCOLS.values():
        lines += ["", f"## `{p.name}`", "", f"{p.title}. Source: {p.source}.", ""]
        lines += ["| switch | HumanEval | MBPP |", "| --- | --- | --- |"]
        both = [(p.switches(b), p.unknown(b)) for b in p.benchmarks]
        for name in OURS:
            cells = [_value(of[name]) + (" (unknown, ours)" if name in unknown else "") for of, unknown in both]
            lines.append(f"| `{name}` | {' | '.join(cells)} |")
        lines += ["", *(f"- {note}" for note in p.notes), *([""] if p.notes else [])]
        if p.published:
            tests = list(dict.fromkeys(f.benchmark for f in p.published))
            lines += [f"| published for | {' | '.join(tests)} | where |", f"| --- |{' --- |' * (len(tests) + 1)}"]
            rows: dict[tuple[str, str], dict[str, float]] = {}
            for f in p.published:
                rows.setdefault((f.model, f.where), {})[f.benchmark] = f.rate
            for (model, where), rates in rows.items():
                lines.append(f"| {model} | {' | '.join(str(rates.get(t, '')) for t in tests)} | {where} |")
        else:
            lines.append("Nothing is known to be published under it.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(markdown())
