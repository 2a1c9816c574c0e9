"""The report's page: hostile programs, missing parts, size at 500 tasks x 8 runs, and the page in a real browser."""

import hashlib
import json
import re
import time

import numpy as np
import pytest
from browser import CHROMIUM, DRIVER, Browser

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks
from treediff.files import write_json
from treediff.masking import tokens
from treediff.report import report
from treediff.sampling.run import read_samples, samples_path, settings
from treediff.scoring import stats
from treediff.scoring.run import ledger_path
from treediff.strategies import MASKINGS

HOSTILE = (
    "x = '</script><script>window.broken = 1</script><img src=x onerror=\"window.broken = 1\">'\n"
    "# {{body}} {{data}} <!--<script> \\u003c ``` \ud800 é\n```\n"
)


def synthetic(cfg, tasks, tokens_each, samples=1):
    """Runs of all strategies: programs made of the solutions' tokens, one of them hostile; verdicts drawn."""
    tok = pipeline.tokenizer(cfg)
    rng = np.random.default_rng(cfg.seed)
    problems = list(benchmarks.benchmark_problems(cfg, "tinycode").items())[:tasks]
    coded = {i: tokens.tokenize(tok, f"```python\n{p['canonical_solution']}\n")[0].tolist() for i, p in problems}
    for number, strategy in enumerate(("none", *MASKINGS)):
        run = cfg.with_masking(strategy)
        write_json(run.run_dir / "config.json", run.as_dict())
        for length in cfg.lengths:
            verdicts, lines = {}, []
            for task, p in problems:
                for k in range(samples):
                    base, plus = rng.random(2) < (0.5 + 0.1 * number, 0.8)
                    why = "" if base and plus else "wrong answer: base test 0: solve([1]) gave <b>2</b>, expected 3"
                    verdict = {"base": "pass" if base else "fail", "plus": "pass" if plus else "timeout"}
                    verdicts.setdefault(task, []).append({**verdict, "reason": why, "seconds": 0.1})
                    n = min(length, tokens_each)
                    record = {
                        "task_id": task,
                        "solution": HOSTILE if task == problems[0][0] else p["prompt"] + p["canonical_solution"],
                        "ids": (coded[task] * n)[:n],
                        "committed_at": rng.permutation(length)[:n].tolist(),
                        "settings": settings(run, length),
                    }
                    lines.append(record | ({"sample": k} if k else {}))
            path = samples_path(run, "tinycode", length)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(x) + "\n" for x in lines))
            about = {"data_sha256": "d", "samples_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            entries = verdicts if samples > 1 else {task: of[0] for task, of in verdicts.items()}
            ledger = {"benchmark": "tinycode", "settings": about, "sandbox": {}, "tasks": entries}
            write_json(ledger_path(run, "tinycode", length), ledger)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A report of 60 tasks x 8 runs: (cfg, path of the page)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREEDIFF_RUNS", str(tmp_path_factory.mktemp("runs")))
        cfg = resolve("tiny", lengths=[64, 96])
        synthetic(cfg, 60, 48)
        yield cfg, report.write(cfg)


def data_of(path):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.S)[1])


def test_a_hostile_program_stays_text(written):
    text = written[1].read_text()
    assert text.count("<script") == 2 == text.count("</script>")  # the data and the page's own
    assert "onerror" in text  # it is there, as data
    assert "<img src=x" not in text
    assert "<b>2</b>" not in text
    assert data_of(written[1])["tasks"][0]["answers"]["1"]["program"] == HOSTILE
    pairs = (written[1].parent / "pairs.md").read_text()
    assert "````python" in pairs or HOSTILE.split("\n")[0] not in pairs  # a fence in a program ends no code block


def test_no_request_leaves_the_page(written):
    text = written[1].read_text()
    assert not re.findall(r"(?:src|href|action)\s*=\s*[\"']?(?!data:|#)[^\"'#]", text.partition('id="data"')[0])
    assert not re.findall(r"url\(|@import|fetch\(|XMLHttpRequest|WebSocket|https?://", re.sub(r"\\u003c", "", text))
    assert "default-src 'none'" in text


