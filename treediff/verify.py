"""Runs the claims of docs/claims.toml and says which held: `treediff verify NAME ... --quick`.

    results = [verify(claim) for claim in load()]          # held, failed, or needs what is not here

A claim is a sentence of the documents with the command that checks it, what it needs, the minutes it takes and what its
output must say. `--record` keeps the results in docs/results/claims.json and writes docs/claims.md from them. Needs the
project's folder: an installed package has no documents.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from treediff.config import known, runs_root
from treediff.errors import UserError
from treediff.files import read_json, whole, write_json
from treediff.runs import provenance

PROJECT = Path(__file__).resolve().parents[1]
QUICK = 1.0
"""Minutes that a claim may take under --quick."""
NEEDS = {
    "gpu": "a CUDA GPU",
    "hub": "the model hub",
    "oracles": "public benchmark files (make oracles FROM=FOLDER)",
    "browser": "Chromium and chromedriver",
    "languages": "the grammars of all languages",
}
"""What a claim may need, beside files by their path from the project's folder."""


class Claim(BaseModel):
    """One claim. Without `reads`, it holds if its command ends with exit code 0; with it, the last match's first group
    must be `expected` (a number within `tolerance`), or `at_least`, or `at_most`, too."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern="^[a-z0-9-]+$")
    says: str
    where: list[str] = Field(min_length=1)
    command: str
    minutes: float = Field(gt=0)
    hardware: str = "2 CPU cores"
    needs: list[str] = []
    reads: str = ""
    expected: float | str | None = None
    tolerance: float = Field(0.0, ge=0)
    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> Claim:
        bounds = [x for x in (self.expected, self.at_least, self.at_most) if x is not None]
        if bool(self.reads) != (len(bounds) == 1):
            raise ValueError("`reads` goes with one of expected, at_least and at_most")
        return self

    def bound(self) -> str:
        """What the output must say, in words."""
        if self.at_least is not None:
            return f"at least {self.at_least:g}"
        if self.at_most is not None:
            return f"at most {self.at_most:g}"
        if isinstance(self.expected, float):
            return f"{self.expected:g}" + (f" ± {self.tolerance:g}" if self.tolerance else "")
        return self.expected or "ends without an error"

    def holds(self, found: str) -> bool:
        """Whether what was read is what was claimed."""
        if isinstance(self.expected, str):
            return found == self.expected
        try:
            value = float(found.replace(",", ""))
        except ValueError:
            return False
        if self.at_least is not None:
            return value >= self.at_least
        if self.at_most is not None:
            return value <= self.at_most
        return abs(value - float(self.expected or 0.0)) <= self.tolerance


def load(path: Path | None = None) -> list[Claim]:
    """The claims of docs/claims.toml, in its order. Raises UserError naming the claim that is not one."""
    path = path or PROJECT / "docs" / "claims.toml"
    try:
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["claim"]
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; run this in a checkout of the project.") from None
    except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not a list of claims ({e}); mend it.") from None
    claims: dict[str, Claim] = {}
    for number, row in enumerate(rows, 1):
        name = row.get("name", f"number {number}")
        try:
            claim = Claim(**row)
        except ValidationError as e:
            first = e.errors()[0]
            said = ".".join(map(str, first["loc"])) or "reads"
            raise UserError(f"{path}: claim {name}: {said}: {first['msg']}.") from None
        if name in claims:
            raise UserError(f"{path}: claim {name} is there twice; rename one.")
        claims[name] = claim
    return list(claims.values())


def chosen(claims: list[Claim], names: list[str], quick: bool = False) -> list[Claim]:
    """The claims of these names (all without any), or those of a minute or less. Raises UserError for a wrong name."""
    for name in names:
        known(name, [c.name for c in claims], "there is no such claim")
    return [c for c in claims if (not names or c.name in names) and (not quick or c.minutes <= QUICK)]


def lacks(claim: Claim) -> str:
    """What the claim needs and is not here, in words; nothing if all is."""
    return "; ".join(NEEDS.get(need, need) for need in claim.needs if not _is_here(need))


def _is_here(need: str) -> bool:
    if need == "gpu":
        import torch

        return torch.cuda.is_available()
    if need == "hub":
        from treediff.doctor import reached

        return not os.environ.get("HF_HUB_OFFLINE") and not reached("https://huggingface.co")
    if need == "oracles":
        places = (os.environ.get("TREEDIFF_ORACLES"), PROJECT / ".oracles", PROJECT.parent / "shared")
        return any(place and Path(place).is_dir() for place in places)
    if need == "browser":
        return bool(shutil.which("chromium") and shutil.which("chromedriver"))
    if need == "languages":
        from treediff.masking.languages import LANGUAGES

        return all(importlib.util.find_spec(table.grammar) for table in LANGUAGES.values())
    return (PROJECT / need).exists()


def argv(command: str) -> list[str]:
    """A command's words; python and treediff are those of this environment, whatever PATH says."""
    words = shlex.split(command)
    own = {"python": [sys.executable], "treediff": [sys.executable, "-m", "treediff.cli"]}
    return [*own.get(words[0], words[:1]), *words[1:]]


