"""Rows to a data set: what is counted, chosen and written, and that neither kills nor processes can change it."""

import json

import pytest

from treediff import prepare, tokens
from treediff.config import UserError, resolve

GOOD = "<think>\nAdd them.\n</think>\n\nHere it is:\n```python\ndef f(a, b):\n    return a + b\n```\nDone."


def row(output=GOOD, **more):
    return {"id": "1", "input": "Add two numbers.", "output": output, **more}


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([GOOD, "user assistant Add two numbers."], 400, folder)
    return tokens.load_tokenizer(str(folder))


def given(path, tok, **switches):
    switches = {"rows": 0, "benchmarks": ["tinycode"], **switches}
    return resolve("paper", data=str(path), tokenizer=tok.name_or_path, **switches)


def test_prepare_counts_and_reopens(tok, runs, tmp_path):
    rows = [row(), row("<think>a</think> words"), row(GOOD.replace("a + b", "a - b")), row("x")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    cfg = given(tmp_path / "d.jsonl", tok)
    stats = prepare.stats(cfg)
    assert stats["rows"] == {
        "read": 4,
        "dropped": {"no code block": 1, "no <think>": 1},
        "usable": 2,
        "not_chosen": 0,
        "kept": 2,
    }
    data = prepare.prepared(cfg)
    assert sum(stats["tokens"].values()) == sum(len(x) for x in data["input_ids"])
    assert len(set(data["uid"][:].tolist())) == 2
    import datasets

    assert datasets.load_from_disk(str(prepare.data_folder(cfg))).num_rows == 2
    assert prepare.data_fingerprint(cfg.but(max_length=999)) != prepare.data_fingerprint(cfg)
    (tmp_path / "d.jsonl").write_text(json.dumps(row()) + "\n")
    assert prepare.stats(cfg)["rows"]["kept"] == 1  # a changed file is another data set


def test_a_folder_of_another_data_set_is_refused(tok, runs, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps(row()) + "\n")
    cfg = given(tmp_path / "d.jsonl", tok)
    prepare.prepared(cfg, tmp_path / "out")
    prepare.prepared(cfg, tmp_path / "out")
    with pytest.raises(UserError, match="made from other data or switches"):
        prepare.prepared(cfg.but(max_length=999), tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        prepare.prepared(cfg, tmp_path / "mine")


def test_parquet_is_read_like_jsonl(tok, runs, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row(), row("x")]), tmp_path / "d.parquet")
    assert prepare.stats(given(tmp_path / "d.parquet", tok))["rows"]["kept"] == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"id": 1}\nnot json\n', r"d\.jsonl, line 2: not valid JSON"),
        (b"[1]\n", r"d\.jsonl, line 1: not a JSON object"),
        (b'{"a": "\xff"}\n', r"d\.jsonl, line 1: not valid UTF-8"),
        (b"", "no row can be used"),
    ],
)
def test_bad_files_are_named(tok, runs, tmp_path, content, said):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        prepare.prepared(given(tmp_path / "d.jsonl", tok))
    assert not list(runs.rglob("*.arrow"))  # nothing half-made is left
    assert not list(runs.rglob("*.tmp"))


def test_a_missing_file_is_named(tok, runs, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        prepare.prepared(given(tmp_path / "none.jsonl", tok))


def test_real_rows(shared, runs):
    data = shared / "data" / "think_code" / "can_ai_code_full.jsonl"
    tokenizer = str(shared / "tokenizers" / "llada_standin_8k")
    stats = prepare.stats(resolve("paper", data=str(data), tokenizer=tokenizer, rows=0))
    assert stats["rows"]["read"] == 120
    assert stats["rows"]["kept"] + sum(stats["rows"]["dropped"].values()) == 120
    assert stats["rows"]["kept"] >= 10
    adverse = shared / "data" / "think_code" / "can_ai_code_truncated_or_empty.jsonl"
    with pytest.raises(UserError, match=r"102 empty reasoning, 9 <think> never closed"):
        prepare.stats(resolve("paper", data=str(adverse), tokenizer=tokenizer, rows=0))
