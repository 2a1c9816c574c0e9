"""The sampler's modes against a literal transcription of LLaDA's loop, in one run.

    python benchmarks/sampling.py                            # random weights at LLaDA's vocabulary
    python benchmarks/sampling.py --run ast --limit 120      # a trained run of the tiny preset, with its pass@1 by mode

For each mode: forward passes, answer tokens per row and forward pass, wall-clock ratio to the exact mode and to the
literal loop, agreement with the exact mode's answers. Answer tokens are those before the first end of text: neither
prompt nor EOS counts. The modes take turns, so that a machine whose speed drifts slows all of them, and ratios are
medians over the rounds (`by CPU`: of the time that the process had a processor). With random weights no proposal is
ever sure, so there the threshold has nothing to show.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks
from treediff.model import forward, llada
from treediff.runs import provenance
from treediff.sampling import diffusion
from treediff.sampling.decode import Decoded, Decoding, canvas, commits_per_step, decode
from treediff.sampling.prompts import answer_text, extract, prompt_ids
from treediff.scoring import score, stats

MASK, EOS = 126336, 126081
MODES: dict[str, dict[str, Any]] = {
    "literal": {},
    "exact": {},
    "prefix cache": {"cache": "prefix"},
    "dual cache": {"cache": "dual"},
    "2 a step": {"steps": 0.5},
    **{f"threshold {t}": {"threshold": t} for t in (0.9, 0.99, 0.999)},
    **{f"{t} + dual": {"threshold": t, "cache": "dual"} for t in (0.9, 0.99, 0.995, 0.999)},
    **{f"{t} + prefix": {"threshold": t, "cache": "prefix"} for t in (0.995,)},
}


@torch.no_grad()
def literal(
    net: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    how: Decoding,
    watch: Callable[[torch.Tensor, float], None] = lambda ids, share: None,
) -> Decoded:
    """LLaDA's published loop: logits of every position, softmax over the vocabulary in float64, topk, no early end."""
    x, seen = canvas(prompts, how.gen_length, how.mask_id)
    device = forward.lm_head(net).weight.device
    x, seen = x.to(device), None if seen is None else seen.to(device)
    if seen is not None:
        x[seen == 0] = how.ends[0]  # padding is no mask to fill
    start = x.shape[1] - how.gen_length
    blocks = how.gen_length // how.block_length
    steps = how.steps // blocks
    for block in range(blocks):
        begin, end = (start + (block + i) * how.block_length for i in (0, 1))
        counts = [commits_per_step(int(n), steps) for n in (x[:, begin:end] == how.mask_id).sum(1)]
        for i in range(steps):
            masked = x == how.mask_id
            logits = forward.lm_head(net)(forward.hidden_states(net, x, seen))
            x0 = logits.argmax(-1)
            p = torch.softmax(logits.to(torch.float64), -1)
            confidence = p.gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            for row in range(x.shape[0]):
                chosen = confidence[row].topk(counts[row][i]).indices
                x[row, chosen] = x0[row, chosen]
            watch(x, (block * steps + i + 1) / how.steps)
    none = torch.zeros(len(x))
    return Decoded(x[:, start:], none, none, none, none, how.steps)


def tokens_before_end(ids: torch.Tensor, ends: Sequence[int]) -> list[list[int]]:
    """Each answer's tokens before its first end of text."""
    rows = ids.tolist()
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in rows]


def rounds(
    net: torch.nn.Module, batches: list[list[list[int]]], how: Decoding, modes: Sequence[str], times: int
) -> dict[str, dict[str, Any]]:
    """Decode all batches in every mode, `times` times in turn: answers, seconds by round and row-forwards by mode."""
    out: dict[str, dict[str, Any]] = {mode: {"seconds": [], "cpu": []} for mode in modes}
    for _ in range(times):
        for mode in modes:
            change = dict(MODES[mode])
            if "steps" in change:
                change["steps"] = int(how.steps * change["steps"])
            mine = dataclasses.replace(how, **change)
            loop = literal if mode == "literal" else decode
            begin, cpu = time.perf_counter(), time.process_time()
            done = [loop(net, batch, mine) for batch in batches]
            out[mode]["seconds"].append(time.perf_counter() - begin)
            out[mode]["cpu"].append(time.process_time() - cpu)
            out[mode]["forwards"] = sum(d.forwards for d in done)
            out[mode]["rows_forwards"] = sum(
                mine.steps * len(d.ids) if mode == "literal" else int((d.committed_at.amax(1) + 1).sum()) for d in done
            )
            out[mode]["answers"] = [a for d in done for a in tokens_before_end(d.ids, how.ends)]
    return out


