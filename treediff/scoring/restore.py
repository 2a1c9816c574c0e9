"""AST nodes restored whole: one node of a held-out function is masked, and nothing else; does the model find it again?

    path = score(cfg)                       # runs/.../scores/nodes.json, made or gone on with
    found = nodes(records)                  # which nodes, a seeded choice: the same for every run
    right = restore(net, mask_id, found)    # bool per node

The model is told how many tokens the hole has. It fills it as the sampler fills a block, greedily: each forward pass
commits the most confident token, ties by position. A node counts only if every token of it is the original one, so a
hole is given up at its first wrong token; that changes no outcome and saves most of the passes.
Command: treediff score --preset stdlib --masking ast
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from treediff import progress
from treediff.config import Config
from treediff.data import examples, sources, stdlib
from treediff.errors import UserError
from treediff.files import read_json, write_json
from treediff.masking import tiers, tokens
from treediff.masking.tokens import CODE
from treediff.model import forward
from treediff.sampling import diffusion
from treediff.training import train

if TYPE_CHECKING:
    from torch import nn

PER_TIER = 2000
"""Nodes per tier, chosen by a hash of their names."""
SIZES = (1, 4)
"""Tokens of the nodes that are asked for, from and to. A backbone of two cores restores next to no longer ones."""
_BATCH_TOKENS = 4096  # of one forward pass
_PART = 1000  # nodes between two writes


class Node(NamedTuple):
    """A hole: tokens [start, end) of `ids` (int32), the AST node's tier, and whether its own type has that tier."""

    id: str  # program:start-end, in tokens of the encoded row
    program: str
    tier: str
    typed: bool
    ids: np.ndarray
    start: int
    end: int


def nodes(records: list[dict[str, Any]], per_tier: int = PER_TIER, sizes: tuple[int, int] = SIZES) -> list[Node]:
    """The nodes to restore: of each tier `per_tier` (all, if there are fewer) of the distinct holes in these rows.

    A node has the tier of its type (Algorithm 1); one whose type has none, like the comparison in an `if`, has the
    tier that owns most of its tokens, the heavier on a tie, and is left out if that is the default. Nodes with the
    same tokens are one hole, which has the tier of its outermost node with a typed one. `records` as
    `examples.encode` makes them with `span_nodes = all`.
    """
    found: dict[str, list[tuple[bytes, Node]]] = {tier: [] for tier in tiers.TIERS[1:]}
    for record in records:
        labels = record["labels"].astype(np.int64) - CODE
        holes: dict[tuple[int, int], int] = {}
        for start, end, tier in record["spans"].reshape(-1, 3).tolist():
            if sizes[0] <= end - start <= sizes[1]:
                holes[start, end] = holes.get((start, end)) or tier
        for (start, end), code in holes.items():
            owners = np.bincount(labels[start:end], minlength=len(tiers.TIERS))
            tier = code or len(owners) - 1 - int(np.argmax(owners[::-1]))
            if tier:
                name = f"{record['id']}:{start}-{end}"
                node = Node(name, record["id"], tiers.TIERS[tier], code > 0, record["input_ids"], start, end)
                found[node.tier].append((hashlib.sha256(name.encode()).digest(), node))
    return [node for some in found.values() for _, node in sorted(some, key=lambda pair: pair[0])[:per_tier]]


