"""Bytes to tokens: lossless, every token owned, whatever the characters."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff import syntax, tokens
from treediff.config import UserError

TEXT = "def f(x):\n\treturn {'naïve': '😀'}[x]  # ≤\r\n" * 3


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([TEXT, "if x > 10: pass\n", "<think>\nabc\n</think>"], 330, folder)
    return tokens.load_tokenizer(str(folder))


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(
        st.sampled_from("ab(): =\t\r\n😀é\ufeff\u200b<|endoftext|>'\"é") | st.characters(codec="utf-8"), max_size=60
    )
)
def test_tokens_spell_the_text_and_start_where_they_say(tok, text):
    ids, starts = tokens.encode(tok, text)
    table = tokens.byte_table(tok)
    raw = text.encode()
    for i, start in zip(ids.tolist(), starts.tolist(), strict=True):
        assert raw[start : start + table.length[i]] == table.spelling[i]
    assert sum(table.length[i] for i in ids.tolist()) == len(raw)


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(st.sampled_from("ifx(): =\t\n 10é😀"), min_size=1, max_size=50),
    owner=st.sampled_from(["first", "max"]),
)
def test_every_token_has_the_tier_of_its_owner(tok, text, owner):
    ids, starts = tokens.encode(tok, text)
    raw = text.encode()
    tiers = syntax.byte_tiers(syntax.parse(raw))
    weights = [0.15, 0.15, 0.42, 0.58, 0.6]
    got = tokens.token_tiers(tok, ids, starts, tiers, weights if owner == "max" else None)
    table = tokens.byte_table(tok)
    for i, start, tier in zip(ids.tolist(), starts.tolist(), got.tolist(), strict=True):
        held = raw[start : start + table.length[i]]
        blank = len(held) - len(held.lstrip()) if held.strip() else 0
        if owner == "first":
            assert tier == tiers[start + blank]
        else:
            span = tiers[start + blank : start + len(held)].tolist()
            assert weights[tier] == max(weights[t] for t in span)


def test_special_tokens_in_a_text_are_only_text(tok):
    ids, _ = tokens.encode(tok, "x = '<|endoftext|>'")
    assert tok.eos_token_id not in ids
    ids, _ = tokens.encode(tok, "x<|endoftext|>", special=True)
    assert ids[-1] == tok.eos_token_id


def test_spans_hold_the_tokens_whose_anchor_lies_inside(tok):
    text = "if x > 10: pass\n"
    ids, starts = tokens.encode(tok, text)
    at = tokens.anchors(tok, ids, starts)
    spans = syntax.node_spans(syntax.parse(text.encode()))
    got = tokens.token_spans(at, spans)
    want = []
    for start, end, tier in spans.tolist():
        inside = [k for k, a in enumerate(at.tolist()) if start <= a < end]
        if inside:
            want.append([inside[0], inside[-1] + 1, tier])
    assert got.tolist() == want


def test_a_tokenizer_that_loses_characters_is_refused(tok, tmp_path):
    import copy

    from tokenizers import normalizers

    lossy = copy.deepcopy(tok)
    lossy.backend_tokenizer.normalizer = normalizers.Replace("\t", " ")
    with pytest.raises(UserError, match=r"does not keep the text: b'\\tx.* at byte 3"):
        tokens.encode(lossy, "a =\tx")


def test_tokenizers_that_cannot_serve_are_refused(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(UserError, match="neither a tokenizer folder"):
        tokens.load_tokenizer(str(tmp_path / "nothing"))
    words = Tokenizer(models.WordLevel({"a": 0, "<eos>": 1, "[MASK]": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", mask_token="[MASK]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a byte-level BPE"):
        tokens.load_tokenizer(str(tmp_path))


def test_the_byte_alphabet_is_the_official_one():
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert tokens._byte_alphabet() == {c: b for b, c in bytes_to_unicode().items()}


def test_labels_and_tiers_agree():
    assert tokens.LABELS[tokens.CODE :] == syntax.TIERS
    assert np.array_equal([tokens.PROMPT, tokens.REASONING], [0, 1])
