"""Infilling in the report (not the paper's): accuracy by strategy, tier and hole size, with intervals over programs.

    found = summary(cfg)                      # plain data: one entry per hole set and hole length
    markdown(found[0])                        # its tables
    figure(found[0])                          # accuracy by tier and size

Hole lengths are never mixed: a model that is told the true length does something else than one that is not.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from treediff.config import Config
from treediff.data import holes, sources
from treediff.errors import UserError
from treediff.figures import holes as figures
from treediff.figures import plots, views
from treediff.files import read_json, read_jsonl, whole
from treediff.masking import tokens
from treediff.report.comparisons import COMPARED, seeds
from treediff.report.pictures import Picture
from treediff.report.tables import Table
from treediff.sampling import infill
from treediff.sampling.run import samples_path
from treediff.scoring import infill as scoring
from treediff.scoring import stats
from treediff.strategies import BEYOND, MASKINGS, STRATEGIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SIZES = ((0, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 10**9))
"""Bins of a hole's true size [tokens], both ends included."""
PAIRS = [("none", s) for s in (*MASKINGS, *BEYOND)] + [p for p in COMPARED if "none" not in p]
Runs = dict[str, dict[int, dict[str, dict[str, Any]]]]  # strategy -> seed -> hole -> outcome


def summary(cfg: Config) -> list[dict[str, Any]]:
    """Per hole set of `cfg` and hole length that was filled and scored, over all seeds: {"holes", "hole_length",
    "tier", "model", "floor", "runs", "rates", "by_tier", "by_size", "comparisons", "explorer"}; shares, in 0..1.

    Empty where nothing was filled. Raises UserError if two runs filled other holes or under other settings.
    """
    out = []
    for hole_set in holes.sets(cfg):
        for length in _lengths(cfg, hole_set):
            out.append(_entry(cfg.but(hole_length=length), hole_set))
    return out


def _lengths(cfg: Config, hole_set: str) -> list[str]:
    """The hole lengths at which some run filled this set: the oracle first, then numbers, then search."""
    ledger = re.compile(cfg.named(rf"{hole_set}-{cfg.tier}-H(oracle|search|\d+)"))
    found = {m[1] for p in cfg.preset_dir.glob("*-seed*/scores/*.json") if (m := ledger.fullmatch(p.stem))}
    return sorted(found, key=lambda x: (x != "oracle", x == "search", int(x) if x.isdigit() else 0))


def _runs(cfg: Config, hole_set: str) -> Runs:
    found: Runs = {}
    first: tuple[str, dict[str, Any]] | None = None
    for strategy, of in seeds(cfg).items():
        for seed in of:
            run = cfg.with_masking(strategy).but(seed=seed)
            outcomes = scoring.outcomes(run, hole_set)
            if outcomes is None:
                continue
            told = {k: v for k, v in next(iter(outcomes.values()))["settings"].items() if k != "seed"}
            told = {"holes": sorted(outcomes), **told}
            who, theirs = first = first or (run.run_dir.name, told)
            if differs := [k for k in told if told[k] != theirs.get(k)]:
                raise UserError(
                    f"{hole_set}, hole_length {cfg.hole_length}: {who} and {run.run_dir.name} differ in {differs[0]}, "
                    "so they cannot be compared; fill the holes of one of them again."
                )
            found.setdefault(strategy, {})[seed] = outcomes
    return {s: found[s] for s in STRATEGIES if s in found}


def _entry(cfg: Config, hole_set: str) -> dict[str, Any]:
    runs = _runs(cfg, hole_set)
    every = next(iter(next(iter(runs.values())).values()))
    cfg = cfg.but(limit=0)  # the runs say which holes they filled
    empty = scoring.floor(cfg, hole_set, every)
    head = {"holes": hole_set, "hole_length": cfg.hole_length, "tier": cfg.tier}
    shown = explorer(cfg, hole_set, runs, empty)
    return {**head, **analysed(runs, len(empty), cfg.backbone == "pretrain"), "explorer": shown}


