"""Planted copies of benchmark problems are found, whatever was done to them; what only resembles them is not."""

import ast
import gzip
import io
import json
import keyword
import re
import tokenize
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks, contamination, examples, prepare, sources, tinycode
from treediff.errors import UserError
from treediff.files import read_jsonl
from treediff.masking import tokens

PROMPT = '''def longest_rise(heights: list[int]) -> int:
    """ Given the heights of neighbouring stones, return the length of the longest stretch in which every stone
    is higher than the one before it. A stretch of one stone counts as one.
    >>> longest_rise([1, 2, 1])
    2
    """
'''
BODY = """    best = run = 0
    previous = None
    for height in heights:
        if previous is not None and height > previous:
            run += 1
        else:
            run = 1
        best = max(best, run)
        previous = height
    return best
"""
OTHER = '''def total_rise(heights):
    """ Given the heights of stones, return the sum of all the climbs from a stone to the next one. """
    climbed = 0
    for before, after in zip(heights, heights[1:]):
        climbed += max(0, after - before)
    return climbed
'''
PROBLEMS = {
    "Mine/0": {"prompt": PROMPT, "canonical_solution": BODY},
    "Mine/1": {"prompt": OTHER[:140], "canonical_solution": OTHER[140:]},
}
SAID = contamination.docstring(PROMPT)


@pytest.fixture(scope="module")
def mine():
    return contamination.Index(PROBLEMS)


def renamed(code: str) -> str:
    """Every name that the program makes up replaced by another one."""
    names: dict[str, str] = {}
    out = []
    tokens_ = list(tokenize.generate_tokens(io.StringIO(code).readline))
    for before, t in zip([None, *tokens_], tokens_, strict=False):
        text = t.string
        own = t.type == tokenize.NAME and text not in contamination._KNOWN and not (before and before.string == ".")
        if own and not keyword.iskeyword(text):
            text = names.setdefault(text, f"some_{len(names)}_thing")
        out.append((t.type, text))
    return tokenize.untokenize(out)


def reformatted(code: str) -> str:
    """Without comments and docstrings, laid out as Python's own unparser does it, with other quotes and grouping."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    text = ast.unparse(tree).replace("'", '"')
    return re.sub(r"return (.+)", r"return (\n        \1  # the result\n    )", text)


@pytest.mark.parametrize("change", [str, renamed, reformatted, lambda c: reformatted(renamed(c))])
@pytest.mark.parametrize(
    "around", ["{}", "import sys\n\ndef helper(x):\n    return x + 1\n\n\n{}\n\nprint(helper(2))\n"]
)
def test_planted_programs_are_found(mine, change, around):
    near = mine.compare("Nothing of the kind.", around.format(change(PROMPT + BODY)))
    assert near.task == "Mine/0"
    assert near.code == 1
    assert "code" in near.by


@pytest.mark.parametrize(
    "change",
    [
        str,
        str.upper,
        lambda t: t.replace(" ", "\n   "),
        lambda t: t.replace(",", " -"),
        lambda t: f"Task: {t}\nUse Python.",
    ],
)
def test_planted_texts_are_found(mine, change):
    near = mine.compare(change(SAID), "x = 1")
    assert near.task == "Mine/0"
    assert near.text >= 0.9
    assert "text" in near.by


def test_a_rearranged_copy_is_found_by_minhash(mine):
    lines = [x for x in SAID.replace("\n", " ").split(".") if x.strip()]
    code = BODY.replace("    best = run = 0\n    previous = None\n", "    previous = None\n    best = run = 0\n")
    near = mine.compare(".".join(reversed(lines)), PROMPT + code)
    assert near.minhash >= contamination.FLAG["minhash"]
    assert near.task == "Mine/0"


def test_the_nearest_problem_and_what_only_resembles_one(mine):
    assert mine.compare("", OTHER).task == "Mine/1"
    other = BODY.replace("height > previous", "height < previous - 3").replace(
        "best = max(best, run)", "best += run * 2"
    )
    near = mine.compare(
        "Given a list of stones, return the length of the longest word in it.", f"def f(heights):\n{other}"
    )
    assert near.by == ()
    assert 0.2 < near.code < contamination.FLAG["code"]
    assert mine.compare("", "").score == 0


@given(st.text(max_size=200), st.text(max_size=200))
def test_any_text_can_be_compared(mine, text, code):
    near = mine.compare(text, code)
    assert 0 <= near.score <= 1


def test_shares_are_those_of_a_plain_count(mine):
    """Against sets of tuples, in a program that repeats the problem's."""
    n = contamination.NGRAM["text"]
    text = SAID + " and then " + SAID[:80]

    def grams(text):
        words = re.findall(r"\w+", re.sub(r"(?m)^\s*>>>.*", "", text).lower())
        return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}

    half = " ".join(SAID.split()[:24])
    for said in (text, half, "nothing"):
        assert mine.compare(said, "").text == round(len(grams(SAID) & grams(said)) / len(grams(SAID)), 4)