def test_tables_and_page_agree_with_the_ledgers(written):
    cfg, path = written
    for name in ("table1", "table2"):
        records = json.loads((path.parent / f"{name}.json").read_text())
        rows = (path.parent / f"{name}.csv").read_text().splitlines()[1:]
        tex = (path.parent / f"{name}.tex").read_text()
        for record, row in zip(records, rows, strict=True):
            ledger = json.loads(ledger_path(cfg.with_masking(record["strategy"]), "tinycode", record["T"]).read_text())
            k = sum(stats.passed(ledger, "plus" if record["benchmark"] == "Tiny+" else "base").values())
            assert (record["passed"], record["tasks"]) == (k, 60)
            assert row.split(",")[:5] == [record["strategy"], str(record["T"]), record["benchmark"], str(k), "60"]
            low, high = stats.wilson(k, 60)
            cell = rf"{100 * k / 60:.1f} {{\scriptsize [{100 * low:.1f}, {100 * high:.1f}]}}"
            assert cell in tex
            assert f">{100 * k / 60:.1f} [{100 * low:.1f}, {100 * high:.1f}] ({k}/60)</button></td>" in path.read_text()
            assert record["ledger"] == f"{record['strategy']}-seed0/scores/tinycode-T{record['T']}.json"
        assert tex.count(r"\toprule") == tex.count(r"\bottomrule") == 1
    data = data_of(path)
    assert [(r["strategy"], r["T"]) for r in data["runs"]] == [(s, t) for t in (64, 96) for s in ("none", *MASKINGS)]
    passes = sum(t["answers"]["7"]["verdict"] == "pass" for t in data["tasks"])
    assert passes == next(
        r["passed"] for r in records if (r["strategy"], r["T"], r["benchmark"]) == ("ast", 96, "Tiny+")
    )


def test_pairs_are_the_tasks_that_some_pass_and_others_do_not(written):
    cfg, path = written
    pairs = json.loads((path.parent / "pairs.json").read_text())
    want = 0
    for length in cfg.lengths:
        ledgers = [
            json.loads(ledger_path(cfg.with_masking(s), "tinycode", length).read_text()) for s in ("none", *MASKINGS)
        ]
        want += sum(len(set(v)) == 2 for v in zip(*(stats.passed(x, "plus").values() for x in ledgers), strict=True))
    assert len(pairs) == want > 10
    assert all(len(p["answers"]) == 4 for p in pairs)
    assert {a["strategy"] for a in pairs[0]["answers"]} == {"none", *MASKINGS}


# --- in a browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)")
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def shown(browser, written):
    browser.open(written[1])
    wait(browser, "return document.querySelectorAll('#t-panels .panel').length === 4")
    yield browser
    assert browser.errors() == []
    assert browser.run("return window.broken") is None


def wait(browser, script, seconds=10):
    until = time.monotonic() + seconds
    while not browser.run(script):
        assert time.monotonic() < until, script
        time.sleep(0.05)


def masked(browser):
    return browser.run(
        "return [...document.querySelectorAll('#t-panels .panel')].map(p => p.querySelectorAll('.m').length)"
    )


def test_the_slider_commits_tokens_in_their_order(shown, written):
    rows = read_samples(samples_path(written[0].with_masking("random"), "tinycode", 64))
    at = next(iter(rows.values()))["committed_at"]
    shown.run("document.getElementById('t-step').focus()")
    shown.keys("#t-step", "\ue011")  # Home
    assert masked(shown) == [48] * 4
    shown.keys("#t-step", "\ue014" * 10)  # ten times arrow right
    assert shown.run("return document.getElementById('t-step').value") == "10"
    assert masked(shown)[1] == int((at >= 10).sum())
    shown.keys("#t-step", "\ue010")  # End
    assert masked(shown) == [0] * 4
    shown.run("document.getElementById('t-back').click()")
    assert masked(shown)[1] == int((at >= 63).sum())
    colours = shown.run(
        "return [...new Set([...document.querySelectorAll('.tokens span')].map(s => s.style.background))]"
    )
    assert len(colours) >= 4  # tiers


def test_filters_find_what_the_ledgers_say(shown, written):
    count = "return document.getElementById('count').textContent"
    pick = (
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; "
        "e.dispatchEvent(new Event('input', {bubbles: true}))"
    )
    assert shown.run(count) == "60 of 60 tasks"
    assert shown.run("return document.querySelectorAll('#list > details').length") == 40  # the rest on demand
    shown.run("document.getElementById('more').click()")
    assert shown.run("return document.querySelectorAll('#list > details').length") == 60
    shown.run(pick, "f-set", "tinycode, T = 64")
    shown.run(pick, "f-strategy", "AST (TreeDiff)")
    shown.run(pick, "f-verdict", "pass")
    ledger = json.loads(ledger_path(written[0].with_masking("ast"), "tinycode", 64).read_text())
    assert shown.run(count).startswith(f"{sum(stats.passed(ledger, 'plus').values())} of 60 tasks; ledger: ast-seed0/")
    shown.run("document.querySelector('#filters button[type=reset]').click()")
    wait(shown, count + " === '60 of 60 tasks'")
    shown.keys("#f-text", "window.broken")
    assert shown.run(count) == "1 of 60 tasks"
    shown.run("document.querySelector('#list details').open = true")
    wait(shown, "return document.querySelectorAll('#list .panel').length === 8")
    assert shown.run("return document.querySelector('#list .panel pre').textContent.includes('</script>')")
    shown.run("document.querySelector('#list .panel button').click()")
    wait(shown, "return document.activeElement.id === 't-step'")


