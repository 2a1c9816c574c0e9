"""Rows to encoded samples: what is kept, what is dropped for which reason, and what the labels say."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treediff.config import resolve
from treediff.data import examples
from treediff.data.examples import Dropped
from treediff.figures import views
from treediff.masking import tokens

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
        examples.example(bad)


def test_the_three_regions():
    ex = examples.example(row())
    assert (ex.reasoning, ex.code) == ("Add them.", "def f(a, b):\n    return a + b")
    text, start, end = ex.answer()
    assert text.encode()[start:end].decode() == ex.code


def test_of_several_blocks_the_solution_or_the_last_one_is_the_program():
    two = "<think>a</think>\n```python\nfirst = 1\n```\nor\n```python\nsecond = 2\n```"
    assert examples.example(row(two)).code == "second = 2"
    assert examples.example(row(two, solution="first = 1\n")).code == "first = 1"


def test_a_row_with_half_a_character_is_dropped():
    with pytest.raises(Dropped, match="not valid Unicode"):
        examples.example(row(json.loads('"<think>\\ud83d</think>\\n```python\\nx\\n```"')))


@pytest.mark.parametrize(
    ("language", "fence", "taken"),
    [
        ("python", "py", True),
        ("python", "", True),
        ("python", "js", False),
        ("javascript", "JS", True),
        ("cpp", "c++", True),
        ("c", "cpp", False),
        ("go", "golang", True),
        ("rust", "rust", True),
        ("rust", "python", False),
    ],
)
def test_fences_are_those_of_the_language(language, fence, taken):
    output = f"<think>a</think>\n```{fence}\nx = 1\n```"
    if not taken:
        with pytest.raises(Dropped, match="no code block"):
            examples.example(row(output), language)
        return
    text, start, end = examples.example(row(output), language).answer()
    assert text[:start].endswith(f"\n```{language}\n")
    assert text[start:end] == "x = 1"


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([GOOD, "user assistant Add two numbers."], 400, folder)
    return tokens.load_tokenizer(str(folder))


def test_labels_follow_the_regions(tok):
    cfg = resolve("paper", tokenizer=tok.name_or_path)
    record = examples.encode(cfg, tok, examples.example(row()))
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
    lines, names = (record[c].reshape(-1, 3) for c in ("lines", "names"))
    assert [i for a, b, _ in lines for i in range(a, b)] == where.tolist()
    words = [(tok.decode(ids[a:b]).strip(), int(n)) for a, b, n in names]
    assert [w[0] for w, _ in words] == list("fabab")  # a token may hold what follows the name, too
    assert [n for _, n in words] == [0, 1, 2, 1, 2]


def test_overlong_rows_are_dropped_or_lose_reasoning_never_code(tok):
    ex = examples.example(row(GOOD.replace("Add them.", "Think é again. " * 40)))
    full = len(examples.encode(resolve("paper"), tok, ex)["input_ids"])
    short = resolve("paper", max_length=full - 100)
    with pytest.raises(Dropped, match="longer than max_length"):
        examples.encode(short, tok, ex)
    record = examples.encode(short.but(overlong="trim_reasoning"), tok, ex)
    assert len(record["input_ids"]) < short.max_length
    code = tok.decode(record["input_ids"][record["labels"] >= tokens.CODE])
    assert code.strip() == ex.code
    with pytest.raises(Dropped):
        examples.encode(short.but(overlong="trim_reasoning", max_length=40), tok, ex)


@pytest.fixture(scope="module", params=range(len(examples._SPLITS)))
def cutting(request, tmp_path_factory):
    """A tokenizer that cuts texts as LLaDA's (Llama 3's, Qwen 2's) does, with long merges."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(examples._SPLITS[request.param]), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = list(tokens.SPECIAL_TOKENS)
    bpe.train_from_iterator(
        [Path(examples.__file__).read_text(encoding="utf-8")],
        trainers.BpeTrainer(vocab_size=3000, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    bos, eos, mask = special[:3]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, mask_token=mask)


PIECES = [
    "it's",
    " I'll",
    "don't ",
    "    ",
    "\n\n",
    " a",
    "word ",
    "é",
    "😀",
    " 123",
    "==",
    "x y",
    "\t",
    "\r\n",
    "'s t",
    "_ b",
]


@given(st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=6)), max_size=120), st.integers(1, 40))
def test_a_text_is_called_too_long_only_if_it_is(cutting, parts, piece):
    text = "".join(parts)
    full = len(tokens.tokenize(cutting, text)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "_PIECE", piece)
        patch.setattr(examples, "_WORTH", 0)
        for room in {0, 1, full // 2, full - 1, full, full + 1} - {-1}:
            assert not examples.surely_longer(cutting, text, room) or full > room


class Watched:
    """A tokenizer that writes down what it is given."""

    def __init__(self, backend):
        self.backend, self.seen, self.backend_tokenizer = backend, [], self

    def encode(self, text, **how):
        self.seen.append(text)
        return self.backend.encode(text, **how)

    def __getattr__(self, name):
        return getattr(self.backend, name)


def test_a_long_text_is_refused_without_being_read_to_its_end(cutting, tok):
    text = "two words and it's more, " * 4000
    watched = Watched(cutting.backend_tokenizer)
    assert examples.surely_longer(watched, text, 1000)
    assert 1000 < len("".join(watched.seen)) < len(text) / 4
    assert not examples.surely_longer(cutting, text, len(text))
    assert not examples.surely_longer(tok, text, 1000)  # a tokenizer of which it is not known where it cuts


def test_a_mask_token_in_the_prompt_is_dropped(tok):
    with pytest.raises(Dropped, match="mask token"):
        examples.encode(resolve("paper"), tok, examples.example(row(input="What is <|mdm_mask|>?")))


@pytest.mark.parametrize("spelled", [b"", b"\xff\xfe ok", b"a\xe2\x82b"])
def test_answers_that_are_empty_or_no_text(tok, spelled):
    table = tokens.byte_table(tok)
    ids = np.array([table.spelling.index(bytes([b])) for b in spelled] + [tok.eos_token_id])
    text, runs, at, labels = views.answer_tokens(resolve("paper"), tok, ids, np.arange(len(ids)))
    assert text == "".join(chr(b) if b < 128 else "\ufffd" for b in spelled)
    assert runs == [(i, i + 1) for i in range(len(spelled))]
    assert len(at) == len(labels) == len(spelled)


def test_answers_as_tokens(tok):
    text = examples.example(row()).answer()[0]
    ids = np.append(tokens.tokenize(tok, text)[0], tok.eos_token_id)
    got, runs, at, labels = views.answer_tokens(resolve("paper"), tok, ids, np.arange(len(ids)))
    assert got == text
    assert "".join(got[a:b] for a, b in runs) == text
    assert len(at) == len(labels) == len(ids) - 1
    code = "".join(got[a:b] for (a, b), label in zip(runs, labels, strict=True) if label >= tokens.CODE)
    assert code.strip().startswith("def f")
    assert code.strip().endswith("a + b")
