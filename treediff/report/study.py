"""A study's results: every run and every verdict in one file, what they say together, and the answer in words.

    study = Study(cfg, arms(cfg, ["random", "ast"]), seeds=10)
    write(study)                            # runs/<preset>/study/: results.json, study.json, study.md, forest.png
    summary(cfg)["answer"]                  # what the page shows; None without a study
    publish(cfg, Path("docs/results"))      # study-<preset>.json.gz and .png, and study.md of all that lie there

jobs.py makes the runs. What is compared, and what may be said, is planned in docs/study.md. Runs that differ in a
switch that the study does not vary are refused with the switch named; a results.json that was edited or cut, by its
hash.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from treediff.config import SWITCHES, Config, resolve
from treediff.data import benchmarks, stdlib
from treediff.errors import UserError
from treediff.figures import forest, plots
from treediff.files import read_json, read_jsonl, whole, write_json
from treediff.report.comparisons import ledger_settings
from treediff.report.paper import HALVES, PAPER
from treediff.report.tables import Table
from treediff.runs import SHARED_OUT, idle, of_stages, open_run, provenance
from treediff.sampling import run as sampling
from treediff.scoring import restore, stats
from treediff.scoring.run import ledger_path
from treediff.scoring.run import read as read_ledger
from treediff.strategies import BEYOND, MASKINGS, STRATEGIES
from treediff.training import launch, steplog

log = logging.getLogger(__name__)

_FORMAT = 1
NODES = "nodes"
"""The ledger of AST nodes restored whole (scoring/restore.py)."""


def paper_effects() -> dict[str, float]:
    """The paper's largest differences on HumanEval's and HumanEval+'s tests, AST against random masking [points]."""
    one, two = PAPER["random"]["humaneval"], PAPER["ast"]["humaneval"]
    found = {}
    for part, name in enumerate(("HumanEval", "HumanEval+")):
        best = max(one, key=lambda t: two[t][part] - one[t][part])
        found[f"{name}, T = {best}"] = round(two[best][part] - one[best][part], 1)
    return found


EFFECT = 2.5
"""The difference that a study is to resolve [points]: the paper's largest on HumanEval's own tests."""


# --- what is run ---------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """What a study compares: a masking, or one with some switches of its own under the name of a variant."""

    masking: str
    variant: str = ""
    switches: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its runs' directories begin with."""
        return f"{self.masking}-{self.variant}" if self.variant else self.masking


@dataclass(frozen=True)
class Study:
    """Arms crossed with `seeds` seeds from `cfg.seed` on; seed k is fine-tuned from the backbone of seed k mod
    `backbones` (counted from `cfg.seed`)."""

    cfg: Config
    arms: tuple[Arm, ...]
    seeds: int = 2
    backbones: int = 1

    def __post_init__(self) -> None:
        _demand(self.seeds >= 1, "seeds: must be at least 1.")
        _demand(1 <= self.backbones <= self.seeds, f"backbones: must lie in [1, {self.seeds}], the number of seeds.")
        _demand(len(self.arms) > 0, "strategies: name one at least.")
        names = [arm.name for arm in self.arms]
        for name in names:
            _demand(names.count(name) == 1, f"arm: {name} is there twice; give each variant a name of its own.")
        _demand(not self.cfg.model, "model: a study compares trainings; it takes no model of somebody else's.")
        given = self.cfg.backbone != "pretrain"
        _demand(not (given and self.backbones > 1), f"backbones: there is one, {self.cfg.backbone}.")
        first = self.run(Arm("none"), self.cfg.seed)
        backbone = of_stages(first.as_dict(), "data", "train")
        for arm in self.arms:
            theirs = of_stages(self.run(arm, self.cfg.seed).with_masking("none").as_dict(), "data", "train")
            for name in backbone:
                if theirs[name] != backbone[name] and not idle(first, name):
                    raise UserError(
                        f"arm: {arm.name} sets {name}, which changes the backbone that all share; keep the backbone's "
                        f"by --pretrain.{name}, or make another study."
                    )

    def run(self, arm: Arm, seed: int) -> Config:
        """The switches of one run."""
        own = self.cfg.seed + (seed - self.cfg.seed) % self.backbones
        if self.cfg.backbone != "pretrain" or own == seed:
            own = -1
        cfg = self.cfg.but(masking="ast", variant="", seed=seed, backbone_seed=own)
        if arm.masking == "none":
            return cfg.with_masking("none")
        return cfg.but(masking=arm.masking, variant=arm.variant, **arm.switches)

    def runs(self) -> dict[str, Config]:
        """All runs by name, the backbones first, then seed by seed, so that a study cut short is a smaller one."""
        first = self.cfg.seed
        found = [self.run(Arm("none"), first + k) for k in range(self.backbones)]
        found += [self.run(arm, first + k) for k in range(self.seeds) for arm in self.arms]
        return {cfg.run_dir.name: cfg for cfg in found}

    def record(self) -> dict[str, Any]:
        """What results.json says of the study."""
        arms = [{"name": a.name, "masking": a.masking, "variant": a.variant, "switches": a.switches} for a in self.arms]
        keys = {"seeds": self.seeds, "backbones": self.backbones, "first_seed": self.cfg.seed}
        switches = {k: v for k, v in self.cfg.as_dict().items() if k not in ("masking", "seed", "variant")}
        return {"preset": self.cfg.preset, "arms": arms, **keys, "switches": switches}


