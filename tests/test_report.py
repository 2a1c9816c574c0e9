"""The report from ledgers: counts, what is missing, what may not be compared, and the paper's own numbers."""

import csv
import io
import json
import re
import shutil
from fractions import Fraction
from xml.etree import ElementTree

import numpy as np
import pytest
from test_page import synthetic
from test_stats import simulated

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks, prepare, tinycode
from treediff.errors import UserError
from treediff.files import read_json, write_json
from treediff.masking import tokens
from treediff.report import comparisons, paper, pictures, report
from treediff.report.tables import Cell, Table
from treediff.sampling.run import samples_path, settings
from treediff.scoring import stats
from treediff.scoring.run import ledger_path
from treediff.strategies import MASKINGS


def ledger(cfg, passed, n=20, **about):
    """A run's ledger and samples: the first `passed` tasks pass."""
    for length in cfg.lengths:
        tasks = {
            f"TinyCode/{i}": {"base": "pass", "plus": "pass" if i < passed else "fail", "reason": "", "seconds": 0.1}
            for i in range(n)
        }
        out = {"benchmark": "tinycode", "settings": {"data_sha256": "d", **about}, "sandbox": {}, "tasks": tasks}
        write_json(ledger_path(cfg, "tinycode", length), out)
        path = samples_path(cfg, "tinycode", length)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"task_id": "TinyCode/0", "settings": settings(cfg, length)}) + "\n")


def test_missing_runs_show_as_missing_and_counts_are_counted(runs):
    cfg = resolve("tiny", lengths=[64, 96])
    ledger(cfg, 12)
    records = report.pass_rates(cfg, ("random", "ast"))
    assert "passed" not in records[0]
    got = [(r["T"], r["benchmark"], r["passed"], r["tasks"]) for r in records if r["strategy"] == "ast"]
    assert got == [(t, name, k, 20) for t in cfg.lengths for name, k in (("Tiny", 20), ("Tiny+", 12))]
    text = report.rates_table(records).markdown()
    assert text.count("not run") == 4
    assert "60.0 [38.7, 78.1] (12/20)" in text


