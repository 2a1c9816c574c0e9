"""What docs/results says of studies and of infilling is what the raw results beside it say."""

import gzip
import shutil
from pathlib import Path

import pytest

from treediff.config import resolve
from treediff.files import whole
from treediff.report import infill, study

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PUBLISHED = sorted(RESULTS.glob("study-*.json.gz"))


def test_the_study_s_page_follows_from_its_raw_results(tmp_path, runs):
    if not PUBLISHED:
        pytest.skip("no study is published yet (treediff study --publish docs/results)")
    for path in PUBLISHED:
        shutil.copy(path, tmp_path)
    preset = PUBLISHED[0].name.removeprefix("study-").removesuffix(".json.gz")
    cfg = resolve(preset)
    with whole(cfg.preset_dir / "study" / "results.json") as temporary:
        temporary.write_bytes(gzip.decompress(PUBLISHED[0].read_bytes()))
    again = study.publish(cfg, tmp_path)
    assert again.read_text(encoding="utf-8") == (RESULTS / "study.md").read_text(encoding="utf-8")


def test_the_page_on_infilling_follows_from_its_raw_results(tmp_path, runs):
    raw = sorted(RESULTS.glob("infill-*.json.gz"))
    if not raw:
        pytest.skip("no infilling is published yet (treediff infill --publish docs/results)")
    for path in raw:
        shutil.copy(path, tmp_path)
    again = infill.publish(resolve("tiny"), tmp_path)
    assert again.read_text(encoding="utf-8") == (RESULTS / "infill.md").read_text(encoding="utf-8")
