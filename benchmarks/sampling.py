"""The sampler against a literal transcription of LLaDA's loop, in one run: python benchmarks/sampling.py

A backbone with random weights at LLaDA's vocabulary; the wall-clock ratio, forwards, and whether the tokens agree. The
two alternate, so that a machine whose speed drifts slows both. Only answer tokens count.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from treediff import model, sample
from treediff.config import resolve

MASK, EOS = 126336, 126081


@torch.no_grad()
def plain(net: torch.nn.Module, prompt: torch.Tensor, how: sample.Decoding) -> torch.Tensor:
    """LLaDA's published loop: logits of every position, softmax over the vocabulary in float64, topk."""
    x = torch.full((prompt.shape[0], prompt.shape[1] + how.gen_length), how.mask_id)
    x[:, : prompt.shape[1]] = prompt
    blocks = how.gen_length // how.block_length
    steps = how.steps // blocks
    for block in range(blocks):
        start, end = (prompt.shape[1] + (block + i) * how.block_length for i in (0, 1))
        counts = [sample.commits_per_step(int(n), steps) for n in (x[:, start:end] == how.mask_id).sum(1)]
        for i in range(steps):
            masked = x == how.mask_id
            logits = model.head(net)(model.encode(net, x))
            x0 = logits.argmax(-1)
            p = torch.softmax(logits.to(torch.float64), -1)
            confidence = p.gather(-1, x0[..., None])[..., 0]
            confidence[:, end:] = -torch.inf
            confidence = torch.where(masked, confidence, -torch.inf)
            for row in range(x.shape[0]):
                chosen = confidence[row].topk(counts[row][i]).indices
                x[row, chosen] = x0[row, chosen]
    return x[:, prompt.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("d_model", 256), ("n_layers", 4), ("length", 64), ("prompt", 96), ("batch", 2), ("runs", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    cfg = resolve("tiny", d_model=args.d_model, n_layers=args.n_layers, mlp_hidden=3 * args.d_model)
    net = model.new_backbone(cfg, 126464, EOS, MASK)
    prompt = torch.randint(0, 126_000, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    how = sample.Decoding(MASK, EOS, args.length, args.length, 32, official=True)
    seconds: dict[str, list[float]] = {"plain": [], "exact": []}
    for _ in range(args.runs):
        begin = time.perf_counter()
        want = plain(net, prompt, how)
        middle = time.perf_counter()
        got = sample.decode(net, prompt.tolist(), how)
        seconds["plain"].append(middle - begin)
        seconds["exact"].append(time.perf_counter() - middle)
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["exact"], strict=True)]
    tokens = args.batch * args.length
    print(
        f"d_model {args.d_model}, {args.n_layers} layers, vocabulary 126464, {args.batch} x {args.length} answer tokens"
    )
    for name, values in seconds.items():
        print(f"{name:6} {tokens / statistics.median(values):8.1f} answer tokens/s (median of {args.runs})")
    print(f"ratio  {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})")
    print(f"tokens that agree: {int((want == got.ids).sum())} of {tokens}; forwards: {got.forwards}")


if __name__ == "__main__":
    main()