@torch.no_grad()
def restore(net: nn.Module, mask_id: int, holes: list[Node]) -> list[bool]:
    """Whether each hole is filled with its own tokens, all of them."""
    device = next(net.parameters()).device
    right = [True] * len(holes)
    canvases = []
    for hole in holes:
        canvas = torch.from_numpy(hole.ids.astype(np.int64))
        canvas[hole.start : hole.end] = mask_id
        canvases.append(canvas)
    still = sorted(range(len(holes)), key=lambda i: len(holes[i].ids))
    while still:
        ahead, at = [], 0
        while at < len(still):
            rows = max(1, _BATCH_TOKENS // len(holes[still[min(at + 63, len(still) - 1)]].ids))
            batch = still[at : at + min(rows, 64)]
            at += len(batch)
            found = _surest(net, [canvases[i] for i in batch], mask_id, device)
            for i, (place, token) in zip(batch, found, strict=True):
                canvases[i][place] = token
                right[i] = token == int(holes[i].ids[place])
                if right[i] and (canvases[i][holes[i].start : holes[i].end] == mask_id).any():
                    ahead.append(i)
        still = ahead
    return right


def _surest(net: nn.Module, canvases: list[torch.Tensor], mask_id: int, device: torch.device) -> list[tuple[int, int]]:
    """Of each canvas the masked place whose proposal is the most confident, and the proposed token."""
    width = max(map(len, canvases))
    ids = torch.zeros((len(canvases), width), dtype=torch.long)
    seen = torch.zeros_like(ids)
    for i, canvas in enumerate(canvases):
        ids[i, : len(canvas)], seen[i, : len(canvas)] = canvas, 1
    row, place = ((ids == mask_id) & (seen == 1)).nonzero(as_tuple=True)
    hidden = forward.hidden_states(net, ids.to(device), None if seen.all() else seen.to(device))
    at = forward.predicting(net, (row * width + place).to(device), width)
    logits = forward.lm_head(net)(hidden.flatten(0, 1)[at]).float()
    logits[:, mask_id] = -torch.inf
    best, token = logits.max(1)
    sure = torch.full(ids.shape, -torch.inf, device=device)
    sure[row, place] = best - logits.logsumexp(1)
    proposed = torch.zeros_like(ids, device=device)
    proposed[row, place] = token
    where = sure.argmax(1, keepdim=True)
    return list(zip(where[:, 0].tolist(), proposed.gather(1, where)[:, 0].tolist(), strict=True))


def held_out(cfg: Config) -> list[dict[str, Any]]:
    """The encoded held-out functions that fit `max_length`, under the default owners: the same nodes for every run."""
    if cfg.data not in stdlib.SOURCES:
        raise UserError(
            f"data: nodes are restored on the held-out part of stdlib, which {cfg.data} has not; set stdlib."
        )
    cfg = cfg.but(span_nodes="all", tier_owner="innermost", token_owner="first_byte", blank_owner="none")
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    found = []
    for row in stdlib.rows(held_out=True):
        try:
            found.append(examples.encode(cfg, tok, examples.example(row, empty_reasoning="keep")))
        except examples.Dropped:
            continue
    return found


def ledger_path(cfg: Config) -> Path:
    """runs/<preset>/<run>/scores/nodes.json."""
    return cfg.run_dir / "scores" / "nodes.json"


def score(cfg: Config) -> Path:
    """The ledger of the run's restored nodes: {"benchmark", "settings", "weights": their hash, "tasks": {node:
    {"program", "tier", "typed", "tokens", "pass"}}}, written whole or not at all; a killed call goes on.

    Raises UserError without trained weights.
    """
    path = ledger_path(cfg)
    mine = {"benchmark": "stdlib-nodes", "settings": _settings(cfg), "weights": weights(cfg)}
    if path.exists() and {k: v for k, v in read_json(path).items() if k != "tasks"} == mine:
        return path
    chosen = nodes(held_out(cfg))
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    passed = _passed(part, mine)
    if not passed:
        part.write_text(json.dumps(mine) + "\n")
    todo = sorted((n for n in chosen if n.id not in passed), key=lambda n: len(n.ids))
    net = diffusion.load_run(cfg).eval() if todo else None
    mask_id = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision).mask_token_id
    there = len(chosen) - len(todo)
    with progress.bar(total=len(chosen), initial=there, desc=f"nodes {cfg.run_dir.name}", mininterval=2) as bar:
        for first in range(0, len(todo), _PART):
            some = todo[first : first + _PART]
            right = restore(net, mask_id, some) if net else []
            with part.open("a") as file:
                file.writelines(json.dumps([n.id, r]) + "\n" for n, r in zip(some, right, strict=True))
                file.flush()
                os.fsync(file.fileno())
            passed |= {n.id: r for n, r in zip(some, right, strict=True)}
            bar.update(len(some))
    tasks = {
        n.id: {"program": n.program, "tier": n.tier, "typed": n.typed, "tokens": n.end - n.start, "pass": passed[n.id]}
        for n in chosen
    }
    write_json(path, mine | {"tasks": tasks})
    part.unlink(missing_ok=True)
    return path


def _passed(part: Path, mine: dict[str, Any]) -> dict[str, bool]:
    """What a killed call left, if it was made under these settings; a line that was cut short is left out."""
    if not part.exists():
        return {}
    raw = part.read_bytes()
    first, *lines = raw[: raw.rfind(b"\n") + 1].splitlines() or [b"{}"]
    if json.loads(first) != mine:
        return {}
    if not raw.endswith(b"\n"):
        part.write_bytes(raw[: raw.rfind(b"\n") + 1])
    return dict(map(json.loads, lines))


def _settings(cfg: Config) -> dict[str, Any]:
    """What two ledgers must agree in to be compared."""
    tokenizer = Path(sources.tokenizer_folder(cfg)) / "tokenizer.json"
    return {
        "data": sources.data_stamp(cfg),
        "tokenizer": hashlib.sha256(tokenizer.read_bytes()).hexdigest() if tokenizer.exists() else cfg.tokenizer,
        "max_length": cfg.max_length,
        "per_tier": PER_TIER,
        "sizes": list(SIZES),
        "fill": "greedy, one token a forward pass, the most confident first; the hole's length is given",
        "precision": cfg.precision,
    }


def weights(cfg: Config) -> str:
    """SHA-256 of the files that the run's model is loaded from, the adapter's included."""
    own = [p for folder in ("model", "adapter") for p in sorted((cfg.run_dir / folder).glob("*.safetensors"))]
    if not own and cfg.masking != "none":
        raise UserError(f"{cfg.run_dir}: not trained yet; train it first.")
    whole_model = own and own[0].parent.name == "model"
    below = [] if whole_model else sorted(Path(train.backbone_folder(cfg)).glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in (*below, *own):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def shares(ledger: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Nodes, programs and the share restored, of each tier and of all, from a ledger."""
    out = {}
    for tier in (*tiers.TIERS[1:], "all"):
        mine = [t for t in ledger["tasks"].values() if tier in (t["tier"], "all")]
        if mine:
            share = sum(t["pass"] for t in mine) / len(mine)
            out[tier] = {"nodes": len(mine), "programs": len({t["program"] for t in mine}), "share": round(share, 4)}
    return out