def plain_tokens(code):
    """What Python's own tokenizer makes of a program, normalised: the oracle of `program_tokens`."""
    out, line = [], []
    for t in tokenize.generate_tokens(io.StringIO(code).readline):
        if t.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
            out += [] if all(x.type == tokenize.STRING for x in line) else line
            line = []
        elif t.type not in (tokenize.NL, tokenize.COMMENT, tokenize.INDENT, tokenize.DEDENT):
            line.append(t)
    return [
        t.string.lstrip("rbufRBUF").strip("\"'").replace("\\", "") if t.type == tokenize.STRING else t.string
        for t in out
        if t.string not in ("(", ")", ",", ";")
    ]


def test_programs_are_read_as_python_reads_them():
    """On the standard library, where this Python's tokenizer keeps f-strings whole; marks are compared one by one."""
    files = sorted(Path(json.__file__).parents[1].glob("*.py"))[:60]
    wrong = []
    for path in files:
        code = path.read_text(encoding="utf-8", errors="replace")
        if re.search(r"(?i)\b(?:f|rf|fr)[\"']", code):
            continue
        code = contamination._IMPORT.sub("", code)
        code = re.sub(r"\\\n", " ", code)
        try:
            want = plain_tokens(code)
        except (tokenize.TokenError, SyntaxError):
            continue
        got = [t for t, _ in contamination.program_tokens(code)]
        if "".join(got) != "".join(want):
            wrong.append(path.name)
    assert not wrong


