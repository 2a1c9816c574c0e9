"""Published evaluations: what their records fix, what the report says of them, and what it refuses to mix."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_report import quick  # noqa: F401 (a fixture)
from test_sampling_run import tiny_tokenizer

from treediff import pipeline
from treediff.config import SWITCHES, resolve
from treediff.data import benchmarks
from treediff.errors import UserError
from treediff.files import read_json, read_jsonl
from treediff.masking import tokens
from treediff.model import checkpoint, llada
from treediff.protocols import OURS, PROTOCOLS, markdown
from treediff.report import comparisons, paper, report
from treediff.runs import open_run
from treediff.sampling.prompts import RESPONSE
from treediff.sampling.run import _SETTINGS, samples_path
from treediff.training import launch

ROOT = Path(__file__).resolve().parents[1]


def test_the_page_is_written_from_the_records():
    assert (ROOT / "docs/protocols.md").read_text(encoding="utf-8") == markdown()
    done = subprocess.run([sys.executable, "-m", "treediff.protocols"], capture_output=True, text=True, check=True)
    assert done.stdout == markdown()


def test_a_protocol_fixes_every_switch_that_a_sample_s_outcome_hangs_on():
    """But the run's own: seed, arithmetic, another model; and `early_exit`, which changes no answer."""
    free = {"seed", "precision", "model", "early_exit"}
    assert set(OURS) == set(_SETTINGS) - free | {"lengths", "verdicts"}
    assert all(SWITCHES[name].default == value for name, value in OURS.items())
    for p in PROTOCOLS.values():
        assert {*p.stated, *(n for of in p.by_benchmark.values() for n in of)} <= set(OURS)


def test_the_paper_s_published_rates_are_those_of_its_tables():
    titles = {"LLaDA-8B-Instruct": "none", "with random masking": "random", "with AST masking (TreeDiff)": "ast"}
    for r in PROTOCOLS["treediff"].published:
        benchmark = next(b for b, names in paper.HALVES.items() if r.benchmark in names)
        length = int(r.where.split(",")[0].removeprefix("T = "))
        pair = paper.PAPER[titles[r.model]][benchmark][length]
        assert r.rate == pair[paper.HALVES[benchmark].index(r.benchmark)]


def test_the_other_published_rates_are_those_of_the_collected_facts(shared):
    text = (shared / "FIELD.md").read_text(encoding="utf-8")
    for p in PROTOCOLS.values():
        assert p.name == "treediff" or all(str(r.rate) in text for r in p.published), p.name


def test_evalplus_s_chat_mode_is_that_of_the_installed_evalplus():
    from evalplus import codegen
    from evalplus.provider.base import DecoderBase

    length = inspect.signature(DecoderBase.__init__).parameters["max_new_tokens"].default
    assert PROTOCOLS["evalplus_chat"].switches("mbpp")["lengths"] == [length]
    assert f'"{RESPONSE}"' in inspect.getsource(codegen)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_sets_its_switches_for_each_benchmark(name):
    cfg = resolve("paper", protocol=name)
    for benchmark in cfg.benchmarks:
        of = cfg.of(benchmark)
        assert {n: getattr(of, n) for n in OURS} == PROTOCOLS[name].switches(benchmark)
        assert of.run_dir == cfg.run_dir
    assert cfg.jobs == [(b, t) for b in cfg.benchmarks for t in PROTOCOLS[name].switches(b)["lengths"]]
    assert resolve(**cfg.as_dict()) == cfg  # as a child process is told


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        ({"block_length": 32}, "block_length: protocol llada has 512 or 256, not 32"),
        ({"lengths": "128", "block_length": 512}, "block_length: must divide"),
        ({"threshold": 0.9}, "threshold: protocol llada has 0.0, not 0.9"),
        ({"benchmarks": "mbpp", "lengths": 512}, r"lengths: protocol llada has \[256\], not \[512\]"),
        ({"benchmarks": "mbpp", "eos_suppression": "logits"}, "eos_suppression: protocol llada has confidence, not lo"),
        ({"benchmarks": "tinycode"}, "benchmarks: protocol llada is for humaneval, mbpp, not tinycode"),
        ({"decoding": "mine"}, "decoding: a protocol names its switches itself"),
        ({"protocol": "lada"}, "protocol: 'lada' should be 'none', 'treediff'"),
        ({"protocol": "none", "decoding": "llada"}, "decoding: llada is a protocol; give --protocol llada"),
    ],
)
def test_other_values_are_refused(switches, said):
    with pytest.raises(UserError, match=said):
        resolve("paper", **{"protocol": "llada", **switches})