def _demand(ok: bool, text: str) -> None:
    if not ok:
        raise UserError(text)


def arms(
    cfg: Config, strategies: Sequence[str] = MASKINGS, more: Sequence[str] = (), cross: Sequence[str] = ()
) -> tuple[Arm, ...]:
    """The arms that a command names.

    `strategies`: maskings. `more`: `MASKING/VARIANT: switch=value; switch=value`. `cross`: `switch=value,value`: each
    strategy with each value; the runs of the value that `cfg` has are those without a variant.
    """
    found = [Arm(name) for name in strategies]
    for text in cross:
        name, equals, values = text.partition("=")
        name = name.strip()
        _demand(bool(equals) and name in SWITCHES, f"cross: {text!r} is not switch=value,value.")
        crossed = []
        for arm in found:
            for value in values.split(","):
                read = getattr(resolve(cfg.preset, **{name: value}), name)
                if read == getattr(cfg, name):
                    crossed.append(arm)
                    continue
                said = "".join(c if c.isalnum() else "_" for c in f"{name}_{value.strip()}".lower())
                variant = f"{arm.variant}_{said}" if arm.variant else said
                crossed.append(Arm(arm.masking, variant, {**arm.switches, name: read}))
        found = crossed
    for text in more:
        head, _, tail = text.partition(":")
        masking, slash, variant = (x.strip() for x in head.partition("/"))
        _demand(bool(slash and variant and tail.strip()), f"arm: {text!r} is not MASKING/VARIANT: switch=value; ...")
        switches = {}
        for pair in filter(str.strip, tail.split(";")):
            name, equals, value = (x.strip() for x in pair.partition("="))
            _demand(bool(equals) and name in SWITCHES, f"arm: {pair.strip()!r} is not switch=value.")
            read = getattr(resolve(cfg.preset, **{name: value}), name)
            switches[name] = {**getattr(cfg, name), **read} if isinstance(read, dict) else read
        found.append(Arm(masking, variant, switches))
    for arm in found:
        known = arm.masking in STRATEGIES and arm.masking != "none"
        _demand(known, f"strategies: {arm.masking!r} is no masking; choose of {', '.join((*MASKINGS, *BEYOND))}.")
        for name in ("preset", "masking", "seed", "variant", "backbone_seed", "pretrain", "backbone", "tokenizer"):
            _demand(name not in arm.switches, f"arm: {name} cannot differ between the arms of a study.")
        for name in arm.switches:
            stage = SWITCHES[name].stage
            _demand(
                stage in ("data", "train"), f"arm: {name} does not change the training; a study compares trainings."
            )
    return tuple(found)


