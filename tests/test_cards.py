"""Model and data cards: every figure is a file's, and what no file says is named as unknown."""

import json

import pytest
import yaml

from treediff import cards, cli, pipeline, usage
from treediff.config import resolve
from treediff.errors import UserError
from treediff.files import read_json, write_json

SHORT = {
    "rows": 40,
    "max_steps": 2,
    "micro_batch": 2,
    "accumulation": 1,
    "d_model": 32,
    "n_layers": 1,
    "mlp_hidden": 48,
}
SHORT |= {"eval_every": 0, "eval_rows": 4, "zero_stage": 0, "limit": 2, "lengths": [32]}
SHORT |= {"pretrain": {"rows": 60, "max_steps": 2, "micro_batch": 2}}


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A trained and scored run of a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TREEDIFF_RUNS", str(tmp_path_factory.mktemp("runs")))
        cfg = resolve("tiny", **SHORT)
        pipeline.scored(cfg, "tinycode", 32)
        yield cfg


def front(text):
    """The front matter of a card, as a hub reads it."""
    head, matter, body = text.split("---\n", 2)
    assert head == ""
    assert body.startswith("\n# ")
    return yaml.safe_load(matter)


def test_adapter_own_model_and_export_have_a_card(cfg, tmp_path):
    cli.main(
        ["export", str(tmp_path / "out"), "--preset", "tiny", "--masking", "ast"]
        + [x for k, v in SHORT.items() for x in (f"--{k}", json.dumps(v))]
    )
    paths = {
        "adapter": cfg.run_dir / "adapter",
        "model": cfg.with_masking("none").run_dir / "model",
        "export": tmp_path / "out",
    }
    for kind, folder in paths.items():
        text = (folder / "README.md").read_text()
        assert cards.KINDS[kind] in text
        assert ("library_name" in front(text)) == (kind == "adapter")
        about = read_json((cfg if kind != "model" else cfg.with_masking("none")).run_dir / "provenance.json")
        assert f"commit {about['commit'] or 'unknown'}" in text
        assert "- Backbone: made on the spot by this kit" in text
        assert "- `rows`: " in text
        assert "| train | 1 | 0 | " in text
        assert "[More Information Needed]" not in text  # PEFT's own template
    ledger = (tmp_path / "out" / "README.md").read_text()
    n = len(read_json(cfg.run_dir / "scores/tinycode-T32.json")["tasks"])
    assert f"- tinycode, T = 32: base 0/{n}, plus 0/{n}" in ledger
    assert "None were scored" in (paths["adapter"] / "README.md").read_text()


def test_the_card_says_what_a_failed_attempt_cost_and_what_is_unknown(cfg, tmp_path, monkeypatch):
    run = resolve("paper", backbone="someone/model", tokenizer="x", data=str(tmp_path / "rows.jsonl"))
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path))
    assert "Not known: no account was kept." in cards.model_card(run, "adapter")
    monkeypatch.setattr(usage.Meter, "joules", lambda _: {"gpus": 7.2e6})
    with pytest.raises(UserError), usage.attempt(run.run_dir, "train", 8):
        raise UserError("no")
    text = cards.model_card(run, "adapter")
    assert "| train | 1 | 1 | 0 | " in text
    assert "gpus 2 kWh" in text
    assert front(text)["base_model"] == "someone/model"
    assert "datasets" not in front(text)  # a file is none of the hub's
    assert "the backbone's licence, under which this stands" in text
    assert "the training data's licence and origin" in text
    write_json(run.run_dir / "provenance.json", {"commit": "abc", "changed_files": True})
    assert "commit abc, with changes that were not committed" in cards.model_card(run, "adapter")
    paper = cards.model_card(resolve("paper"), "adapter")
    assert front(paper)["datasets"] == ["nvidia/OpenCodeReasoning"]
    assert "licence: mit" in paper
    assert "licence: cc-by-4.0" in paper
    assert "paper's:\n\n- none\n" in paper


def test_a_prepared_set_has_a_card_of_its_own_figures(cfg):
    [path] = [
        p for p in cfg.preset_dir.glob("data/*/README.md") if read_json(p.with_name("stats.json"))["rows"]["kept"] == 40
    ]
    text, stats = path.read_text(), read_json(path.with_name("stats.json"))
    front(text)
    assert f"| kept | {stats['rows']['kept']:,} |" in text
    for why, n in stats["rows"]["dropped"].items():
        assert f"| dropped: {why} | {n:,} |" in text
    for label, n in stats["tokens"].items():
        assert f"| {label} | {n:,} |" in text
    assert stats["fingerprint"] in text
    assert "licence: apache-2.0" in text
    other = cards.data_card(cfg.but(data="someone/rows"), stats)
    assert "the rows' licence and origin" in other
    assert front(other)["source_datasets"] == ["someone/rows"]