@pytest.fixture
def run(runs, shared, tmp_path):
    """A backbone of random weights that is asked one problem of each benchmark under LLaDA's own protocol."""
    found = {}
    for benchmark, name in (("humaneval", "HumanEvalPlus-v0.1.10"), ("mbpp", "MbppPlus-v0.2.0")):
        path = tmp_path / f"{benchmark}.jsonl"
        path.write_bytes(benchmarks.unpack(shared / f"data/benchmarks/{name}.jsonl.gz").splitlines(keepends=True)[0])
        found[benchmark] = str(path)
    tiny_tokenizer(tmp_path / "tok")
    cfg = resolve("paper", masking="none", protocol="llada", benchmark_files=found, precision="fp32")
    cfg = cfg.but(
        tokenizer=str(tmp_path / "tok"), backbone="pretrain", d_model=16, n_layers=1, n_heads=2, mlp_hidden=16
    )
    tok = tokens.load_tokenizer(str(tmp_path / "tok"))
    open_run(cfg, *launch.TRAINING_STAGES)
    net = llada.new_backbone(cfg, len(tok), tok.eos_token_id, tok.mask_token_id)
    checkpoint.save_backbone(net, cfg.run_dir / "model")
    return cfg


def test_a_protocol_from_sampling_to_the_report(run, quick):  # noqa: F811
    for job in run.jobs:
        pipeline.scored(run, *job)
    paths = sorted(p.name for p in (run.run_dir / "scores").glob("*.json"))
    assert paths == ["humaneval-T512-llada.json", "mbpp-T256-llada.json"]
    for benchmark, length in run.jobs:
        made = next(iter(read_jsonl(samples_path(run, benchmark, length))))["settings"]
        assert made["protocol"] == "llada"
        assert not PROTOCOLS["llada"].differences(benchmark, made)
        assert PROTOCOLS["treediff"].differences(benchmark, made)
        ledger = read_json(run.run_dir / "scores" / f"{run.named(f'{benchmark}-T{length}')}.json")
        assert ledger["settings"]["protocol"] == "llada"

    page = report.write(run)
    text = page.read_text()
    assert page.parent.name == "report-llada"
    assert "protocol llada" in text.partition("</header>")[0]
    assert "Published under llada, by others" in text
    assert "<td>49.4</td>" in text
    assert "Table 1, ours; protocol llada" in text
    assert not [r for r in read_json(page.parent / "table1.json") if "paper" in r]

    # Others of the same run stand beside it, and are of no protocol as long as their switches are none's.
    plain = resolve(**{**run.as_dict(), **OURS, "protocol": "none", "lengths": [32]})
    pipeline.scored(plain, "humaneval", 32)
    assert {r["decoding"] for r in comparisons.decodings(run)} == {"", "llada"}
    found = comparisons.ledgers(plain)
    assert report.protocol(plain, found) == (
        "no named protocol",
        "These are rates of no named protocol (docs/protocols.md).",
    )


def test_samples_that_were_made_otherwise_are_refused(run):
    pipeline.scored(run, "mbpp", 256)
    path = samples_path(run, "mbpp", 256)
    ledger = run.run_dir / "scores" / f"{path.stem}.json"
    kept = read_json(ledger)
    del kept["settings"]["samples_sha256"]
    ledger.write_text(json.dumps(kept))
    path.write_text(path.read_text().replace('"block_length": 256', '"block_length": 32'))
    with pytest.raises(
        UserError, match=f"{path}: sampled with block_length = 32, where protocol llada has 256; it can"
    ):
        report.write(run)


def test_a_report_without_a_protocol_names_the_one_that_its_samples_agree_with(run):
    cfg = resolve(**{**run.as_dict(), **OURS, "protocol": "none", "lengths": [256], "benchmarks": ["mbpp"]})
    pipeline.scored(cfg, "mbpp", 256)
    under, said = report.protocol(cfg, comparisons.ledgers(cfg))
    assert under == "as under treediff, open_dllm"
    assert said.startswith("No protocol was named")