# --- what was run --------------------------------------------------------------------------------------------------
def ledgers(cfg: Config) -> dict[str, Path]:
    """The ledgers that a run of the study has, by name, whether they are there or not."""
    found = {sampling.name(cfg, *job): ledger_path(cfg, *job) for job in cfg.jobs}
    return found | ({NODES: restore.ledger_path(cfg)} if cfg.data in stdlib.SOURCES else {})


def finished(cfg: Config) -> bool:
    """Whether a run has its weights and every ledger, each of the samples that lie beside it and of all tasks."""
    if not (launch.is_trained(cfg) and (cfg.run_dir / "config.json").exists()):
        return False
    for name, path in ledgers(cfg).items():
        samples = path.parents[1] / "samples" / f"{name}.jsonl"
        if not (path.exists() and (name == NODES or samples.exists())):
            return False
        ledger = read_json(path)
        if name == NODES:
            if ledger["weights"] != restore.weights(cfg):
                return False
            continue
        if ledger["settings"].get("samples_sha256") != hashlib.sha256(samples.read_bytes()).hexdigest():
            return False
        if ledger["tasks"].keys() != benchmarks.benchmark_problems(cfg, ledger["benchmark"]).keys():
            return False
    return True


def refuse_others(study: Study) -> None:
    """Raises UserError naming the switch if a run that is there was trained or sampled with others than the study's."""
    for cfg in study.runs().values():
        if not (cfg.run_dir / "config.json").exists():
            continue
        open_run(cfg, *launch.TRAINING_STAGES)
        for benchmark, length in cfg.jobs:
            path = sampling.samples_path(cfg, benchmark, length)
            theirs = next(iter(read_jsonl(path)), {}).get("settings") if path.exists() else None
            mine = sampling.settings(cfg.of(benchmark), length)
            for name in mine if theirs is not None else ():
                if theirs.get(name) != mine[name]:
                    raise UserError(
                        f"{path}: sampled with {name} = {theirs.get(name)!r}, the study's is {mine[name]!r}; "
                        f"give {name} that value, or delete the file."
                    )


def own_switches(cfg: Config) -> dict[str, Any]:
    """The switches of a run's training that are not as its preset has them."""
    usual = resolve(cfg.preset, masking=cfg.masking, seed=cfg.seed)
    found = {k: v for k, v in cfg.as_dict("data", "train").items() if v != getattr(usual, k)}
    return {k: v for k, v in found.items() if not (cfg.masking == "none" and k == "pretrain")}


def command(cfg: Config) -> str:
    """The one command that trains this run again."""
    words = ["treediff", "train", "--preset", cfg.preset, "--masking", cfg.masking, "--seed", str(cfg.seed)]
    words += ["--variant", cfg.variant] if cfg.variant else []
    for name, value in own_switches(cfg).items():
        words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    return shlex.join(words)