def table(out: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One record per mode; ratios above 1 are faster."""
    records = []
    for mode, found in out.items():
        tokens = sum(map(len, found["answers"]))
        same = [a == b for a, b in zip(found["answers"], out["exact"]["answers"], strict=True)]
        record = {"mode": mode, "forwards": found["forwards"], "answer_tokens": tokens}
        record["tokens_per_forward"] = tokens / max(1, found["rows_forwards"])
        record["tokens_per_s"] = tokens / statistics.median(found["seconds"])
        for other, clock in (("exact", "seconds"), ("exact", "cpu"), ("literal", "seconds")):
            # Speed is answer tokens per second, so that a mode gains nothing by answering less.
            pairs = zip(out[other][clock], found[clock], strict=True)
            scale = tokens / max(1, sum(map(len, out[other]["answers"])))
            name = f"x_{other}" if clock == "seconds" else f"x_{other}_cpu"
            record[name] = statistics.median(a / b for a, b in pairs) * scale
        record["same_answers"] = sum(same) / len(same)
        records.append(record)
    return records


def show(records: list[dict[str, Any]]) -> None:
    head = (
        f"{'mode':14} {'forwards':>8} {'tok/forward':>11} {'tok/s':>8} {'x exact':>8} {'x literal':>9} {'= exact':>8}"
    )
    print(head + ("   pass@1  difference to exact [points]" if "passed" in records[0] else ""))
    for r in records:
        line = f"{r['mode']:14} {r['forwards']:8} {r['tokens_per_forward']:11.2f} {r['tokens_per_s']:8.1f} "
        line += f"{r['x_exact']:8.2f} {r['x_exact_cpu']:7.2f} {r['x_literal']:9.2f} {r['same_answers']:7.1%}"
        if "passed" in r:
            line += f"   {r['passed']}/{r['tasks']}"
            if r["mode"] != "exact":
                line += f"  {r['difference']:+.1f} [{r['low']:+.1f}, {r['high']:+.1f}]"
                line += f", {r['only_exact']} to {r['only_mode']}"
        print(line)


def random_weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    cfg = resolve("tiny", d_model=args.d_model, n_layers=args.n_layers, mlp_hidden=3 * args.d_model)
    net = llada.new_backbone(cfg, 126464, EOS, MASK)
    # A fresh head lies along the embeddings, so that every answer would be the mask token that its position holds.
    forward.lm_head(net).weight.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    prompt = torch.randint(0, 126_000, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    how = Decoding(MASK, (EOS,), args.length, args.length, 32)
    print(f"d_model {args.d_model}, {args.n_layers} layers, vocabulary 126464, {args.batch} x {args.length} tokens")
    modes = ["literal", "exact", "prefix cache", "dual cache"]
    return table(rounds(net, [prompt.tolist()], how, modes, args.rounds))


def trained_run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A trained run on TinyCode: the same, and pass@1 with the paired interval of its difference to the exact mode."""

    cfg = resolve("tiny", masking=args.run, limit=args.limit, lengths=[args.length], precision=args.precision)
    tok = pipeline.tokenizer(cfg)
    net = diffusion.load_run(cfg)
    problems = benchmarks.benchmark_problems(cfg, "tinycode")
    prompts = {task: prompt_ids(cfg, tok, p["prompt"])[0] for task, p in problems.items()}
    order = sorted(prompts, key=lambda task: len(prompts[task]))
    batches = [[prompts[t] for t in order[i : i + args.batch]] for i in range(0, len(order), args.batch)]
    how = diffusion.decoding(cfg, tok, args.length)
    print(f"{cfg.run_dir.name}, {len(order)} problems in batches of {args.batch}, T = {args.length}, {args.precision}")
    out = rounds(net, batches, how, list(MODES), args.rounds)
    records, ledgers = table(out), {}
    with tempfile.TemporaryDirectory() as folder:
        for mode, found in out.items():
            lines = []
            for task, ids in zip(order, found["answers"], strict=True):
                text = answer_text(tok, ids)
                program = extract(text, problems[task]["entry_point"], cfg.extract)
                lines.append(json.dumps({"task_id": task, "solution": program}) + "\n")
            samples = Path(folder) / f"{mode}.jsonl"
            samples.write_text("".join(lines))
            data = benchmarks.benchmark_file(cfg, "tinycode")
            ledgers[mode] = score.score("tinycode", data, samples, samples.with_suffix(".json"), limit_to=order)
    for r in records:
        both = stats.compare(*(stats.passed(ledgers[m], "plus") for m in ("exact", r["mode"])))
        r |= {"passed": both["both"] + both["only_b"], "tasks": both["n"], "p": both["p"]}
        r |= {"only_exact": both["only_a"], "only_mode": both["only_b"]}
        r |= {k: 100 * both[k] for k in ("difference", "low", "high")}
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("d_model", 256), ("n_layers", 4), ("prompt", 96), ("limit", 120), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--length", type=int, help="T; by default 64, or 96 with --run")
    parser.add_argument("--batch", type=int, help="prompts together; by default 2, or 40 with --run")
    parser.add_argument("--run", metavar="MASKING", help="a trained run of the tiny preset instead of random weights")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--out", type=Path, help="write the records and their provenance here (JSON)")
    args = parser.parse_args()
    args.length = args.length or (96 if args.run else 64)
    args.batch = args.batch or (40 if args.run else 2)
    records = trained_run(args) if args.run else random_weights(args)
    show(records)
    if args.out:
        facts = provenance(command=sys.argv[1:], threads=torch.get_num_threads(), records=records)
        args.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