def test_runs_of_different_settings_are_not_compared(runs):
    cfg = resolve("tiny")
    ledger(cfg, 12)
    ledger(cfg.with_masking("random"), 10)
    report.pass_rates(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random").but(temperature=0.5), 10)
    with pytest.raises(UserError, match="random and ast differ in sampling temperature"):
        report.pass_rates(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random"), 10, data_sha256="other")
    with pytest.raises(UserError, match="differ in data_sha256"):
        report.pass_rates(cfg, ("random", "ast"))
    ledger(cfg.with_masking("random"), 10, n=19)
    with pytest.raises(UserError, match="differ in tasks"):
        report.pass_rates(cfg, ("random", "ast"))


def test_one_run_each_compares_two_models_and_claims_nothing(runs):
    """However great the difference: no p-value in the sentences, the runs named, the intervals there."""
    cfg = resolve("tiny", lengths=[64])
    ledger(cfg.with_masking("random"), 10)
    ledger(cfg, 20)
    ledger(cfg.with_masking("none"), 0)
    [record] = [r for r in comparisons.comparisons(cfg) if (r["from"], r["to"]) == ("random", "ast")]
    assert (record["only_from"], record["only_to"], record["p"]) == (0, 10, pytest.approx(2 / 1024))
    found = comparisons.findings(cfg)
    assert not any(map(comparisons.decides, found))
    said = [*comparisons.sentences(found), comparisons.answer(found)]
    for sentence in said:
        assert re.search(r"one training run each \(\w+-seed0 and ast-seed0|none-seed0 and random-seed0", sentence, re.I)
        assert "this compares two models, not two methods" in sentence
        assert not re.search(r"\bp [=<]|significant|a difference\b", sentence)
        assert re.search(r"\[[+-]\d+\.\d, [+-]\d+\.\d\]|interval [+-]\d+\.\d to [+-]\d+\.\d", sentence)
    assert "none-seed0 and ast-seed0" in " ".join(said)  # fine-tuned against backbone likewise
    assert "compares these two models" in comparisons.comparisons_table(comparisons.comparisons(cfg)).caption


def test_equal_strategies_are_seldom_said_to_differ():
    """1,000 studies of 5 runs each, equal means, runs that deviate by 4 points: at most 6 % claim a difference."""
    rng, claimed = np.random.default_rng(5), 0
    for _ in range(1000):
        a, b = (dict(enumerate(of)) for of in simulated(rng, 120, 0.04))
        record = comparisons.pooled_record("random", "ast", ("humaneval", 256), a, b, paired=False)
        [record] = comparisons._with_holm([record])
        claimed += ": a difference (p" in comparisons.sentence(record)
    assert 0 < claimed <= 60


def test_the_paper_s_figures_are_whole_tasks():
    for by_benchmark in paper.PAPER.values():
        for benchmark, by_t in by_benchmark.items():
            for pair in by_t.values():
                for percent in pair:
                    assert stats.recover(percent, paper.TASKS[benchmark]), (benchmark, percent)
    assert not stats.recover(44.9, 378)  # the misprint that the report names


def test_the_report_without_any_run_says_so_and_asks_for_no_tokenizer(runs, monkeypatch):
    monkeypatch.setattr(tokens, "load_tokenizer", lambda *_: pytest.fail("a tokenizer was asked for"))
    page = pipeline.reported(resolve("paper"))
    text = page.read_text()
    assert text.count("<td>not run</td>") > 10
    assert "No two runs can be compared yet" in text
    assert "Nothing can be said yet" in text
    assert "no run was scored yet, so no tokenizer was asked for" in text
    assert not list(page.parent.glob("*.png"))
    assert "http" not in text.replace("http-equiv", "")
    assert (page.parent / "table1.csv").read_text().startswith("strategy,T,benchmark,passed,tasks")


def test_the_report_goes_on_without_the_tokenizer_that_its_runs_had(runs):
    cfg = resolve("tiny", lengths=[64])
    synthetic(cfg, 12, 20)
    page = report.write(cfg.but(tokenizer=str(runs / "gone")))
    assert "The pictures of single tokens are left out: tokenizer: " in page.read_text()
    assert sorted(p.stem for p in page.parent.glob("*.png")) == ["differences", "figure4"]


# --- several seeds, several samples ---------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A short program in the first figure."""
    monkeypatch.setattr(pictures, "EXAMPLE", "x = 1")


@pytest.fixture
def three_seeds(runs, quick):
    """Runs of all strategies with seeds 0, 1 and 2."""
    cfg = resolve("tiny", lengths=[64])
    for seed in (0, 1, 2):
        synthetic(cfg.but(seed=seed), 40, 24)
    return cfg


def test_seeds_are_pooled_in_the_report(three_seeds):
    """The records and the page against the ledgers themselves: means over runs and tasks, runs and tests named."""
    cfg = three_seeds
    folder = report.write(cfg).parent
    passed = {
        s: [
            stats.passed(read_json(ledger_path(cfg.with_masking(s).but(seed=k), "tinycode", 64)), "plus")
            for k in (0, 1, 2)
        ]
        for s in ("none", *MASKINGS)
    }
    records = json.loads((folder / "pooled.json").read_text())
    assert [(r["from"], r["to"]) for r in records] == paper.PAIRS
    for r in records:
        assert sorted(r["runs"]) == sorted(f"{s}-seed{k}" for s in (r["from"], r["to"]) for k in (0, 1, 2))
        means = [sum(sum(run.values()) for run in passed[s]) / 120 for s in (r["from"], r["to"])]
        assert r["difference"] == pytest.approx(100 * (means[1] - means[0]))
        assert r["low"] < r["difference"] < r["high"]
        found = stats.pooled(passed[r["from"]], passed[r["to"]], paired_runs=True)  # each seed has its own backbone
        assert (r["p"], r["low"], r["paired"]) == (pytest.approx(found["p"]), pytest.approx(100 * found["low"]), True)
    assert [r["p_holm"] for r in records] == pytest.approx(stats.holm([r["p"] for r in records]))
    text = (folder / "report.html").read_text()
    assert "Runs crossed with tasks" in text
    assert text.count("over 3 training runs against 3") >= len(records)
    assert "one training run each" not in text
    assert "over 3 training runs with AST masking and 3 with random masking" in text
    rates = json.loads((folder / "seed_rates.json").read_text())
    [ours] = [r for r in rates if r["strategy"] == "ast"]
    each = [100 * sum(run.values()) / 40 for run in passed["ast"]]
    assert list(ours["runs"].values()) == pytest.approx(each)
    assert ours["mean"] == pytest.approx(sum(each) / 3)
    assert f"ast-seed2: {each[2]:.1f}" in text


def test_a_pooled_difference_is_claimed_where_p_allows_it():
    record = {"benchmark": "HE+", "T": 512, "from": "random", "to": "ast", "seeds": [3, 4], "p": 0.001, "p_holm": 0.004}
    record |= {"difference": 4.0, "low": 1.0, "high": 7.0, "tasks": 164}
    assert "over 4 training runs against 3 and 164 tasks: a difference (p = 0.004" in comparisons.sentence(record)
    assert "so a difference can be claimed" in comparisons.answer([record])
    assert "no difference can be told" in comparisons.sentence(record | {"p_holm": 0.06})
    assert "so no difference can be told" in comparisons.answer([record | {"p_holm": 0.06}])


def test_runs_are_compared_in_pairs_only_where_each_seed_has_its_own_backbone(runs):
    cfg = resolve("tiny", lengths=[64])
    benchmarks.write_tinycode(cfg)
    for seed in (0, 1, 2):
        synthetic(cfg.but(seed=seed), 40, 24)
    assert all(r["paired"] for r in comparisons.pooled(cfg))
    for seed in (1, 2):
        for strategy in MASKINGS:
            run = cfg.with_masking(strategy).but(seed=seed, backbone_seed=0)
            write_json(run.run_dir / "config.json", run.as_dict())
    records = [r for r in comparisons.pooled(cfg) if r["from"] != "none"]
    assert records
    assert not any(r["paired"] for r in records)


def resampled(cfg, **changes):
    """The run's samples again as other settings would name them."""
    path = samples_path(cfg, "tinycode", 64)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(r | {"settings": r["settings"] | changes}) + "\n" for r in rows))
    place = ledger_path(cfg, "tinycode", 64)
    ledger = read_json(place)
    ledger["settings"].pop("samples_sha256")
    write_json(place, ledger)


