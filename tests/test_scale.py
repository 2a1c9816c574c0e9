"""docs/scale.md: written from the plan, and its arithmetic holds."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks/scale.py")
scale = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(scale)


def test_the_page_is_written_from_the_plan():
    assert (ROOT / "docs/scale.md").read_text(encoding="utf-8") == scale.page()


@pytest.mark.parametrize("gpus", scale.GPUS)
def test_every_layout_keeps_the_rows_of_an_update_and_uses_all_gpus(gpus):
    runs, cfg = scale.layout(gpus)
    assert cfg.rows_per_step == 128
    assert runs * cfg.processes == gpus
    assert cfg.processes <= cfg.nodes * scale.NODE


def test_the_network_s_share_by_hand():
    """Eight GPUs, 16 micro-batches and the weights: 17 x 7/8 x 335.5 MB at 50 GB/s, of 15.3 h / 3,516."""
    _, cfg = scale.layout(8)
    by_hand = 17 * 7 / 8 * 335.544e6 / 50e9 / (15.3 * 3600 / 3516)
    assert scale.network_share(cfg, 15.3) == pytest.approx(by_hand, rel=1e-4)
