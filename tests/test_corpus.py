"""Rows to encoded samples: what is kept, what is dropped for which reason, and what the labels say."""

import numpy as np
import pytest

from treediff import corpus, tokens
from treediff.config import resolve
from treediff.corpus import Dropped

GOOD = "<think>\nAdd them.\n</think>\n\nHere it is:\n```python\ndef f(a, b):\n    return a + b\n```\nDone."


def row(output=GOOD, **more):
    return {"id": "1", "input": "Add two numbers.", "output": output, **more}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("no tags ```python\nx\n```"), "no <think>"),
        (row("<think>never closed ```python\nx\n```"), "<think> never closed"),
        (row("<think>\n\n</think>\n```python\nx\n```"), "empty reasoning"),
        (row("<think>a</think> just words"), "no code block"),
        (row("<think>a</think>\n```python\n\n```"), "empty code block"),
        (row("<think>a</think>\n```python\nx = 1"), "no code block"),
        (row(input="-"), "no problem text"),
        ({"id": "1", "text": "x"}, "no input or output column"),
        (row(None), "no input or output column"),
    ],
)
def test_rows_that_cannot_serve(bad, reason):
    with pytest.raises(Dropped, match=reason):
        corpus.example(bad)


def test_the_three_regions():
    ex = corpus.example(row())
    assert (ex.reasoning, ex.code) == ("Add them.", "def f(a, b):\n    return a + b")
    text, start, end = ex.answer()
    assert text.encode()[start:end].decode() == ex.code


def test_of_several_blocks_the_solution_or_the_last_one_is_the_program():
    two = "<think>a</think>\n```python\nfirst = 1\n```\nor\n```python\nsecond = 2\n```"
    assert corpus.example(row(two)).code == "second = 2"
    assert corpus.example(row(two, solution="first = 1\n")).code == "first = 1"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([GOOD, "user assistant Add two numbers."], 400, folder)
    return tokens.load_tokenizer(str(folder))


def test_labels_follow_the_regions(tok):
    cfg = resolve("paper", tokenizer=tok.name_or_path)
    record = corpus.encode(cfg, tok, corpus.example(row()))
    labels, ids = record["labels"], record["input_ids"]
    code = tok.decode(ids[labels >= tokens.CODE])
    assert code.strip() == "def f(a, b):\n    return a + b"
    assert tok.decode(ids[labels == tokens.PROMPT]).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert "Add them." in tok.decode(ids[labels == tokens.REASONING])
    assert (np.diff(np.flatnonzero(labels >= tokens.CODE)) == 1).all()
    spans = record["spans"].reshape(-1, 3)
    where = np.flatnonzero(labels >= tokens.CODE)
    assert spans[:, 0].min() >= where[0]
    assert spans[:, 1].max() <= where[-1] + 1


def test_overlong_rows_are_dropped_or_lose_reasoning_never_code(tok):
    ex = corpus.example(row(GOOD.replace("Add them.", "Think é again. " * 40)))
    full = len(corpus.encode(resolve("paper"), tok, ex)["input_ids"])
    short = resolve("paper", max_length=full - 100)
    with pytest.raises(Dropped, match="longer than max_length"):
        corpus.encode(short, tok, ex)
    record = corpus.encode(short.but(overlong="trim_reasoning"), tok, ex)
    assert len(record["input_ids"]) < short.max_length
    code = tok.decode(record["input_ids"][record["labels"] >= tokens.CODE])
    assert code.strip() == ex.code
    with pytest.raises(Dropped):
        corpus.encode(short.but(overlong="trim_reasoning", max_length=40), tok, ex)


def test_a_mask_token_in_the_prompt_is_dropped(tok):
    with pytest.raises(Dropped, match="mask token"):
        corpus.encode(resolve("paper"), tok, corpus.example(row(input="What is <|mdm_mask|>?")))


@pytest.mark.parametrize("spelled", [b"", b"\xff\xfe ok", b"a\xe2\x82b"])
def test_answers_that_are_empty_or_no_text(tok, spelled):
    table = tokens.byte_table(tok)
    ids = np.array([table.spelling.index(bytes([b])) for b in spelled] + [tok.eos_token_id])
    text, runs, at, labels = corpus.answer_tokens(resolve("paper"), tok, ids, np.arange(len(ids)))
    assert text == "".join(chr(b) if b < 128 else "\ufffd" for b in spelled)
    assert runs == [(i, i + 1) for i in range(len(spelled))]
    assert len(at) == len(labels) == len(spelled)


def test_answers_as_tokens(tok):
    text = corpus.example(row()).answer()[0]
    ids = np.append(tokens.encode(tok, text)[0], tok.eos_token_id)
    got, runs, at, labels = corpus.answer_tokens(resolve("paper"), tok, ids, np.arange(len(ids)))
    assert got == text
    assert "".join(got[a:b] for a, b in runs) == text
    assert len(at) == len(labels) == len(ids) - 1
    code = "".join(got[a:b] for (a, b), label in zip(runs, labels, strict=True) if label >= tokens.CODE)
    assert code.strip().startswith("def f")
    assert code.strip().endswith("a + b")