def trained(cfg, **changes):
    write_json(cfg.run_dir / "config.json", cfg.as_dict() | changes)


@pytest.mark.parametrize(
    ("seed", "masking", "change", "message"),
    [
        (0, "ast", (trained, {"lr": 0.1}), r"random and ast differ in training switch lr \(0.005 and 0.1\)"),
        (0, "random", (trained, {"rows": 7}), r"random and ast_span differ in training switch rows"),
        (0, "none", (trained, {"d_model": 64}), r"none and random differ in training switch d_model"),
        (0, "ast", (resampled, {"block_length": 8}), r"ast differ in sampling block_length"),
        (2, "ast", (trained, {"eps_max": 0.5}), r"and ast-seed2 differ in training switch eps_max"),
        (1, "random", (trained, {"max_length": 99}), r"and random-seed1 differ in training switch max_length"),
        (1, "none", (resampled, {"temperature": 0.4}), r"none-seed1 differ in sampling temperature \(0.0 and 0.4\)"),
    ],
)
def test_the_report_refuses_runs_of_different_switches(three_seeds, seed, masking, change, message):
    how, what = change
    how(three_seeds.with_masking(masking).but(seed=seed), **what)
    with pytest.raises(UserError, match=message):
        report.write(three_seeds)
    assert not (three_seeds.preset_dir / "report").exists()