def test_every_figure_leads_to_its_ledger_lines(shown, written):
    """A click on any figure of ours lists as many tasks as it counts, and names their ledger."""
    cells = shown.run(
        "return [...document.querySelectorAll('button.cell')].map(b => [b.textContent, JSON.parse(b.dataset.show)])"
    )
    assert len(cells) == 2 * 3 * 4 + 2 * 2 * 5  # two tables of four columns; both sides of ten comparisons
    for i, (text, filters) in enumerate(cells):
        shown.run(f"document.querySelectorAll('button.cell')[{i}].click()")
        wait(shown, "return document.activeElement.id === 'f-set'")
        said = shown.run("return document.getElementById('count').textContent")
        count = re.search(r"\((\d+)/60\)", text)[1] if "/" in text else text
        assert said.startswith(f"{count} of 60 tasks; ledger: "), (text, filters)
        ledger = json.loads((written[0].preset_dir / said.partition("ledger: ")[2]).read_text())
        part = "base" if filters.get("verdict") == "base tests" else "plus"
        assert sum(stats.passed(ledger, part).values()) == int(count) or "over" in filters
    shown.run("document.querySelector('#filters button[type=reset]').click()")
    wait(shown, "return document.getElementById('count').textContent === '60 of 60 tasks'")


def test_tables_sort(shown):
    rows = "[...document.querySelectorAll('#comparisons tbody')[0].rows]"
    column = f"return {rows}.map(r => parseFloat(r.cells[8].textContent))"
    shown.run("document.querySelectorAll('#comparisons th button')[8].click()")
    assert shown.run(column) == sorted(shown.run(column))
    shown.run("document.querySelectorAll('#comparisons th button')[8].click()")
    assert shown.run(column) == sorted(shown.run(column), reverse=True)
    assert shown.run("return document.querySelector('#comparisons th[aria-sort]').ariaSort") == "descending"


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_never_scrolls_sideways(browser, written, width):
    browser.open(written[1], width, 740)
    wait(browser, "return document.querySelectorAll('#t-panels .panel').length === 4")
    browser.run("for (const d of document.querySelectorAll('details')) d.open = true")
    wait(browser, "return document.querySelectorAll('#list .panel').length > 100")
    browser.run("scrollTo(500, 0)")
    assert browser.run("return [scrollX, document.documentElement.scrollWidth <= innerWidth]") == [0, True]
    assert browser.errors() == []


def test_a_page_of_500_tasks_and_8_runs(browser, runs, monkeypatch):
    """Written, opened, filtered, stepped through; its size and times, in seconds, far from what would be felt."""
    import matplotlib.figure

    monkeypatch.setattr(report, "masking_figure", lambda cfg, code: matplotlib.figure.Figure())
    cfg = resolve("tiny", lengths=[64, 96], limit=500)
    synthetic(cfg, 500, 96)
    begun = time.perf_counter()
    path = report.write(cfg)
    assert time.perf_counter() - begun < 120
    assert path.stat().st_size < 12e6
    data = data_of(path)
    assert len(data["tasks"]) == 500
    assert sum(len(t["answers"]) for t in data["tasks"]) == 4000
    browser.open(path, 380, 740)
    wait(browser, "return document.querySelectorAll('#t-panels .panel').length === 4")
    text = "return document.getElementById('count').textContent"
    assert browser.run(text) == "500 of 500 tasks"
    browser.run("document.querySelector('#tables button.cell').click()")
    said = browser.run(text)
    ledger = json.loads((cfg.preset_dir / said.partition("ledger: ")[2]).read_text())
    assert said.startswith(f"{sum(stats.passed(ledger, 'base').values())} of 500 tasks")
    browser.run("document.getElementById('t-step').focus()")
    browser.keys("#t-step", "\ue011")  # Home
    assert masked(browser) == [64] * 4
    browser.keys("#t-step", "\ue010")  # End
    assert masked(browser) == [0] * 4
    assert browser.run("scrollTo(500, 0); return scrollX") == 0
    assert browser.errors() == []


def test_samples_of_a_task_are_all_there(browser, runs, monkeypatch):
    import matplotlib.figure

    monkeypatch.setattr(report, "masking_figure", lambda cfg, code: matplotlib.figure.Figure())
    cfg = resolve("tiny", lengths=[64])
    synthetic(cfg, 12, 24, samples=12)
    browser.open(report.write(cfg))
    wait(browser, "return document.querySelectorAll('#t-panels .panel').length === 4")
    ledger = json.loads(ledger_path(cfg, "tinycode", 64).read_text())["tasks"]
    passes = [sum(v["base"] == v["plus"] == "pass" for v in of) for of in ledger.values()]
    dots = "[...document.querySelectorAll('#list > details .dot:last-child')].map(d => d.title)"
    assert browser.run(f"return {dots}") == [f"AST (TreeDiff): {c} of 12 pass" for c in passes]
    browser.run("document.querySelector('#list details').open = true")
    wait(browser, "return document.querySelectorAll('#list .panel').length === 4")
    assert browser.run("return document.querySelectorAll('#list .panel details h4').length") == 4 * 9
    assert browser.run("return document.querySelector('#list').textContent.includes('the other 2 are in the ledger')")
    assert browser.errors() == []
