"""The report from ledgers: counts, what is missing, what may not be compared, and the paper's own numbers."""

import json

import pytest

from treediff import paper, report, tinycode
from treediff.config import UserError, resolve, write_json


def ledger(cfg, passed, n=20, **settings):
    """A run's ledger and samples: the first `passed` tasks pass."""
    from treediff import answers

    for length in cfg.lengths:
        tasks = {
            f"TinyCode/{i}": {"base": "pass", "plus": "pass" if i < passed else "fail", "reason": "", "seconds": 0.1}
            for i in range(n)
        }
        out = {"benchmark": "tinycode", "settings": {"data_sha256": "d", **settings}, "sandbox": {}, "tasks": tasks}
        write_json(report.ledger_path(cfg, "tinycode", length), out)
        path = answers.samples_path(cfg, "tinycode", length)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task_id": "TinyCode/0", "settings": answers.settings(cfg, length)}) + "\n")


def test_missing_runs_show_as_missing_and_counts_are_counted(runs):
    cfg = resolve("tiny")
    ledger(cfg, 12)
    records = report.table(cfg, ("random", "ast"))
    assert "passed" not in records[0]
    got = [(r["T"], r["benchmark"], r["passed"], r["tasks"]) for r in records if r["strategy"] == "ast"]
    assert got == [(t, name, k, 20) for t in cfg.lengths for name, k in (("Tiny", 20), ("Tiny+", 12))]
    text = report.markdown(records)
    assert text.count("not run") == 4
    assert "60.0 [38.7, 78.1] (12/20)" in text


def test_runs_of_different_settings_are_not_compared(runs):
    cfg = resolve("tiny")
    ledger(cfg, 12)
    ledger(cfg.with_masking("random"), 10)
    report.table(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random").but(temperature=0.5), 10)
    with pytest.raises(UserError, match="random and ast differ in sampling temperature"):
        report.table(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random"), 10, data_sha256="other")
    with pytest.raises(UserError, match="differ in data_sha256"):
        report.table(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random"), 10, n=19)
    with pytest.raises(UserError, match="differ in tasks"):
        report.table(cfg, ("random", "ast"))


def test_an_order_is_claimed_only_where_the_test_allows_it(runs):
    cfg = resolve("tiny", lengths=[64])
    ledger(cfg.with_masking("random"), 10)
    ledger(cfg, 12)
    assert "no difference can be told" in report.verdicts(report.comparisons(cfg))
    ledger(cfg, 20)
    [record] = [r for r in report.comparisons(cfg) if (r["from"], r["to"]) == ("random", "ast")]
    assert (record["only_from"], record["only_to"], record["p"]) == (0, 10, pytest.approx(2 / 1024))
    assert "a difference at p" in report.verdicts([record])


def test_the_paper_s_figures_are_whole_tasks():
    from treediff import stats

    for by_benchmark in report.PAPER.values():
        for benchmark, by_t in by_benchmark.items():
            for pair in by_t.values():
                for percent in pair:
                    assert stats.recover(percent, paper.TASKS[benchmark]), (benchmark, percent)
    assert not stats.recover(44.9, 378)  # the misprint that the report names


def test_the_report_without_any_run_says_so(runs, monkeypatch):
    import matplotlib.figure

    monkeypatch.setattr(report, "masking_figure", lambda cfg, code: matplotlib.figure.Figure())
    page = report.write(resolve("tiny"))
    text = page.read_text()
    assert text.count("<td>not run</td>") > 10
    assert "No two runs can be compared yet" in text
    assert "http" not in text.replace("http-equiv", "")
    assert (page.parent / "table1.csv").read_text().startswith("strategy,T,benchmark,passed,tasks")


def test_the_report_says_what_the_runs_were_trained_on(runs, tmp_path):
    from treediff import page, prepare

    cfg = resolve("tiny", rows=60, pretrain={"rows": 80})
    data = tmp_path / "<b>.jsonl"
    own = cfg.but(data=str(data))
    data.write_text("".join(json.dumps(r) + "\n" for r in tinycode.training(70, 0)))
    assert report.data_sets(own) == {}
    for masking in ("base", "random", "ast"):
        run = own.with_masking(masking)
        prepare.prepared(run)
        write_json(run.run_dir / "provenance.json", {"data": prepare.data_fingerprint(run)})
    found = report.data_sets(own)
    assert list(found) == ["Backbone", "Random masking, AST (TreeDiff)"]
    assert [f["rows"]["kept"] for f in found.values()] == [70, 60]
    hostile = {"row": "<i>", "task": "T/0", "code": 1.0, "text": 0.5, "minhash": 0.0, "by": ["code"]}
    checked = {"against": {"humaneval": "0"}, "checked": 60, "flagged": 1, "by": {"code": 1}, "problems": 2}
    checked |= {"problems_flagged": 1, "too_short": {"code": 0, "text": 0}, "nearest": [hostile]}
    checked |= {"thresholds": {"code": 0.6, "text": 0.6, "minhash": 0.6}}
    found["Random masking, AST (TreeDiff)"]["contamination"] |= checked
    text = "".join(page._data({"data": found}))
    assert "<td>not chosen</td><td>10</td>" in text
    assert "<b>1 of 60 rows</b> (1.667 %) hold a problem of humaneval (code 1)" in text
    assert text.count("tinycode: held out by construction") == 2
    assert "<td>&lt;i&gt;</td>" in text
    assert "&lt;b&gt;.jsonl" in text
    code = sum(v for k, v in found["Backbone"]["tokens"].items() if k not in ("prompt", "reasoning"))
    share = 100 * found["Backbone"]["tokens"]["control"] / code
    assert f"<td>{share:.1f}</td></tr>" in text