def test_a_ledger_of_other_samples_is_refused(three_seeds):
    path = samples_path(three_seeds.but(seed=1), "tinycode", 64)
    path.write_text(path.read_text().replace("return", "return  "))
    with pytest.raises(UserError, match=r"ast-seed1/scores/tinycode-T64.json: it is the ledger of other samples"):
        report.write(three_seeds)


def test_several_samples_in_the_report(runs, quick):
    cfg = resolve("tiny", lengths=[64])
    synthetic(cfg, 30, 24, samples=5)
    folder = report.write(cfg).parent
    ledger = read_json(ledger_path(cfg, "tinycode", 64))
    c = [sum(v["base"] == v["plus"] == "pass" for v in of) for of in ledger["tasks"].values()]
    [cell] = [r for r in json.loads((folder / "table1.json").read_text()) if r["strategy"] == "ast"][1:]
    assert (cell["passed"], cell["tasks"], cell["samples"]) == (sum(c), 30, 5)
    assert cell["rate"] == pytest.approx(100 * sum(c) / 150)
    low, high = (100 * x for x in stats.wilson(sum(c), 150))
    assert cell["low"] <= low + 1e-9
    assert cell["high"] >= high - 1e-9  # no narrower than if all samples were tasks
    found = {r["k"]: r for r in json.loads((folder / "pass_at_k.json").read_text()) if r["strategy"] == "ast"}
    assert list(found) == [1, 2, 5]  # of the plus tests, the last written
    assert found[5]["rate"] == pytest.approx(100 * sum(x > 0 for x in c) / 30)
    assert found[2]["rate"] == pytest.approx(100 * sum(1 - (5 - x) * (4 - x) / 20 for x in c) / 30)
    text = (folder / "report.html").read_text()
    assert "They are no further tasks" in text
    assert f"{found[5]['rate']:.1f} [{found[5]['low']:.1f}, {found[5]['high']:.1f}]" in text
    [record] = [r for r in comparisons.comparisons(cfg) if (r["from"], r["to"]) == ("random", "ast")]
    other = stats.passed(read_json(ledger_path(cfg.with_masking("random"), "tinycode", 64)), "plus")
    d = [Fraction(x, 5) - v for x, v in zip(c, other.values(), strict=True)]
    assert record["difference"] == pytest.approx(100 * float(sum(d)) / 30)
    assert record["p"] == pytest.approx(stats.sign_flip((Fraction(0), x) for x in d))


def test_other_numbers_of_samples_are_not_compared(runs):
    cfg = resolve("tiny", lengths=[64])
    synthetic(cfg, 8, 24, samples=3)
    place = ledger_path(cfg, "tinycode", 64)
    ledger = read_json(place)
    write_json(place, ledger | {"tasks": {t: of[:2] for t, of in ledger["tasks"].items()}})
    with pytest.raises(UserError, match=r"none and ast differ in samples per task \(\[3\] and \[2\]\)"):
        comparisons.ledgers(cfg)


# --- what stands beside ours ----------------------------------------------------------------------------------------


def test_deviations_are_those_of_the_runs(three_seeds):
    """What the runs' own directories say, whatever switches the report is called with."""
    for masking in ("random", "ast_span", "ast"):
        trained(three_seeds.with_masking(masking), lr=0.03)
    resampled(three_seeds, temperature=0.7)
    found = {r["switch"]: r for r in report.deviations(three_seeds)}
    assert (found["lr"]["ours"], found["lr"]["paper"]) == (0.03, 5e-5)
    assert found["temperature"]["ours"] == {"Random masking": 0.0, "AST (span)": 0.0, "AST (TreeDiff)": 0.7}
    assert "lora_dropout" in found
    assert "weight_decay" not in found  # as in the paper's preset
    assert report.deviations(resolve("paper")) == []