def collect(study: Study, why: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Every finished run of the study with every verdict, and which runs are missing (and why, if that is known).

    Raises UserError as `refuse_others`, and if ledgers were not made under the same settings.
    """
    refuse_others(study)
    runs, missing, made, known = [], [], {}, {}
    for name, cfg in study.runs().items():
        if not finished(cfg):
            missing.append({"run": name, "why": (why or {}).get(name, "not finished"), "command": command(cfg)})
            continue
        verdicts, sandbox, timeouts = {}, None, 0
        for key, path in ledgers(cfg).items():
            ledger = read_json(path) if key == NODES else read_ledger(path, cfg.verdicts)
            head, mine = _verdicts(cfg, key, ledger)
            first = made.setdefault(key, head)
            for what, value in head.items():
                if value != first[what]:
                    raise UserError(f"{path}: its {what} are not those of the study's other runs; score them again.")
            said = dict(ledger["settings"]) if key == NODES else ledger_settings(_key(key), cfg, ledger)
            said.pop("sampling seed", None)
            for what, value in said.items():
                who, theirs = known.setdefault((key, what), (name, value))
                if theirs != value:
                    raise UserError(
                        f"{key}: {who} and {name} differ in {what} ({theirs!r} and {value!r}), so they cannot stand in "
                        "one study; make one of them again."
                    )
            timeouts += sum("timeout" in v.values() for t in ledger["tasks"].values() for v in stats.samples(t))
            verdicts[key], sandbox = mine, ledger.get("sandbox", sandbox)
        made_with = _as_made(cfg)
        about = read_json(cfg.run_dir / "provenance.json") if (cfg.run_dir / "provenance.json").exists() else {}
        seconds = read_json(cfg.run_dir / "seconds.json") if (cfg.run_dir / "seconds.json").exists() else {}
        runs.append(
            {
                "run": name,
                "arm": "none" if cfg.masking == "none" else name.rpartition("-seed")[0],
                "seed": cfg.seed,
                "backbone": cfg.with_masking("none").seed if cfg.backbone == "pretrain" else cfg.backbone,
                "switches": own_switches(made_with),
                "command": command(made_with),
                "seconds": seconds,
                **{k: about.get(k) for k in ("time", "commit", "changed_files", "machine", "python", "versions")},
                "sandbox": sandbox,
                "timeouts": timeouts,
                "heldout": next(iter(steplog.read_log(cfg.run_dir, "evals.jsonl")[-1:]), None),
                "verdicts": verdicts,
            }
        )
    results = {"format": _FORMAT, "study": study.record(), "provenance": provenance(), "ledgers": made}
    results |= {"runs": runs, "missing": missing}
    results = json.loads(json.dumps(results))
    return {**results, "sha256": _hash(results)}


def _as_made(cfg: Config) -> Config:
    """The run with the rows of its updates shared out as they were."""
    made = read_json(cfg.run_dir / "config.json")
    return cfg.but(**{name: made.get(name, getattr(cfg, name)) for name in SHARED_OUT})


def _key(name: str) -> tuple[str, int]:
    benchmark, _, length = name.partition("-T")
    return benchmark, int(length.partition("-")[0])  # behind it, the name of the sampling switches


def _verdicts(cfg: Config, name: str, ledger: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What all runs' ledgers of this name have in common, and this run's verdicts by part (see `_written`).

    A ledger whose items are parts of programs says of each in which `program` and of which `tier` it is.
    """
    if name == NODES:
        of = {what: [t[one] for t in ledger["tasks"].values()] for what, one in _OF_NODES.items()}
        head = {"items": list(ledger["tasks"]), "samples": 1, "parts": {"pass": "AST nodes restored whole"}}
        return head | of, {"pass": _written([int(t["pass"]) for t in ledger["tasks"].values()], 1)}
    titles = dict(zip(("base", "plus"), HALVES[_key(name)[0]], strict=True))
    counted = {part: stats.counts(ledger, part) for part in titles}
    samples = sorted({n for _, n in counted["base"].values()})
    _demand(len(samples) == 1, f"{ledger_path(cfg, *_key(name))}: tasks have {samples} samples; make them as many.")
    head = {"items": list(ledger["tasks"]), "samples": samples[0]}
    head["parts"] = {part: f"{title} at T = {_key(name)[1]}" for part, title in titles.items()}
    return head, {part: _written([c for c, _ in by.values()], samples[0]) for part, by in counted.items()}


_OF_NODES = {"programs": "program", "tiers": "tier", "tokens": "tokens"}


def _written(passes: Sequence[int], samples: int) -> str:
    """How many samples of each item pass, as a text: a digit each with one sample, else numbers between blanks."""
    return ("" if samples == 1 else " ").join(map(str, passes))


def _read(text: str, samples: int) -> list[int]:
    return [int(c) for c in (text if samples == 1 else text.split())]


# --- the file ------------------------------------------------------------------------------------------------------
def _hash(results: Mapping[str, Any]) -> str:
    """SHA-256 of everything but itself."""
    content = {k: v for k, v in results.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load(path: Path) -> dict[str, Any]:
    """A results.json (or .json.gz). Raises UserError if it was edited or cut since it was written."""
    path = Path(path)
    advice = "it was edited or cut since it was written; make it again from the runs by `treediff study --collect`"
    try:
        raw = path.read_bytes()
        results = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        right = isinstance(results, dict) and results.get("sha256") == _hash(results)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run `treediff study` first.") from None
    except (OSError, EOFError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}): {advice}.") from None
    _demand(right, f"{path}: its content does not match its hash: {advice}.")
    _demand(results["format"] == _FORMAT, f"{path}: of format {results['format']}, this kit reads {_FORMAT}.")
    return results


# --- what it says --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """A share that runs are compared by: a part of a ledger, or the items of one tier in it."""

    ledger: str
    part: str
    title: str
    tier: str = ""
    primary: bool = False


def outcomes(results: Mapping[str, Any]) -> list[Outcome]:
    """The primary outcome first: the last part of a benchmark at the largest T, or all tiers' items together."""
    found = []
    for name, head in results["ledgers"].items():
        for part, title in head["parts"].items():
            found.append(Outcome(name, part, title))
            if "tiers" in head:
                found += [Outcome(name, part, f"{title}: {t}", t) for t in dict.fromkeys(head["tiers"])]

    def rank(o: Outcome) -> tuple[bool, int, bool]:
        head = results["ledgers"][o.ledger]
        last = o.part == list(head["parts"])[-1]
        return not o.tier, 0 if "tiers" in head else _key(o.ledger)[1], last

    found.sort(key=rank, reverse=True)
    if found:
        o = found[0]
        found[0] = Outcome(o.ledger, o.part, o.title, o.tier, True)
    return found


def passes(results: Mapping[str, Any], run: Mapping[str, Any], o: Outcome) -> dict[str, Fraction | int]:
    """A run's result by independent unit: a task's share of samples that pass; or, where items are clustered in
    programs, a program's passes in units of the mean number of items, so that the mean over programs is the share of
    all items that pass.
    """
    head = results["ledgers"][o.ledger]
    values = _read(run["verdicts"][o.ledger][o.part], head["samples"])
    if "programs" not in head:
        if head["samples"] == 1:
            return dict(zip(head["items"], values, strict=True))
        return {item: Fraction(v, head["samples"]) for item, v in zip(head["items"], values, strict=True)}
    wanted = [not o.tier or t == o.tier for t in head["tiers"]]
    by: dict[str, int] = {p: 0 for p, w in zip(head["programs"], wanted, strict=True) if w}
    for program, value, w in zip(head["programs"], values, wanted, strict=True):
        if w:
            by[program] += value
    return {p: Fraction(v * len(by), sum(wanted) * head["samples"]) for p, v in by.items()}


def title(results: Mapping[str, Any], arm: str) -> str:
    """An arm in words."""
    return _title(*_parts(arm))


def _parts(arm: str) -> tuple[str, str]:
    masking, _, variant = arm.partition("-")
    return masking, variant


def _title(masking: str, variant: str) -> str:
    return STRATEGIES[masking].title + (f", {variant.replace('_', ' ')}" if variant else "")


def pairs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which arms are compared, (from, to), the primary comparison first."""
    names = [arm["name"] for arm in results["study"]["arms"]]
    wanted = [("random", "ast"), ("random", "ast_span"), ("ast_span", "ast"), *(("random", s) for s in BEYOND)]
    wanted += [(name, _parts(name)[0]) for name in names if _parts(name)[1]]
    found = [pair for pair in wanted if set(pair) <= set(names)]
    return found or [(names[0], name) for name in names[1:]]


def pooled(results: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of the arms, their deviation between runs, and every comparison on every outcome [points]."""
    of: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        of.setdefault(run["arm"], []).append(run)
    compared, rates = [], []
    for o in outcomes(results):
        head = {"outcome": o.title, "primary": o.primary}
        by = {arm: [passes(results, run, o) for run in runs] for arm, runs in of.items()}
        for arm, vectors in by.items():
            r = stats.pooled_rate(vectors)
            points = {k: None if r[k] is None else 100 * r[k] for k in ("mean", "low", "high", "sd")}
            rates.append(head | {"arm": arm, "runs": [100 * x for x in r["rates"]]} | points)
        for one, two in pairs(results):
            if len(by.get(one, ())) < 2 or len(by.get(two, ())) < 2:
                continue
            paired = results["study"]["backbones"] > 1
            sides = [_by_backbone(of[arm], by[arm]) if paired else by[arm] for arm in (one, two)]
            if paired:  # backbones that both have
                shared = sorted(set.intersection(*map(set, sides)))
                sides = [[side[b] for b in shared] for side in sides]
            if min(map(len, sides)) < 2:
                continue
            r = stats.pooled(*sides, paired_runs=paired)
            record = head | {"from": one, "to": two, "runs": [len(by[one]), len(by[two])], "paired": paired}
            record |= {"items": len(results["ledgers"][o.ledger]["items"]), "units": r["n"]}
            record |= {k: None if r[k] is None else 100 * r[k] for k in ("difference", "low", "high")}
            sds = [x["sd"] for x in rates if x["outcome"] == o.title and x["arm"] in (one, two)]
            compared.append(record | {"p": r["p"], "sd": (sum(s * s for s in sds) / len(sds)) ** 0.5})
    _decide(compared, pairs(results)[:1])
    return {"comparisons": compared, "rates": rates}


def _by_backbone(runs: Sequence[Mapping[str, Any]], vectors: Sequence[stats.Passes]) -> dict[int, stats.Passes]:
    """The mean result of the runs of each backbone: its runs are no independent ones."""
    of: dict[int, list[stats.Passes]] = {}
    for run, vector in zip(runs, vectors, strict=True):
        of.setdefault(run["backbone"], []).append(vector)
    return {b: {item: Fraction(sum(v[item] for v in vs)) / len(vs) for item in vs[0]} for b, vs in of.items()}


def _decide(compared: list[dict[str, Any]], primary: list[tuple[str, str]]) -> None:
    """Adds `claimed`: the primary comparison on the primary outcome alone; the others on it together by Holm's
    procedure; and those on all other outcomes likewise."""
    families: dict[tuple[bool, bool], list[dict[str, Any]]] = {}
    for r in compared:
        families.setdefault((r["primary"], r["primary"] and [(r["from"], r["to"])] == primary), []).append(r)
    for family in families.values():
        adjusted = stats.holm([1.0 if r["p"] is None else r["p"] for r in family])
        for r, p in zip(family, adjusted, strict=True):
            r["p_adjusted"], r["claimed"] = p, p < 0.05


def sentence(r: Mapping[str, Any]) -> str:
    """What a comparison allows to be said (docs/study.md, What will be said)."""
    one, two = (_title(*_parts(r[k])) for k in ("from", "to"))
    runs = "{1} and {0} runs".format(*r["runs"]) if r["runs"][0] != r["runs"][1] else f"{r['runs'][0]} runs each"
    if r["p"] is None:
        return f"{two} against {one}: {r['difference']:+.1f} points ({runs}): how much of it is chance is unknown."
    head = f"{two} against {one}: {r['difference']:+.1f} points [{r['low']:+.1f}, {r['high']:+.1f}] ({runs}): "
    if r["claimed"]:
        better, worse = (two, one) if r["difference"] > 0 else (one, two)
        return head + f"on this test bed, {better} is better than {worse}."
    if r["p"] < 0.05:
        return head + "no difference is claimed, since it does not outlast the adjustment for all comparisons."
    if r["high"] < EFFECT:
        return (
            head + f"no difference can be told, and one of the paper's size (+{EFFECT}) is not there on this test bed."
        )
    return head + (
        f"it cannot be told: the interval holds both no difference and one of the paper's size (+{EFFECT}), which "
        f"would need about {stats.seeds_needed(EFFECT, r['sd'])} runs of each."
    )


def answer(results: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The study's answer in a paragraph."""
    main = [r for r in found["comparisons"] if r["primary"]]
    if not main:
        return "No two strategies have two runs each yet, so nothing can be said of the methods."
    backbones = len({run["backbone"] for run in results["runs"]})
    first = f"{backbones} backbones" if backbones > 1 else "one backbone"
    lines = [f"Fine-tunings of {first}, compared by {main[0]['outcome']} ({main[0]['items']:,} items). "]
    lines += [sentence(r) + " " for r in main]
    for r in main:
        if r["from"] == "ast-upside_down" and not (r["claimed"] and r["difference"] > 0):
            lines.append("That the weights are the right way up made no difference that can be told. ")
    if results["missing"]:
        lines.append(f"{len(results['missing'])} of the planned runs are missing. ")
    lines.append("This speaks of this test bed, not of LLaDA-8B or HumanEval.")
    return "".join(lines)


def analysed(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that is said of a study, as plain data."""
    found = pooled(results)
    runs = results["runs"]
    total = sum(sum(v for v in run["seconds"].values()) for run in runs)
    return {
        "preset": results["study"]["preset"],
        "results_sha256": results["sha256"],
        "answer": answer(results, found),
        "arms": {run["arm"]: _title(*_parts(run["arm"])) for run in runs},
        "runs": len(runs),
        "missing": results["missing"],
        "seconds": total,
        "commits": sorted({str(run["commit"]) for run in runs}),
        "machines": sorted({json.dumps(run["machine"]) for run in runs}),
        "versions": sorted({json.dumps(run["versions"]) for run in runs}),
        "paper": paper_effects(),
        **found,
    }


def summary(cfg: Config) -> dict[str, Any] | None:
    """The study of this preset for the report's page: `answer`, `markdown`, `figure` (a path), and `analysed`'s facts.

    None if there was no study. Raises UserError if results.json was edited or cut.
    """
    folder = cfg.preset_dir / cfg.named("study")
    if not (folder / "results.json").exists():
        return None
    results = load(folder / "results.json")
    kept = read_json(folder / "study.json") if (folder / "study.json").exists() else {}
    facts = kept if kept.get("results_sha256") == results["sha256"] else analysed(results)
    return {**facts, "markdown": markdown(results, facts), "figure": folder / "forest.png"}


def figure(facts: Mapping[str, Any]) -> Any:
    """The forest plot of a study (figures/forest.py)."""
    main = [r for r in facts["rates"] if r["primary"]]
    order = [(r["from"], r["to"]) for r in facts["comparisons"]]  # a comparison's outcomes together
    arms = [
        forest.Arm(facts["arms"][r["arm"]], *_look(r["arm"]), r["runs"], r["mean"], r["low"], r["high"]) for r in main
    ]
    rows = [
        forest.Difference(
            f"{facts['arms'][r['to']]} minus {facts['arms'][r['from']]}",
            r["outcome"],
            *_look(r["to"]),
            r["difference"],
            r["low"],
            r["high"],
            r["primary"],
        )
        for r in sorted(facts["comparisons"], key=lambda r: order.index((r["from"], r["to"])))
        if r["p"] is not None
    ]
    lines = {f"the paper's {name}: {v:+.1f}": v for name, v in facts["paper"].items()}
    return forest.plot(main[0]["outcome"] if main else "", arms, rows, lines)


def _look(arm: str) -> tuple[str, str, bool]:
    masking, variant = _parts(arm)
    return STRATEGIES[masking].colour, STRATEGIES[masking].marker, not variant


def tables(facts: Mapping[str, Any]) -> list[Table]:
    """The study's rates, a row per arm and outcome, and its comparisons."""
    rates = [
        [
            *(facts["arms"][r["arm"]], r["outcome"], len(r["runs"]), f"{r['mean']:.1f}"),
            *(f"{r['low']:.1f} to {r['high']:.1f}", None if r["sd"] is None else f"{r['sd']:.2f}"),
        ]
        for r in facts["rates"]
    ]
    compared = [
        [
            *(f"{facts['arms'][r['to']]} minus {facts['arms'][r['from']]}", r["outcome"], f"{r['difference']:+.2f}"),
            "unknown" if r["low"] is None else f"{r['low']:+.2f} to {r['high']:+.2f}",
            *(None if p is None else f"{p:.2g}" for p in (r["p"], r["p_adjusted"])),
            "yes" if r["claimed"] else "no",
        ]
        for r in facts["comparisons"]
    ]
    head = ["comparison", "outcome", "difference [points]", "95 % interval", "p over runs", "adjusted", "claimed"]
    over = ["", "outcome", "runs", "mean [%]", "95 % interval", "between-run deviation [points]"]
    return [Table(over, rates, "The study’s rates"), Table(head, compared, "The study’s comparisons")]


def markdown(results: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The study as Markdown: the answer, the rates, the comparisons, where it comes from."""
    study = results["study"]
    lines = [f"**{facts['answer']}**", ""]
    lines += "\n\n".join(table.markdown() for table in tables(facts)).splitlines()
    lines += ["", "The first row is the primary comparison, tested alone. The others on the same outcome are adjusted "]
    lines[-1] += "together (Holm), those on the other outcomes likewise. "
    lines[-1] += f"{stats.POOLING} Items of one program are one task here. The plan: docs/study.md."
    where = [
        f"{len(results['runs'])} runs, {facts['seconds'] / 3600:.1f} hours of work",
        "commit " + ", ".join(c[:12] for c in facts["commits"]),
        "machine " + "; ".join(facts["machines"]),
        "versions " + "; ".join(facts["versions"]),
        f"seeds {study['first_seed']} to {study['first_seed'] + study['seeds'] - 1}, backbones: {study['backbones']}",
        f"{sum(run['timeouts'] for run in results['runs'])} programs ran into their time limit",
        f"results.json SHA-256 {results['sha256']}",
    ]
    lines += ["", *(f"- {x}" for x in where)]
    for arm in study["arms"]:
        example = next((r for r in results["runs"] if r["arm"] == arm["name"]), None)
        lines += [f"- one run of {_title(*_parts(arm['name']))}: `{example['command']}`"] if example else []
    if results["missing"]:
        lines += ["", "Missing runs:", "", *(f"- {m['run']}: {m['why']}" for m in results["missing"])]
    return "\n".join(lines) + "\n"


# --- writing -------------------------------------------------------------------------------------------------------
def write(study: Study, why: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Write runs/<preset>/study[-<decoding>]/ from the runs that are finished; the facts of `analysed`."""
    folder = study.cfg.preset_dir / study.cfg.named("study")
    results = collect(study, why)
    facts = analysed(results)
    write_json(folder / "results.json", results)
    write_json(folder / "study.json", facts)
    with whole(folder / "study.md") as temporary:
        temporary.write_text(markdown(results, facts), encoding="utf-8")
    plots.save(figure(facts), folder / "forest.png")
    return facts


def publish(cfg: Config, folder: Path) -> Path:
    """Write this preset's results, compressed, to `folder`, and study.md and the figures of all that lie there."""
    results = load(cfg.preset_dir / cfg.named("study") / "results.json")
    with whole(folder / f"{cfg.named(f'study-{cfg.preset}')}.json.gz") as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(results).encode(), mtime=0))
    parts = ["# The study: results", "", "Written by `treediff study --publish` from the compressed results beside it."]
    parts += ["The plan, committed before the runs: [../study.md](../study.md).", ""]
    for path in _published(folder):
        found = load(path)
        facts = analysed(found)
        name = path.name.removesuffix(".json.gz")
        plots.save(figure(facts), folder / f"{name}.png")
        title, decoding = f"## Preset {found['study']['preset']}", found["study"]["switches"].get("decoding")
        parts += [f"{title}, decoding {decoding}" if decoding else title, "", markdown(found, facts)]
        parts += [f"![each run a point, and the pooled differences]({name}.png)", ""]
    with whole(folder / "study.md") as temporary:
        temporary.write_text("\n".join(parts), encoding="utf-8")
    return folder / "study.md"


def _published(folder: Path) -> Iterator[Path]:
    """Presets in the order in which they are told: TinyCode first."""
    yield from sorted(folder.glob("study-*.json.gz"), key=lambda p: (p.name != "study-tiny.json.gz", p.name))
