"""Infilling in the report: what is counted, by whom, and what is refused."""

import csv
import html
import json

import pytest

from treediff.config import resolve
from treediff.data import benchmarks, holes
from treediff.errors import UserError
from treediff.files import write_json
from treediff.report import infill, report
from treediff.sampling import run as sampling
from treediff.scoring import infill as scoring


def write(cfg, every, right, **changes):
    """Samples and ledger of a run that fills the holes in `right`, as the stages would leave them."""
    samples = sampling.samples_path(cfg, "ast-tinycode", None)
    samples.parent.mkdir(parents=True, exist_ok=True)
    lines, tasks = [], {}
    for (task, k), hole in sampling.numbered(every).items():
        ok = hole.id in right
        row = {"task_id": task, **({"sample": k} if k else {}), "hole": hole.id, "tier": hole.tier, "node": hole.node}
        row |= {"size": len(hole.text), "length": 1, "exact": ok, "completion": hole.text if ok else "x"}
        row |= {"solution": hole.program("x"), "settings": sampling.settings(cfg, None) | changes}
        lines.append(json.dumps(row) + "\n")
        verdict = {"base": "pass" if ok else "fail", "plus": "pass" if ok else "fail", "reason": "", "seconds": 0.1}
        tasks.setdefault(task, []).append(verdict)
    samples.write_text("".join(lines))
    import hashlib

    settings = {"samples_sha256": hashlib.sha256(samples.read_bytes()).hexdigest()}
    write_json(scoring.ledger_path(cfg, "ast-tinycode"), {"settings": settings, "sandbox": {}, "tasks": tasks})


@pytest.fixture
def filled(runs, monkeypatch):
    """Two strategies with two seeds each; AST fills every hole but the conditions, random only the skeleton's."""
    cfg = resolve("tiny", limit=12, hole_length="oracle")
    benchmarks.write_tinycode(cfg)
    every = holes.load(cfg, "ast-tinycode")
    for strategy, tiers in (("random", ("skeleton",)), ("ast", ("skeleton", "data", "control"))):
        for seed in (0, 1):
            run = cfg.with_masking(strategy).but(seed=seed)
            write(run, every, {h.id for h in every if h.tier in tiers})
    monkeypatch.setattr(scoring, "floor", lambda cfg, name, only: {every[0].id})
    return cfg, every


def test_the_summary_counts_holes_by_tier_and_size_and_compares(filled):
    cfg, every = filled
    (entry,) = infill.summary(cfg)
    assert entry["floor"] == {"passed": 1, "holes": len(every)}
    assert entry["runs"] == {"random": [0, 1], "ast": [0, 1]}
    counts = {t: sum(h.tier == t for h in every) for t in ("skeleton", "data", "condition", "control")}
    rate = {r["strategy"]: r["rate"] for r in entry["rates"]}
    assert rate["random"] == pytest.approx(counts["skeleton"] / len(every))
    assert rate["ast"] == pytest.approx(1 - counts["condition"] / len(every))
    by_tier = {(r["group"], r["strategy"]): (r["rate"], r["holes"]) for r in entry["by_tier"]}
    assert by_tier["condition", "ast"] == (0, counts["condition"])
    assert by_tier["data", "ast"] == (1, counts["data"])
    assert sum(r["holes"] for r in entry["by_size"] if r["strategy"] == "ast") == len(every)
    (compared,) = (r for r in entry["comparisons"] if (r["from"], r["to"]) == ("random", "ast"))
    assert compared["difference"] == pytest.approx(rate["ast"] - rate["random"])
    assert json.dumps(entry)
    shown = entry["explorer"][0]
    assert shown["prefix"] + shown["text"] + shown["suffix"] == every[0].program(every[0].text)
    assert set(shown["answers"]) == {"random", "ast"}
    text = infill.markdown(entry)
    assert "told the true number of tokens" in text
    assert f"1 of {len(every)} programs pass with the hole left empty" in text
    infill.figure(entry)


def test_hole_lengths_are_never_mixed(filled):
    cfg, every = filled
    write(cfg.with_masking("ast").but(hole_length="search"), every, set())
    write(cfg.with_masking("ast").but(hole_length="8"), every, set())
    found = {e["hole_length"]: e for e in infill.summary(cfg)}
    assert list(found) == ["oracle", "8", "search"]
    assert set(found["search"]["runs"]) == {"ast"}
    assert found["search"]["rates"][0]["rate"] == 0
    assert len({infill.said(e) for e in found.values()}) == 3


def test_runs_of_other_settings_and_stale_ledgers_are_refused(filled):
    cfg, every = filled
    run = cfg.with_masking("ast")
    write(run, every, set(), threshold=0.5)
    with pytest.raises(UserError, match="differ in threshold"):
        infill.summary(cfg)
    write(run, every, set())
    path = sampling.samples_path(run, "ast-tinycode", None)
    path.write_text(path.read_text().replace('"x"', '"y"'))
    with pytest.raises(UserError, match="ledger of other completions"):
        infill.summary(cfg)


def test_decodings_are_never_mixed(filled):
    cfg, every = filled
    fast = cfg.with_masking("ast").but(decoding="fast", threshold=0.9)
    write(fast, every, set())
    assert [set(e["runs"]) for e in infill.summary(cfg)] == [{"ast", "random"}]
    (entry,) = infill.summary(fast)
    assert (set(entry["runs"]), entry["rates"][0]["rate"]) == ({"ast"}, 0)


def test_the_report_s_page_has_the_holes_their_figure_and_every_completion(filled):
    cfg, _ = filled
    path = report.write(cfg)
    text = path.read_text()
    assert 'id="infilling"' in text
    for entry in infill.summary(cfg):
        name = f"infilling-{entry['holes']}-{entry['hole_length']}"
        assert (path.parent / f"{name}.png").stat().st_size > 1000
        rows = list(csv.DictReader((path.parent / f"{name}.csv").read_text().splitlines()))
        assert len(rows) == len(entry["by_tier"]) + len(entry["by_size"])
        for hole in entry["explorer"]:
            assert html.escape(hole["id"]) in text
    assert json.loads((path.parent / "infilling.json").read_text())


def test_what_is_published_follows_from_the_runs_and_from_itself(filled, tmp_path):
    cfg, _ = filled
    for strategy in ("random", "ast"):
        for seed in (0, 1):
            path = sampling.samples_path(cfg.with_masking(strategy).but(seed=seed), "ast-tinycode", None)
            made = {"commit": "0" * 40, "machine": {}, "versions": {}, "settings": {"seed": seed}}
            write_json(path.with_name(f"{path.stem}.provenance.json"), made)
    out = tmp_path / "published"
    out.mkdir()
    text = infill.publish(cfg, out).read_text()
    (entry,) = infill.summary(cfg)
    assert infill.markdown(entry) in text
    cfg.preset_dir.rename(tmp_path / "gone")  # the page is made of what was published, not of the runs
    assert infill.publish(cfg, out).read_text() == text
    assert sorted(p.suffix for p in out.iterdir()) == [".gz", ".md", ".png"]


def test_publishing_without_filled_holes_is_refused(runs, tmp_path):
    with pytest.raises(UserError, match="no run has filled any holes"):
        infill.publish(resolve("tiny"), tmp_path)