def humaneval_records():
    """Table 1's records with ours at T = 256, and a strategy's name that LaTeX must not read as its own."""
    out = []
    for strategy in ("none", "random", "ast"):
        for t in (256, 512):
            for benchmark in ("humaneval", "mbpp"):
                for part, name in enumerate(paper.HALVES[benchmark]):
                    r = {"strategy": strategy, "T": t, "benchmark": name}
                    r |= {"paper_T": t, "paper": paper.PAPER[strategy][benchmark][t][part]}
                    n = paper.TASKS[benchmark]
                    out.append(r | (stats.rated({i: (int(i < 60), 1) for i in range(n)}) if t == 256 else {}))
    return out


def test_ours_and_the_paper_s_stand_side_by_side():
    lines = report.rates_table(humaneval_records()).markdown().splitlines()
    assert [line.split(" | ")[0] for line in lines[6:]] == ["| AST (TreeDiff)", "| AST (TreeDiff), the paper"]
    ours, printed = ([c.strip() for c in line.strip("|").split("|")] for line in lines[6:])
    assert ours[2] == "36.6 [29.6, 44.2] (60/164)"
    assert ours[5] == "not run"
    assert printed[1:] == ["42.1", "37.2", "52.9", "44.2", "40.2", "36.6", "42.3", "33.3"]


HOSTILE = r"AST_100% & $x^2$ #{1} ~ a\b <c> | </td><script>"


def test_latex_is_balanced_and_escaped():
    """Groups and environments close, every row has as many cells as columns, no special character stands bare."""
    table = report.rates_table(humaneval_records())
    text = Table(table.head, [[HOSTILE, *row[1:]] for row in table.rows]).latex()
    plain = text.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
    depth = 0
    for c in plain:
        depth += (c == "{") - (c == "}")
        assert depth >= 0
    assert depth == 0
    assert re.findall(r"\\(begin|end)\{(\w+)\}", text) == [("begin", "tabular"), ("end", "tabular")]
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    assert text.count(r"\multicolumn{4}{c}{$T=256$}") == text.count(r"\cmidrule(lr){2-5}\cmidrule(lr){6-9}") == 1
    for row in (line for line in text.splitlines() if line.endswith(r"\\")):
        spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn\{(\d+)\}", row))
        assert len(re.findall(r"(?<!\\)&", row)) + 1 + spanned == columns, row
        words = re.sub(r"\$T=\d+\$|\\text\w+|\\multicolumn|\\scriptsize|\\.", "", row)
        assert not set(words) & set("$#%_^~<>\\"), row


def test_a_table_is_the_same_in_every_form():
    """Hostile texts come back as they were from Markdown, CSV and HTML, read by other people's parsers."""
    table = Table(
        ["", "n, T = 1"], [[HOSTILE, Cell("1", {"set": '"><b>'})], ['two\nlines, "quoted"', None]], "<caption>"
    )
    assert list(csv.reader(io.StringIO(table.csv()))) == [table.head, [HOSTILE, "1"], [table.rows[1][0], ""]]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.markdown().splitlines()]
    assert [len(line) for line in lines] == [2, 2, 2, 2]
    assert re.sub(r"\\([|<])", r"\1", lines[2][0].strip()) == HOSTILE
    assert "<c>" not in re.sub(r"\\<", "", lines[2][0])
    root = ElementTree.fromstring(str(table.html()).replace("class=long", 'class="long"'))
    cells = list(root.iter("td"))
    assert ["".join(td.itertext()) for td in cells] == [HOSTILE, "1", table.rows[1][0], ""]
    assert json.loads(cells[1][0].get("data-show")) == {"set": '"><b>'}
    assert "".join(root.find("table/caption").itertext()) == "<caption>"