def analysed(runs: Runs, empty: int, own_backbone: bool) -> dict[str, Any]:
    """What `runs` show: all of an entry but its head and explorer. `empty` holes pass when left empty; with
    `own_backbone` the runs of a seed started from one backbone, so they are compared in pairs where seeds agree."""
    every = next(iter(next(iter(runs.values())).values()))
    program = {hole: r["task"] for hole, r in every.items()}

    def passes(strategy: str, only: Callable[[dict[str, Any]], bool], what: str = "passed") -> list[dict[str, int]]:
        return [{h: int(r[what]) for h, r in of.items() if only(every[h])} for of in runs[strategy].values()]

    def rates(only: Callable[[dict[str, Any]], bool], **head: Any) -> list[dict[str, Any]]:
        if not any(only(r) for r in every.values()):
            return []
        return [
            {**head, "strategy": s, "seeds": list(runs[s]), **stats.clustered(passes(s, only), program)} for s in runs
        ]

    overall = rates(lambda r: True)
    for record in overall:
        exact = stats.clustered(passes(record["strategy"], lambda r: True, "exact"), program)
        record["exact"] = {k: exact[k] for k in ("rate", "low", "high")}
    tiers = [t for t in ("skeleton", "data", "condition", "control", "default", "") if _any_of(every, "tier", t)]
    by_tier = [r for t in tiers for r in rates(lambda x, t=t: x["tier"] == t, group=t or "no single node")]
    by_size = []
    for low, high in SIZES:
        name = f"{low}-{high}" if high < 10**9 else f"{low} or more"
        by_size += rates(lambda x, a=low, b=high: a <= x["size"] <= b, group=name if low else f"up to {high}")
    compared = []
    for one, two in PAIRS:
        if one in runs and two in runs:
            both = own_backbone and runs[one].keys() == runs[two].keys()  # as comparisons.pooled
            sides = (passes(s, lambda r: True) for s in (one, two))
            compared.append({"from": one, "to": two, **stats.clustered_difference(*sides, program, both)})
    for record, p in zip(compared, stats.holm([r["p"] for r in compared]), strict=True):
        record["p_holm"] = p
    return {
        "model": stats.CLUSTERS,
        "floor": {"passed": empty, "holes": len(every)},
        "runs": {s: list(of) for s, of in runs.items()},
        "rates": overall,
        "by_tier": by_tier,
        "by_size": by_size,
        "comparisons": compared,
    }


def _any_of(every: Mapping[str, Mapping[str, Any]], name: str, value: Any) -> bool:
    return any(r[name] == value for r in every.values())


