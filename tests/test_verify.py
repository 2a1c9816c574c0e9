"""treediff verify: a claim is held, failed, or needs what is not here; the page is written from the record."""

import json
import os
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

import pytest

from treediff import cli, verify
from treediff.errors import UserError

ROOT = Path(__file__).parents[1]
CLAIMS = verify.load()


def claim(**changes):
    facts = {"name": "a", "says": "s", "where": ["README.md"], "command": "true", "minutes": 0.1}
    return verify.Claim(**(facts | changes))


def saying(text, **changes):
    return claim(command=f"python -c \"print('{text}')\"", **changes)


@pytest.mark.parametrize(
    ("text", "bound", "state"),
    [
        ("ratio 250.5 x", {"at_least": 50}, "held"),
        ("ratio 49.9 x", {"at_least": 50}, "failed"),
        ("ratio 1,250 x", {"at_least": 1000}, "held"),
        ("ratio 1.2 x", {"at_most": 1}, "failed"),
        ("ratio 2.05 x", {"expected": 2.0, "tolerance": 0.1}, "held"),
        ("ratio 2.05 x", {"expected": 2.0}, "failed"),
        ("ratio 1 x, ratio 9 x", {"expected": 9.0}, "held"),
        ("ratio high x", {"at_least": 0}, "failed"),
        ("nothing", {"at_least": 0}, "failed"),
    ],
)
def test_what_is_read_is_held_against_what_is_claimed(runs, text, bound, state):
    found = verify.verify(saying(text, reads=r"ratio (\S+) x", **bound))
    assert found["state"] == state
    assert bool(found["why"]) == (state == "failed")


def test_a_command_that_fails_is_a_failed_claim_whatever_it_printed(runs):
    command = "python -c \"print('9 passed'); raise SystemExit(3)\""
    found = verify.verify(claim(command=command, reads=r"(\d+) passed", at_least=1))
    assert (found["state"], found["why"].startswith("exit code 3")) == ("failed", True)


def test_what_is_not_here_is_told_and_nothing_runs(runs, tmp_path):
    mark = tmp_path / "ran"
    found = verify.verify(claim(command=f"touch {mark}", needs=["docs/nowhere.json"]))
    assert (found["state"], found["why"]) == ("needs", "docs/nowhere.json")
    assert not mark.exists()


def test_a_claim_that_takes_ten_times_too_long_is_stopped_with_all_it_started(runs):
    begun = time.monotonic()
    asleep = f"98.{os.getpid()}"  # no other process sleeps for so long
    sleeper = f"python -c \"import subprocess; subprocess.run(['sleep', '{asleep}'])\""
    found = verify.verify(claim(command=sleeper, minutes=0.002))
    assert found["state"] == "failed"
    assert time.monotonic() - begun < 30
    while any(f"sleep\x00{asleep}" in told(p) for p in Path("/proc").glob("[0-9]*/cmdline")):
        assert time.monotonic() - begun < 40  # a process that was killed takes a moment to be gone
        time.sleep(0.05)


def told(path):
    """A process's command line; nothing if it ended meanwhile."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"minutes": 0}, "claim a: minutes"),
        ({"hard": 1}, "claim a: hard"),
        ({"reads": "(x)"}, "goes with one of"),
        ({"at_least": 3}, "goes with one of"),
    ],
)
def test_a_claim_that_is_none_is_named(tmp_path, row, said):
    facts = {"name": "a", "says": "s", "where": ["README.md"], "command": "true", "minutes": 1} | row
    path = tmp_path / "claims.toml"
    path.write_text("[[claim]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in facts.items()))
    with pytest.raises(UserError, match=said):
        verify.load(path)


def test_a_misspelt_name_gives_the_nearest():
    with pytest.raises(UserError, match="did you mean logits"):
        verify.chosen(CLAIMS, ["logit"])


def test_the_command_prints_one_line_a_claim_and_counts(runs, capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        cli.main(["verify", "files"])
    assert capsys.readouterr().out.splitlines()[-1] == "1 held, 0 failed, 0 need what is not here"
    cli.main(["verify", "--quick", "--plan"])
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 1 + sum(c.minutes <= 1 for c in CLAIMS)


def test_the_record_keeps_what_was_checked_elsewhere(tmp_path, runs):
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "docs/claims.toml", tmp_path)
    held = {"name": "gpu", "state": "held", "found": "9", "why": "", "seconds": 1.0}
    verify.record([held], tmp_path)
    verify.record([{**held, "state": "needs", "found": None, "why": "a CUDA GPU"}], tmp_path)
    (kept,) = json.loads((tmp_path / "results/claims.json").read_text())
    assert (kept["state"], kept["found"]) == ("held", "9")
    assert "held: 9" in (tmp_path / "claims.md").read_text()


def test_docs_claims_is_the_record_s_page():
    """Written by `treediff verify --record`, never by hand."""
    found = json.loads((ROOT / "docs/results/claims.json").read_text())
    assert (ROOT / "docs/claims.md").read_text() == verify.page(CLAIMS, found)


@pytest.mark.parametrize("c", CLAIMS, ids=lambda c: c.name)
def test_claims_name_what_exists(c):
    assert all((ROOT / path).is_file() for path in c.where if "results/" not in path or not c.needs)
    words = verify.argv(c.command)
    files = [w for w in words if w.endswith(".py")]
    assert all((ROOT / f).is_file() for f in files)
    assert all(need in verify.NEEDS or "/" in need for need in c.needs)
    if "-k" in words:  # the tests that it selects are there
        said = words[words.index("-k") + 1]
        names = [w for w in said.split() if w not in ("or", "and", "not")]
        tests = "".join((ROOT / f).read_text() for f in files)
        assert all(name in tests for name in names), said


def test_sums_hold_and_leave_nothing_out():
    """`make sums` after a golden file or a published result has changed."""
    lines = (ROOT / "docs/SHA256SUMS").read_text().splitlines()
    kept = ["tests/golden", "tests/sources", "docs/results/*.json", "docs/results/*.gz"]
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *kept], capture_output=True, text=True, check=True).stdout
    assert sorted(line.split("  ")[1] for line in lines) == sorted(
        p for p in listed.split() if p != "docs/results/claims.json"
    )
    done = subprocess.run(["sha256sum", "--check", "--quiet", "docs/SHA256SUMS"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_most_claims_need_nothing_that_a_plain_machine_lacks():
    rows = tomllib.loads((ROOT / "docs/claims.toml").read_text())["claim"]
    plain = [r for r in rows if not r.get("needs")]
    assert len(plain) > len(rows) / 2
