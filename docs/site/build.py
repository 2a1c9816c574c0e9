"""`make docs`: the site of the project, without a network, to be opened as files: build/site/index.html.

    python docs/site/build.py [--preset tiny] [--execute SWITCH=VALUE ...]

README and docs, the switches, the API from docstrings, and the notebooks with their outputs: those that `treediff
reproduce` executed (runs/<preset>/notebooks) where they are newer than their source, the others executed here with the
given switches. At the end every link of every page is followed, and nothing may be fetched from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import posixpath
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from treediff.cli import QUIET, STAGES, _kernel
from treediff.config import PRESETS, SWITCHES, resolve, runs_root

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "THIRD_PARTY.md", "docker/README.md")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
MATH = re.compile(r"\$\$(.+?)\$\$|\$([^$\n]+?)\$", re.S)
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
log = logging.getLogger(__name__)


# --- pages ---------------------------------------------------------------------------------------------------------
def placed(path: str) -> str | None:
    """Where a file of the project stands in the site; None where it does not."""
    if path == "README.md":
        return "index.md"
    if path in PAGES:
        return path.replace("docker/README.md", "docker.md")
    if path.startswith("notebooks/") and path.endswith(".ipynb"):
        return path.replace(".ipynb", ".md")
    return path if path.startswith("docs/") and not path.startswith("docs/site/") else None


def page(path: str, out: Path) -> None:
    """Copy one Markdown file with its links turned to where their targets stand in the site. A file that is no page
    is copied, too; a link to a folder becomes its text."""
    here = placed(path)

    def turned(match: re.Match[str]) -> str:
        target, _, anchor = match[2].partition("#")
        if not target or ":" in target:
            return match[0]
        at = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if (ROOT / at).is_dir():
            return f"`{match[1][1:-2]}`"
        if not (ROOT / at).exists() and at.startswith("docs/results/"):
            return f"{match[1][1:-2]} (not published yet)"
        new = placed(at)
        if new is None:
            new = f"files/{at}"
            (out / new).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / at, out / new)
        new = posixpath.relpath(new, posixpath.dirname(here) or ".")
        return f"{match[1]}{new}{f'#{anchor}' if anchor else ''}{match[3]}"

    text = LINK.sub(turned, (ROOT / path).read_text(encoding="utf-8"))
    (out / here).parent.mkdir(parents=True, exist_ok=True)
    (out / here).write_text(text, encoding="utf-8")


def switches_page() -> str:
    """Every switch, by what depends on it, with its value in each preset."""
    configs = {name: resolve(name) for name in PRESETS}
    out = ["# Switches", "", "Generated from `treediff/config.py`; `treediff switches --preset NAME` prints the same."]
    for stage, title in STAGES.items():
        out += ["", f"## {title.capitalize()}", "", f"| Switch | Takes | Meaning | {' | '.join(PRESETS)} | Paper |"]
        out.append("| --- " * (4 + len(PRESETS)) + "|")
        for s in (s for s in SWITCHES.values() if s.stage == stage):
            values = [json.dumps(getattr(cfg, s.name)) for cfg in configs.values()]
            cells = [f"`{s.name}`", f"`{s.takes}`", s.help, *(f"`{v}`" for v in values), s.paper]
            out.append(f"| {' | '.join(cells)} |")
    return "\n".join([*out, ""])


def api_pages(out: Path) -> list[dict[str, str]]:
    """One page for each module with public definitions; its entries of the navigation."""
    entries = []
    for path in sorted((ROOT / "treediff").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py" or ("\ndef " not in path.read_text() and "\nclass " not in path.read_text()):
            continue
        (out / "api").mkdir(exist_ok=True)
        (out / "api" / f"{name}.md").write_text(f"# `{name}`\n\n::: {name}\n", encoding="utf-8")
        entries.append({name.removeprefix("treediff."): f"api/{name}.md"})
    return entries


# --- notebooks -----------------------------------------------------------------------------------------------------
def executed(source: Path, preset: str, given: dict[str, str]) -> Path:
    """The notebook with its outputs: one of `treediff reproduce`, or executed here."""
    folder = (runs_root() / preset / "notebooks").resolve()
    names = [f"{source.stem}-ast", source.stem] if source.stem == "03_train" else [source.stem]
    for name in names:
        path = folder / f"{name}.ipynb"
        if path.exists() and path.stat().st_mtime >= source.stat().st_mtime:
            return path
    import papermill

    folder.mkdir(parents=True, exist_ok=True)
    log.info("executing %s", source.name)
    papermill.execute_notebook(
        str(source),
        str(folder / source.name),
        parameters={"preset": preset, **given},
        kernel_name=_kernel(),
        progress_bar=False,
        extra_arguments=QUIET,
    )
    return folder / source.name


def notebook_page(path: Path, name: str, out: Path) -> None:
    """An executed notebook as Markdown, its pictures beside it."""
    import nbformat
    from latex2mathml.converter import convert as mathml
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":  # the browser's own MathML: no script
            cell.source = MATH.sub(lambda m: mathml(m[1] or m[2], display="block" if m[1] else "inline"), cell.source)
        if "injected-parameters" in cell.metadata.get("tags", []):
            cell.source = cell.source.replace(str(ROOT), ".")
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
            if output.get("output_type") == "stream":
                output["text"] = ANSI.sub("", output["text"]).replace(str(runs_root().resolve()), "runs")
    body, resources = MarkdownExporter().from_notebook_node(
        notebook, resources={"output_files_dir": f"{name}_files", "unique_key": name}
    )
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, flags=re.S)
    body = body.replace(str(runs_root().resolve()), "runs").replace(str(ROOT), ".")
    folder = out / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in resources["outputs"].items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data)
    (folder / f"{name}.md").write_text(body, encoding="utf-8")


# --- links ---------------------------------------------------------------------------------------------------------
class Links(HTMLParser):
    """What a page links to, loads, and can be linked at."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag's addresses and its id."""
        found = {k: v or "" for k, v in attrs}
        self.ids |= {found[k] for k in ("id", "name") if k in found}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("img", "script", "iframe", "source") and "src" in found:
            self.loads.append(found["src"])
        elif tag == "link" and "href" in found and found.get("rel") not in ("canonical", "prev", "next"):
            self.loads.append(found["href"])


