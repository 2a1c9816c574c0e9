"""Every command that README and the documents show is one: its switches are read and checked, its plan is made, its
target is there; and every internal link leads somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from treediff import cli, verify
from treediff.training import plan

ROOT = Path(__file__).parents[1]
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "docker/README.md"})


def commands() -> list[tuple[str, str]]:
    """(page, command): each line of a code block and each inline code that begins with a program of the kit."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # of earlier versions
            continue
        text = page.read_text(encoding="utf-8")
        lines = [x for block in re.findall(r"```\w*\n(.*?)```", text, re.S) for x in block.splitlines()]
        lines += [" ".join(x.split()) for x in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
        for line in lines:
            for part in re.split(r"\s#\s|&&|&$", line):
                if re.match(r"(treediff|make|papermill|python|sbatch) \S", part.strip()):
                    found.append((page.relative_to(ROOT).as_posix(), part.strip()))
    return sorted(set(found))


MODEL = str(ROOT / "tests/golden/llada/tiny/checkpoint")


def words(command: str) -> list[str]:
    """The words behind the program's name, with a value for what stands for one."""
    found = [{"FOLDER": MODEL, "N": "3"}.get(w, w) for w in shlex.split(command)[1:]]
    found = [w for w, before in zip(found, ["", *found], strict=False) if w != "..." or before[:2] == "--"]
    return [*found, "."] if found[-1:] == ["--publish"] else found  # named without its folder


COMMANDS = commands()


def test_there_are_some():
    assert len([c for _, c in COMMANDS if c.startswith("treediff")]) > 40


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("treediff")])
def test_a_command_of_treediff_is_understood_and_its_switches_are_right(page, command, runs):
    given = words(command)
    if given[0].isupper() or "|" in command or page == "docs/rules.md":  # a form; a rule that the page adds
        return
    argv = cli.underscored(given)
    if given == ["annotate"] or given == ["export"]:  # named without the file that they need
        return
    preset = argv[argv.index("--preset") + 1] if "--preset" in argv else None
    args, extra = cli.parser(given[0], preset).parse_known_args(argv)
    cfg = cli.switches(args, extra)
    if given[0] == "train":
        assert plan.plan(cfg)["steps"] > 0


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("sbatch ")])
def test_a_batch_script_is_there_and_takes_the_switches(page, command):
    given = shlex.split(command)
    at = next(i for i, word in enumerate(given) if word.startswith("slurm/"))
    script = ROOT / given[at]
    assert script.is_file()
    assert all(word.startswith("--") and "=" in word for word in given[1:at])
    behind = given[at + 1 :][2 if script.stem == "score" else 0 :]
    args, extra = cli.parser(script.stem, "paper").parse_known_args([script.stem, *cli.underscored(behind)])
    cfg = cli.switches(args, extra)
    if script.stem == "train":  # what the script adds
        nodes = int(next((w.partition("=")[2] for w in given[:at] if w.startswith("--nodes=")), 1))
        assert cfg.but(processes=8 * nodes, nodes=nodes, master_port=1).rows_per_step == 128


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if c[1].startswith("make ")])
def test_a_target_of_make_is_there(page, command):
    target = [w for w in words(command) if "=" not in w and w.isidentifier()]
    done = subprocess.run(["make", "-n", "-o", "venv", *target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{page}: {done.stderr}"


@pytest.mark.parametrize(("page", "command"), [c for c in COMMANDS if re.match("papermill|python", c[1])])
def test_a_notebook_a_script_a_test_is_there(page, command):
    files = [w for w in words(command) if w.endswith((".py", ".ipynb")) and "/" in w and not w.startswith("/")]
    assert all((ROOT / f).is_file() for f in files), page


def anchors(text: str) -> set[str]:
    heads = re.findall(r"(?m)^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S))
    return {re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower()).replace(" ", "-") for h in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_internal_link_leads_somewhere(page):
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        path, _, anchor = target.partition("#")
        at = (page.parent / path).resolve() if path else page
        if ":" in target:
            continue
        if not at.exists() or (anchor and at.suffix == ".md" and anchor not in anchors(at.read_text(encoding="utf-8"))):
            wrong.append(target)
    assert not wrong


def test_the_commands_of_the_claims_are_those_of_their_page():
    text = (ROOT / "docs/claims.md").read_text(encoding="utf-8")
    assert all(f"\n{c.command}\n" in text for c in verify.load())
