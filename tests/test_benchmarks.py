"""The sampling benchmarks run, at their smallest, and their records add up."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(name: str, *args: str) -> str:
    command = [sys.executable, str(FOLDER / name), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_gpu_sample_at_the_tiny_scale(tmp_path):
    out = tmp_path / "r.json"
    args = ("--scale", "tiny", "--lengths", "32", "--batches", "1", "2", "--block", "8", "--blocks", "1")
    run("gpu_sample.py", *args, "--out", str(out))
    found = json.loads(out.read_text())
    assert found["versions"]["torch"]
    assert found["rates"]["flop_per_s"] > 0
    assert len(found["records"]) == 2 * 8
    for r in found["records"]:
        assert r["floor_ms"] == max(r["compute_ms"], r["memory_ms"]) > 0
        assert r["ratio"] == pytest.approx(r["ms_per_step"] / r["floor_ms"])
    exact, dual = (next(r for r in found["records"] if r["mode"] == m) for m in ("exact", "dual cache"))
    assert dual["tflop"] < exact["tflop"]


def test_infilling_and_ordinary_sampling_are_timed_in_turn(tmp_path):
    out = tmp_path / "r.json"
    sizes = ("--d_model", "32", "--n_layers", "1", "--length", "8", "--block", "8", "--known", "8", "--rounds", "2")
    run("infill.py", *sizes, "--batch", "2", "--out", str(out))
    records = json.loads(out.read_text())["records"]
    assert {r["mode"] for r in records} >= {"exact", "prefix cache", "dual cache", "threshold"}
    assert all(len(r["ratios"]) == 2 and r["ratio_cpu"] > 0 for r in records)


def test_sampling_agrees_with_the_literal_loop(tmp_path):
    out = tmp_path / "r.json"
    sizes = ("--d_model", "32", "--n_layers", "1", "--length", "32", "--prompt", "8", "--rounds", "1")
    run("sampling.py", *sizes, "--out", str(out))
    records = {r["mode"]: r for r in json.loads(out.read_text())["records"]}
    assert records["literal"]["same_answers"] == 1
    assert records["literal"]["forwards"] == records["exact"]["forwards"] == 32


def test_the_published_page_is_what_the_script_makes_of_the_figures(tmp_path):
    results = FOLDER.parent / "docs" / "results"
    run("gpu.py", "--publish", str(results), "--out", str(tmp_path))
    for name in ("gpu.json", "gpu.md"):
        assert (tmp_path / name).read_text() == (results / name).read_text()