def broken_links(site: Path) -> list[str]:
    """Every address of the site's pages that leads nowhere, and everything that would be fetched from elsewhere."""
    pages: dict[Path, Links] = {}
    for path in site.rglob("*.html"):
        pages[path] = Links()
        pages[path].feed(path.read_text(encoding="utf-8"))
    wrong = []
    for path, found in pages.items():
        if path.name == "404.html":
            continue  # made for a server's root
        here = path.relative_to(site)
        wrong += [f"{here}: fetches {x}" for x in found.loads if urlsplit(x).scheme in ("http", "https")]
        for address in found.links + found.loads:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                wrong.append(f"{here}: {address} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids | {"__skip"}:
                wrong.append(f"{here}: {address}: no such place in it")
    return sorted(set(wrong))


def build(preset: str, given: dict[str, str]) -> Path:
    """Lay out the pages, build the site, check it; its first page. Exits with the list of what leads nowhere."""
    from mkdocs.commands.build import build as mkdocs_build
    from mkdocs.config import load_config

    out = BUILD / "docs"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out / "docs", ignore=shutil.ignore_patterns("site", "*.md"))
    (out / "assets").mkdir()
    shutil.copyfile(ROOT / "docs/site/iframe-worker.js", out / "assets/iframe-worker.js")
    docs = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md"))
    for path in (*PAGES, *docs):
        page(path, out)
    (out / "switches.md").write_text(switches_page(), encoding="utf-8")
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    for source in notebooks:
        notebook_page(executed(source, preset, given), source.stem, out)
    results = [x for x in docs if x.startswith("docs/results/")]
    nav = [
        {"Start": "index.md"},
        {"Notebooks": [f"notebooks/{p.stem}.md" for p in notebooks]},
        {"Documents": [x for x in docs if x not in results]},
        {"Results": results},
        {"Switches": "switches.md"},
        {"API": api_pages(out)},
        {"Project": [placed(x) for x in PAGES[1:]]},
    ]
    config = load_config(str(ROOT / "mkdocs.yml"), nav=nav, docs_dir=str(out), site_dir=str(BUILD / "site"))
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs_build(config)
    config.plugins.on_shutdown()
    if wrong := broken_links(BUILD / "site"):
        sys.exit("\n".join([*wrong, f"{len(wrong)} links lead nowhere."]))
    return BUILD / "site" / "index.html"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--execute", nargs="*", default=[], metavar="SWITCH=VALUE", help="for notebooks executed here")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("papermill", "mkdocs", "traitlets"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    given = {k: json.loads(v) if v[:1] in "{[0123456789-" else v for k, v in (x.split("=", 1) for x in args.execute)}
    print(build(args.preset, given))


if __name__ == "__main__":
    main()