def test_the_report_says_what_the_runs_were_trained_on(runs, tmp_path, monkeypatch):
    cfg = resolve("tiny", rows=60, pretrain={"rows": 80})
    data = tmp_path / "<b>.jsonl"
    own = cfg.but(data=str(data))
    data.write_text("".join(json.dumps(r) + "\n" for r in tinycode.training(70, 0)))
    assert report.data_sets(own) == {}
    for masking in ("none", "random", "ast"):
        run = own.with_masking(masking)
        pipeline.prepared(run)
        write_json(run.run_dir / "provenance.json", {"data": prepare.data_fingerprint(run)})
    found = report.data_sets(own)
    assert list(found) == ["Backbone", "Random masking, AST (TreeDiff)"]
    assert [f["rows"]["kept"] for f in found.values()] == [70, 60]
    hostile = {"row": "<i>", "task": "T/0", "code": 1.0, "text": 0.5, "minhash": 0.0, "by": ["code"]}
    checked = {"against": {"humaneval": "0"}, "checked": 60, "flagged": 1, "by": {"code": 1}, "problems": 2}
    checked |= {"problems_flagged": 1, "too_short": {"code": 0, "text": 0}, "nearest": [hostile]}
    checked |= {"thresholds": {"code": 0.6, "text": 0.6, "minhash": 0.6}}
    found["Random masking, AST (TreeDiff)"]["contamination"] |= checked
    monkeypatch.setattr(report, "data_sets", lambda cfg: found)
    text = re.sub(r"\s+", " ", report.write(own).read_text())
    assert "<td>not chosen</td><td>10</td>" in text
    assert "<b>1 of 60 rows</b> (1.667%) hold a problem of humaneval (code 1)" in text
    assert text.count("tinycode: held out by construction") == 2
    assert "<td>&lt;i&gt;</td>" in text
    assert "&lt;b&gt;.jsonl" in text
    code = sum(v for k, v in found["Backbone"]["tokens"].items() if k not in ("prompt", "reasoning"))
    share = 100 * found["Backbone"]["tokens"]["control"] / code
    assert f"<td>{share:.1f}</td></tr>" in text


def test_rules_beyond_the_paper_s_are_reported_where_they_were_run(runs, quick):
    cfg = resolve("tiny", lengths=[64])
    synthetic(cfg, 12, 20)
    report.write(cfg)
    folder = cfg.preset_dir / "report"
    assert "Whole names" not in (folder / "table2.md").read_text()
    (cfg.preset_dir / "random-seed0").rename(cfg.preset_dir / "kept")
    shutil.copytree(cfg.preset_dir / "kept", cfg.preset_dir / "identifier-seed0")
    (cfg.preset_dir / "kept").rename(cfg.preset_dir / "random-seed0")
    report.write(cfg)
    assert re.search(r"\| Whole names \| \d", (folder / "table2.md").read_text())
    pairs = read_json(folder / "comparisons.json")
    assert [r["difference"] for r in pairs if r["to"] == "identifier"] == [0.0]


def test_two_decodings_are_told_apart_and_shown_side_by_side(runs, quick):
    cfg = resolve("tiny", lengths=[64])
    ledger(cfg, 12)
    assert comparisons.decodings(cfg) == []
    fast = cfg.but(decoding="fast", threshold=0.9)
    ledger(fast, 9)
    ledger(cfg.with_masking("random"), 10)
    found = [r for r in comparisons.decodings(cfg) if r["benchmark"] == "Tiny+"]
    got = [(r["strategy"], r["decoding"], r["passed"], r["switches"]) for r in found]
    assert got == [("random", "", 10, {}), ("ast", "", 12, {}), ("ast", "fast", 9, {"threshold": 0.9})]
    assert comparisons.decodings(fast) == comparisons.decodings(cfg)
    benchmarks.write_tinycode(cfg)
    page, other = report.write(cfg), report.write(fast)
    assert (page.parent.name, other.parent.name) == ("report", "report-fast")
    for path in (page, other):
        assert "<td>threshold 0.9</td>" in path.read_text()
    assert "decoding fast" not in page.read_text().partition("</header>")[0]
    assert "decoding fast" in other.read_text().partition("</header>")[0]
    assert [r.get("passed") for r in read_json(other.parent / "table1.json") if r["benchmark"] == "Tiny+"] == [
        *(None, None, 9)
    ]