# --- rows ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting(runs, tmp_path):
    """A benchmark of two problems in HumanEval's format, and rows of which 2 of 12 hold one."""
    tasks = []
    for (name, p), call in zip(PROBLEMS.items(), ("longest_rise", "total_rise"), strict=True):
        more = {"task_id": name, "entry_point": call, "base_input": [[[1, 2]]], "plus_input": [], "atol": 0}
        tasks.append({**p, **more, "contract": "", "test": ""})
    with gzip.open(tmp_path / "humaneval.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(t) + "\n" for t in tasks))
    lines = tinycode.training(12, 0)
    planted = {3: (SAID.upper(), "x = 1"), 8: ("Nothing.", reformatted(renamed(PROMPT + BODY)))}
    for i, (said, code) in planted.items():
        output = f"<think>\nSo.\n</think>\n\n```python\n{code}\n```"
        lines[i] = {"id": f"planted {i}", "input": said, "output": output}
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    tokens.train_tokenizer([r["output"] for r in lines], 400, tmp_path / "tok")
    return resolve(
        "paper",
        data=str(tmp_path / "d.jsonl"),
        tokenizer=str(tmp_path / "tok"),
        rows=9,
        workers=1,
        benchmarks=["humaneval", "tinycode"],
        benchmark_files={"humaneval": str(tmp_path / "humaneval.jsonl.gz")},
    )


def test_prepare_counts_and_lists_contaminated_rows(setting):
    stats = pipeline.statistics(setting.but(rows=0))
    found = stats["contamination"]
    assert (found["checked"], found["flagged"], found["problems"], found["problems_flagged"]) == (12, 2, 2, 1)
    assert found["by"] == {"code": 1, "text": 1, "minhash": found["by"]["minhash"]}
    assert {p["row"] for p in found["nearest"][:2]} == {"planted 3", "planted 8"}
    assert all(p["task"] == "Mine/0" for p in found["nearest"][:2])
    assert found["against"].keys() == {"humaneval"}
    assert "held out by construction" in found["not_checked"]["tinycode"]
    assert stats["rows"]["kept"] == 12


def test_prepare_leaves_contaminated_rows_out_before_it_chooses(setting):
    cfg = setting.but(decontaminate=True)
    stats = pipeline.statistics(cfg)
    assert stats["rows"] == {"read": 12, "dropped": {"contaminated": 2}, "usable": 10, "not_chosen": 1, "kept": 9}
    assert stats["contamination"]["flagged"] == 0
    clean = [n for n in range(12) if n not in (3, 8)]
    raw = list(sources.rows(cfg))
    assert list(prepare.prepare(cfg)["id"][:]) == [raw[n]["id"] for n in prepare.choice(np.array(clean), 9, 0)]
    assert prepare.data_fingerprint(cfg) != prepare.data_fingerprint(setting)


def test_a_benchmark_out_of_reach_is_said_and_checked_later(setting, tmp_path):
    missing = setting.but(benchmark_files={"humaneval": str(tmp_path / "none.jsonl")})
    found = pipeline.statistics(missing)["contamination"]
    assert found["checked"] == 0
    assert found["against"] == {}
    assert "none.jsonl: cannot be read" in found["not_checked"]["humaneval"]
    assert pipeline.statistics(setting)["contamination"]["checked"] == 9  # the same data set, checked now
    assert prepare.data_folder(setting) == prepare.data_folder(missing)
    with pytest.raises(UserError, match=r"decontaminate: humaneval cannot be read .*none\.jsonl"):
        prepare.prepare(missing.but(decontaminate=True))


def test_embeddings_list_their_nearest_pairs(setting, tmp_path):
    """The mechanics, by a tiny model with random weights: a copy's embedding is the problem's own."""
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    net = BertModel(BertConfig(vocab_size=500, max_position_embeddings=200, **shape))
    net.save_pretrained(tmp_path / "bert")
    tokens.load_tokenizer(setting.tokenizer).save_pretrained(tmp_path / "bert")
    before = pipeline.statistics(setting.but(rows=0))["contamination"]
    assert "embeddings" not in before
    cfg = setting.but(rows=0, embedder=str(tmp_path / "bert"))
    found = pipeline.statistics(cfg)["contamination"]
    assert {k: v for k, v in found.items() if k != "embeddings"} == before
    assert found["embeddings"]["model"] == cfg.embedder
    cosines = [p["cosine"] for p in found["embeddings"]["nearest"]]
    assert len(cosines) == 12
    assert cosines == sorted(cosines, reverse=True)
    assert all(-1 <= c <= 1.0001 for c in cosines)
    again = pipeline.statistics(cfg)["contamination"]
    assert again == found
    with pytest.raises(UserError, match=r"embedder: .*none is neither a model folder"):
        pipeline.statistics(cfg.but(embedder=str(tmp_path / "none")))


# --- real problems ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(request):
    from conftest import SHARED

    folder = SHARED / "data" / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the benchmarks' files are not beside this checkout")
    files = {"humaneval": "HumanEvalPlus-v0.1.10.jsonl.gz", "mbpp": "MbppPlus-v0.2.0.jsonl.gz"}
    problems = {k: v for name, f in files.items() for k, v in benchmarks.load_benchmark(name, folder / f)[0].items()}
    return problems, contamination.Index(problems)


def test_copies_of_real_problems_are_found(real):
    """Of all 542; a program is missed where it is shorter than one n-gram."""
    problems, against = real
    found = {"text": 0, "verbatim": 0, "renamed": 0, "reformatted": 0}
    for p in problems.values():
        code = p["prompt"] + p["canonical_solution"]
        copies = {"verbatim": code, "renamed": renamed(code), "reformatted": reformatted(code)}
        for name, copy in copies.items():
            near = against.compare("", f"import os\n\n{copy}")
            found[name] += "code" in near.by and near.code == 1
        found["text"] += "text" in against.compare(p["prompt"].upper().replace(" ", "  "), "").by
    assert found["verbatim"] == found["renamed"] == len(problems) - len(against.too_short("code"))
    assert found["reformatted"] >= 0.98 * found["verbatim"]  # the rest: 4. became 4.0, a quote changed in a string
    assert found["text"] >= 0.99 * len(problems)


def test_real_rows_that_are_no_copies_are_not_flagged(real, shared):
    """119 long traces on three problems that are in neither benchmark, and 2,000 TinyCode rows: no false alarm."""
    rows = list(read_jsonl(shared / "data" / "think_code" / "can_ai_code_full.jsonl")) + tinycode.training(2000, 0)
    flagged = 0
    for raw in rows:
        try:
            ex = examples.example(raw)
        except examples.Dropped:
            continue
        flagged += bool(real[1].compare(ex.prompt, ex.code).by)
    assert flagged == 0