def verify(claim: Claim) -> dict[str, Any]:
    """Run one claim's command in the project's folder: name, state (held, failed, needs), found, why, seconds.

    What it prints is kept in runs/verify/<name>.log. It is stopped after ten times its minutes.
    """
    if why := lacks(claim):
        return {"name": claim.name, "state": "needs", "found": None, "why": why, "seconds": 0.0}
    path = (runs_root() / "verify" / f"{claim.name}.log").resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    environment |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}
    started, code = time.monotonic(), None
    with path.open("wb") as log:
        process = subprocess.Popen(
            argv(claim.command),
            cwd=PROJECT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(600 * claim.minutes)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = round(time.monotonic() - started, 1)
    said = path.read_text(encoding="utf-8", errors="replace")
    last = next((x.strip() for x in reversed(said.splitlines()) if x.strip()), "it printed nothing")
    matches = re.findall(claim.reads, said) if claim.reads else []
    found = matches[-1] if matches else None
    if code is None:
        why = f"did not end within {10 * claim.minutes:g} minutes"
    elif code:
        why = f"exit code {code}: {last[:300]}"
    elif claim.reads and found is None:
        why = f"its output does not say {claim.reads!r}"
    elif found is not None and not claim.holds(found):
        why = f"{found}, not {claim.bound()}"
    else:
        why = ""
    return {
        "name": claim.name,
        "state": "failed" if why else "held",
        "found": found,
        "why": why,
        "seconds": seconds,
    }


def line(claim: Claim, result: dict[str, Any]) -> str:
    """One result to read."""
    if result["state"] == "held":
        said = f"{result['found']} (claimed: {claim.bound()})" if result["found"] else claim.bound()
        said += f", {result['seconds']:.0f} s"
    else:
        said = result["why"]
    return f"{result['state']:<6} {claim.name}: {said}"


# --- the record and its page ---------------------------------------------------------------------------------------
_FROM = ("time", "commit", "changed_files", "python", "machine")


def record(results: list[dict[str, Any]], folder: Path | None = None) -> Path:
    """Keep results in docs/results/claims.json, each with where it comes from, and write docs/claims.md; its path.

    A result that needs what is not here does not take the place of one that was checked elsewhere.
    """
    docs = folder or PROJECT / "docs"
    path, facts = docs / "results" / "claims.json", provenance()
    kept = {r["name"]: r for r in read_json(path)} if path.exists() else {}
    for result in results:
        if result["state"] != "needs" or result["name"] not in kept:
            kept[result["name"]] = result | {
                k: facts[k] for k in ("time", "commit", "changed_files", "python", "machine")
            }
    claims = load(docs / "claims.toml")
    in_order = [kept[c.name] for c in claims if c.name in kept]
    write_json(path, in_order)
    with whole(docs / "claims.md") as temporary:
        temporary.write_text(page(claims, in_order), encoding="utf-8")
    return docs / "claims.md"


def page(claims: list[Claim], results: list[dict[str, Any]]) -> str:
    """docs/claims.md: every claim with its command and what it was found to be."""
    by_name = {r["name"]: r for r in results}
    plain = [c for c in claims if not c.needs]
    minutes = sum(c.minutes for c in plain)
    out = [
        "# The claims, and how to check each",
        "",
        "Written by `treediff verify --record` from [claims.toml](claims.toml) and "
        "[results/claims.json](results/claims.json); do not edit. `treediff verify` checks all, `treediff verify NAME` "
        f"one, `treediff verify --quick` those of a minute or less. {len(plain)} of the {len(claims)} can be checked "
        f"on any machine with the kit's packages: no GPU, no data, no network ({minutes:.0f} minutes on 2 cores).",
        "",
        "| Claim | Expected | Found | Needs | Minutes | Checked |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for c in claims:
        r = by_name.get(c.name)
        needs = ", ".join(f"`{n}`" if "/" in n else NEEDS.get(n, n) for n in c.needs) or "nothing"
        found = "not checked yet" if not r else r["state"] if not r["found"] else f"{r['state']}: {r['found']}"
        if r and r["state"] == "needs":
            found = "not checked: what it needs was not there"
        when = f"{r['time'][:10]}, `{(r['commit'] or 'no checkout')[:10]}`" if r and r["state"] != "needs" else ""
        out.append(f"| [{c.name}](#{c.name}) | {c.bound()} | {found} | {needs} | {c.minutes:g} | {when} |")
    for c in claims:
        where = ", ".join(f"[{w}]({os.path.relpath(w, 'docs')})" for w in c.where)
        reads = f" Read from its output: `{c.reads}`." if c.reads else ""
        out += ["", f"## {c.name}", "", f"{c.says} ({where}; {c.hardware}.)", ""]
        out += ["```", c.command, "```", "", f"Expected: {c.bound()}.{reads}"]
        if (r := by_name.get(c.name)) and r["state"] != "needs":
            machine = f"{r['machine']['cores']} cores" + "".join(f", {g}" for g in r["machine"]["gpus"])
            changed = ", with changed files" if r["changed_files"] else ""
            out += ["", f"{r['state'].capitalize()}{': ' + r['why'] if r['why'] else ''}, in {r['seconds']:.0f} s on "]
            out[-1] += f"{machine}, Python {r['python']}, commit `{(r['commit'] or 'none')[:10]}`{changed}."
    return "\n".join([*out, ""])


def plan(claims: list[Claim]) -> str:
    """What each claim takes and lacks here, to read."""
    width = max((len(c.name) for c in claims), default=0)
    lines = [
        f"{c.name:<{width}}  {c.minutes:5g} min  {f'needs {why}' if (why := lacks(c)) else 'can be checked here'}"
        for c in claims
    ]
    here = [c for c in claims if not lacks(c)]
    return "\n".join([*lines, f"{len(here)} of {len(claims)} here, {sum(c.minutes for c in here):.0f} minutes"])
