"""The site: links turned, a page of every switch, no link that leads nowhere. The whole of it is slow."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, DRIVER, Browser

from treediff.config import SWITCHES

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("build", ROOT / "docs/site/build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


def test_every_switch_is_on_its_page_in_a_row_of_equal_cells():
    text = build.switches_page()
    assert all(text.count(f"| `{name}` |") == 1 for name in SWITCHES)


def test_links_are_turned_to_where_their_targets_stand(tmp_path):
    build.page("README.md", tmp_path)
    text = (tmp_path / "index.md").read_text()
    assert "](docs/fidelity.md)" in text
    build.page("docs/sandbox.md", tmp_path)
    build.page("CONTRIBUTING.md", tmp_path)
    assert "](docker.md)" in (tmp_path / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ('<a href="b.html#here">', 0),
        ('<a href="b.html#there">', 1),
        ('<a href="c.html">', 1),
        ('<img src="https://example.org/x.png">', 1),
        ('<a href="https://example.org">', 0),
        ('<a href="#top">', 1),
    ],
)
def test_what_leads_nowhere_or_elsewhere_is_found(tmp_path, body, wrong):
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h1 id="here">')
    assert len(build.broken_links(tmp_path)) == wrong


@pytest.mark.slow
def test_the_site_opens_as_files_and_its_search_finds(tmp_path, runs):
    short = ["rows=200", "max_steps=6", "limit=8", "lengths=[32,64]", 'pretrain={"rows":200,"max_steps":12}']
    done = subprocess.run(
        [sys.executable, "docs/site/build.py", "--execute", *short], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs Chromium and chromedriver")
    site = ROOT / "build/site"
    with Browser(tmp_path) as browser:
        for path in sorted(site.rglob("*.html")):
            browser.open(path, width=400)
            assert browser.errors() == [], path
            assert not browser.run("return document.documentElement.scrollWidth > innerWidth"), path
        browser.open(site / "index.html")
        browser.run("document.querySelector('input.md-search__input').focus()")
        browser.keys("input.md-search__input", "span mask")
        found = """return new Promise(done => { const look = () => { const n = document.querySelectorAll(
            '.md-search-result__item').length; n ? done(n) : setTimeout(look, 200) }; look() })"""
        assert browser.run(found) > 0