def explorer(cfg: Config, hole_set: str, runs: Runs, empty: set[str], most: int = 200) -> list[dict[str, Any]]:
    """What a page shows of the holes (`most` of them, spread evenly): the program around each, what stood there, and
    each strategy's completion (of its first seed) with its verdict."""
    first = {s: next(iter(of.values())) for s, of in runs.items()}
    by_id = {h.id: h for h in holes.load(cfg, hole_set)}
    chosen = list(by_id)[:: max(1, -(-len(by_id) // most))]
    rows = []
    for hole in (by_id[i] for i in chosen if i in next(iter(first.values()))):
        answers = {
            s: {"completion": of[hole.id]["completion"], "passed": of[hole.id]["passed"], "why": of[hole.id]["reason"]}
            for s, of in first.items()
        }
        head = {
            "id": hole.id,
            "tier": hole.tier,
            "node": hole.node,
            "size": next(iter(first.values()))[hole.id]["size"],
        }
        text = {"prefix": hole.prefix, "text": hole.text, "suffix": hole.suffix}
        rows.append({**head, **text, "passes_empty": hole.id in empty, "answers": answers})
    return rows


def said(entry: Mapping[str, Any]) -> str:
    """How the holes of an entry were decoded, and its floor, in a sentence each."""
    length = {
        "oracle": "The model is told the true number of tokens of each hole.",
        "search": "The model fills each hole at several lengths; the one in which it is surest on average is taken.",
    }.get(
        entry["hole_length"],
        f"Each hole has {entry['hole_length']} tokens; what stands before an end of text in it is the completion.",
    )
    floor = entry["floor"]
    return f"{length} {floor['passed']} of {floor['holes']} programs pass with the hole left empty."


def tables(entry: Mapping[str, Any]) -> list[Table]:
    """Of one entry: rates by strategy, and the comparisons, if there are any."""
    floor = entry["floor"]
    share = floor["passed"] / floor["holes"]
    rows = [
        [STRATEGIES[r["strategy"]].title, len(r["seeds"]), _percent(r), _percent(r["exact"])] for r in entry["rates"]
    ]
    rows.append(["hole left empty", None, f"{100 * share:.1f} ({floor['passed']}/{floor['holes']})", None])
    head = ["", "runs", "holes filled right [%]", "as it was [%]"]
    found = [Table(head, rows, f"{entry['holes']}, hole length {entry['hole_length']}")]
    rows = []
    for r in entry["comparisons"]:
        names = f"{STRATEGIES[r['to']].title} against {STRATEGIES[r['from']].title}"
        low, high, middle = (100 * r[k] for k in ("low", "high", "difference"))
        interval = f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
        rows.append([names, "{1} and {0}".format(*r["runs"]), interval, f"{r['p_holm']:.2g}", r["over"]])
    if rows:
        head = ["", "runs", "difference [points]", "p, adjusted (Holm)", "speaks of further"]
        found.append(Table(head, rows, f"{entry['holes']}, hole length {entry['hole_length']}: comparisons"))
    return found


def markdown(entry: Mapping[str, Any]) -> str:
    """How the holes were decoded, the tables of one entry, and what their intervals rest on."""
    return "\n\n".join([said(entry), *(t.markdown() for t in tables(entry)), entry["model"]])


def _percent(r: Mapping[str, Any]) -> str:
    return f"{100 * r['rate']:.1f} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def picture(entry: Mapping[str, Any]) -> Picture:
    """The figure with its caption and data."""
    columns = ("by", "group", "strategy", "rate", "low", "high")
    records = [{"by": by, **r} for by in ("tier", "size") for r in entry[f"by_{by}"]]
    best = max(entry["rates"], key=lambda r: r["rate"])
    title = STRATEGIES[best["strategy"]].title
    alt = f"Share of holes filled right, by tier and size; most by {title}: {_percent(best)} %."
    caption = f"Holes of {entry['holes']} filled right, by tier of the node and by its size, with 95 % intervals."
    return Picture(figure(entry), caption, alt, Table.of(records, columns))


def figure(entry: Mapping[str, Any]) -> Figure:
    """Accuracy by tier and by the hole's size."""
    panels = {"tier of the node": entry["by_tier"], "size of the hole [tokens]": entry["by_size"]}
    return figures.accuracy(panels, f"{entry['holes']}, hole length: {entry['hole_length']}")


# --- published results ---------------------------------------------------------------------------------------------
def publish(cfg: Config, folder: Path) -> Path:
    """Write what the runs filled, compressed, to `folder`, and infill.md and the figures of all that lie there.

    Raises UserError if no holes were filled.
    """
    for hole_set in holes.sets(cfg):
        for length in _lengths(cfg, hole_set):
            name = f"infill-{cfg.preset}-{hole_set}-{length}.json.gz"
            with whole(folder / name) as temporary:
                temporary.write_bytes(
                    gzip.compress(json.dumps(_raw(cfg.but(hole_length=length), hole_set)).encode(), mtime=0)
                )
    parts = [
        "# Infilling: results",
        "",
        "Written by `treediff infill --publish` from the compressed results beside it.",
    ]
    parts += ["What is measured and how: [../infill.md](../infill.md). Beyond the paper.", ""]
    found = sorted(folder.glob("infill-*.json.gz"))
    if not found:
        raise UserError(
            "infill: no run has filled any holes yet; do it first: treediff infill --holes ast --masking ..."
        )
    for path in found:
        raw, name = json.loads(gzip.decompress(path.read_bytes())), path.name.removesuffix(".json.gz")
        entry = {k: raw[k] for k in ("holes", "hole_length")}
        entry |= analysed(_unpacked(raw), raw["floor"], raw["own_backbone"])
        plots.save(figure(entry), folder / f"{name}.png")
        parts += [
            f"## Preset {raw['preset']}, {raw['holes']}, hole length {raw['hole_length']}",
            "",
            markdown(entry),
            "",
        ]
        parts += [_by(entry, "tier").markdown(), "", _by(entry, "size").markdown(), ""]
        parts += [f"- {k}: {v if isinstance(v, str) else json.dumps(v)}" for k, v in raw["made"].items()]
        parts += ["", f"![accuracy by tier and size]({name}.png)", ""]
    with whole(folder / "infill.md") as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return folder / "infill.md"


def _by(entry: Mapping[str, Any], what: str) -> Table:
    groups = list(dict.fromkeys(r["group"] for r in entry[f"by_{what}"]))
    of = {(r["group"], r["strategy"]): r for r in entry[f"by_{what}"]}
    first = next(iter(entry["runs"]))
    rows = [[g, of[g, first]["holes"], *(_percent(of[g, s]) for s in entry["runs"])] for g in groups]
    return Table([what, "holes", *(STRATEGIES[s].title for s in entry["runs"])], rows)


def _raw(cfg: Config, hole_set: str) -> dict[str, Any]:
    """Every run's outcome at every hole: passed and exact as a digit each, in the order of `holes`."""
    runs = _runs(cfg, hole_set)
    every = next(iter(next(iter(runs.values())).values()))
    made = [read_json(_about(cfg.with_masking(s).but(seed=k), hole_set)) for s, of in runs.items() for k in of]
    return {
        "preset": cfg.preset,
        "holes": hole_set,
        "hole_length": cfg.hole_length,
        "own_backbone": cfg.backbone == "pretrain",
        "floor": len(scoring.floor(cfg.but(limit=0), hole_set, every)),
        "every": {h: [r["task"], r["tier"], r["size"]] for h, r in every.items()},
        "runs": {
            s: {
                seed: {what: "".join(str(int(r[what])) for r in (of[h] for h in every)) for what in ("passed", "exact")}
                for seed, of in by_seed.items()
            }
            for s, by_seed in runs.items()
        },
        "made": {
            "commit": ", ".join(sorted({m["commit"][:12] for m in made})),
            "machine": ", ".join(sorted({json.dumps(m["machine"]) for m in made})),
            "versions": made[0]["versions"],
            "settings": {k: v for k, v in made[0]["settings"].items() if k != "seed"},
        },
    }


def _about(cfg: Config, hole_set: str) -> Path:
    path = samples_path(cfg, hole_set, None)
    return path.with_name(f"{path.stem}.provenance.json")


def _unpacked(raw: Mapping[str, Any]) -> Runs:
    """The runs of `_raw`, as `analysed` takes them."""
    every = raw["every"].items()
    return {
        s: {
            int(seed): {
                h: {"task": task, "tier": tier, "size": size, "passed": int(p), "exact": int(e)}
                for (h, (task, tier, size)), p, e in zip(every, of["passed"], of["exact"], strict=True)
            }
            for seed, of in by_seed.items()
        }
        for s, by_seed in raw["runs"].items()
    }


def states(cfg: Config, hole_set: str, hole_id: str, shares: Sequence[float] = (0, 1 / 3, 2 / 3, 1)) -> Figure:
    """The program around a hole while the run of `cfg` fills it, after these shares of the steps."""
    hole = next(h for h in holes.load(cfg, hole_set) if h.id == hole_id)
    row = next(r for r in read_jsonl(samples_path(cfg, hole_set, None)) if r["hole"] == hole_id)
    tok = tokens.load_tokenizer(sources.tokenizer_folder(cfg), cfg.revision)
    prefix = hole.prefix.removesuffix(" ") if infill.joined(hole) else hole.prefix
    parts = [tokens.tokenize(tok, prefix)[0], np.array(row["ids"], np.int32), tokens.tokenize(tok, hole.suffix)[0]]
    at = np.concatenate([np.full(len(parts[0]), -1), row["committed_at"], np.full(len(parts[2]), -1)]).astype(int)
    keep = np.ones(len(at), bool)
    ends = np.flatnonzero(np.isin(parts[1], tokens.endings(tok)))
    if len(ends):  # what stands behind an end of text is no part of the completion
        keep[len(parts[0]) + ends[0] : len(parts[0]) + len(parts[1])] = False
    ids, at = np.concatenate(parts)[keep], at[keep]
    spelling = tokens.byte_table(tok).spelling
    code = b"".join(spelling[i] for i in ids.tolist()).decode(errors="replace")
    seen = views.view(cfg, tok, code)
    lengths = np.array([len(spelling[i]) for i in ids.tolist()])
    starts = np.cumsum(lengths) - lengths
    # Tiers are those of the finished program, each token's by the byte that decides its owner.
    labels = seen.labels[np.minimum(np.searchsorted(seen.starts, starts, "right") - 1, len(seen.labels) - 1)]
    boxes = plots.token_runs(code, starts, labels)
    steps = int(at.max()) + 1
    panels = [(f"{round(share * steps)} of {steps} steps", code, boxes, at >= share * steps) for share in shares]
    return plots.states(panels)
