"""Bytes to tokens: lossless, every token owned, whatever the characters."""

import copy
import json

import numpy as np
import oracles
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st

from treediff.errors import UserError
from treediff.masking import tokens
from treediff.masking.tiers import CONDITION, CONTROL, DATA, SKELETON, TIERS, byte_tiers, language_of, node_spans, parse

TEXT = "def f(x):\n\treturn {'naïve': '😀'}[x]  # ≤\r\n" * 3
WEIGHTS = [0.15, 0.15, 0.42, 0.58, 0.6]
PIECES = [
    "if x:",
    "\treturn",
    " = f(",
    "'😀'",
    "é",
    "\r\n",
    "\ufeff",
    "\u200b",
    "<|endoftext|>",
    "<|mdm_mask|>",
    "):\n",
]
PIECES += [
    "    ",
    "x",
    "10",
    "# ",
    "e\u0301",
    "🇩🇪",
    "👩‍👩‍👧",
    "\x00",
    "\x0c",
    "\u2028",
    "<think>",
    "字",
    "\\n",
    '"""',
    "{",
    "}",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=4), max_size=25).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    tokens.train_tokenizer([TEXT, "if x > 10: pass\n", "<think>\nabc\n</think>"], 330, folder)
    return tokens.load_tokenizer(str(folder))


@pytest.fixture(scope="module", params=["trained", "llada_standin_8k", "llada_standin_small"])
def tok(request, trained):
    """A tokenizer trained here, and those that stand in for LLaDA's where they are beside the checkout."""
    if request.param == "trained":
        return trained
    folder = SHARED / "tokenizers" / request.param
    if not folder.is_dir():
        pytest.skip("the folder of real benchmark data and tokenizers is not beside this checkout")
    return tokens.load_tokenizer(str(folder))


def pieces(tok, ids) -> list[bytes]:
    """What each token spells, from the tokenizer's own vocabulary and the official byte alphabet."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {c: b for b, c in bytes_to_unicode().items()}
    added = tok.backend_tokenizer.get_added_tokens_decoder()
    names = [(i, tok.backend_tokenizer.id_to_token(i)) for i in ids]
    return [n.encode() if i in added else bytes(byte_of[c] for c in n) for i, n in names]


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_tokens_spell_the_text_and_start_where_they_say(tok, text):
    ids, starts = tokens.tokenize(tok, text)
    spelled = pieces(tok, ids.tolist())
    assert b"".join(spelled) == text.encode()
    assert starts.tolist() == [sum(map(len, spelled[:k])) for k in range(len(spelled))]
    tok.backend_tokenizer.encode_special_tokens = True
    try:
        assert ids.tolist() == tok.backend_tokenizer.encode(text, add_special_tokens=False).ids
    finally:
        tok.backend_tokenizer.encode_special_tokens = False


@settings(max_examples=200, deadline=None)
@given(
    text=texts,
    seed=st.integers(0, 2**32 - 1),
    weights=st.sampled_from([None, WEIGHTS, [1, 1, 1, 1, 1], [0, 2, 0, 2, 1]]),
)
def test_every_token_has_the_tier_of_its_owner(tok, text, seed, weights):
    """Under arbitrary tiers as under real ones, so that tokens straddle them in every way."""
    ids, starts = tokens.tokenize(tok, text)
    raw = text.encode()
    for tiers in (
        byte_tiers(parse(raw)),
        np.random.default_rng(seed).integers(0, 5, len(raw)).astype(np.uint8),
    ):
        for owner in ("none", "enclosing"):
            got = tokens.token_tiers(tok, ids, starts, tiers, weights, owner)
            assert got.tolist() == oracles.token_tiers(pieces(tok, ids.tolist()), tiers, weights, owner)


@settings(max_examples=150, deadline=None)
@given(text=texts, cuts=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 80), st.integers(0, 4)), max_size=12))
def test_spans_hold_the_tokens_whose_anchor_lies_inside(tok, text, cuts):
    ids, starts = tokens.tokenize(tok, text)
    raw, at = text.encode(), tokens.anchors(tok, ids, starts)
    cuts = [(min(a, b, len(raw)), min(max(a, b), len(raw)), tier) for a, b, tier in cuts]
    for spans in (node_spans(parse(raw)), np.array(cuts, np.int32).reshape(-1, 3)):
        got = tokens.token_spans(at, spans)
        assert got.dtype == np.int32
        assert got.tolist() == oracles.token_spans(at.tolist(), [tuple(x) for x in spans.tolist()])


def test_real_files_in_every_language(tok):
    from test_languages import SOURCES, with_grammar

    for path in SOURCES:
        raw = path.read_bytes()
        ids, starts = tokens.tokenize(tok, raw.decode())
        parsed = parse(raw, with_grammar(language_of(path)))
        tiers, spelled = byte_tiers(parsed), pieces(tok, ids.tolist())
        for weights in (None, WEIGHTS):
            got = tokens.token_tiers(tok, ids, starts, tiers, weights)
            assert got.tolist() == oracles.token_tiers(spelled, tiers, weights, "none")
        spans = tokens.token_spans(tokens.anchors(tok, ids, starts), node_spans(parsed))
        assert (spans[:, 0] < spans[:, 1]).all()
        assert spans[:, 1].max() <= len(ids)


def test_a_token_may_hold_part_of_a_character(tok):
    text = "x = '😀𝔘'\n"
    ids, starts = tokens.tokenize(tok, text)
    torn = [p for p in pieces(tok, ids.tolist()) if p.decode(errors="replace").count("\ufffd")]
    assert torn, "this text was to be cut inside a character"
    tiers = tokens.token_tiers(tok, ids, starts, byte_tiers(parse(text.encode())))
    inside = (starts >= text.encode().index("😀".encode())) & (starts < text.encode().index(b"'\n"))
    assert (tiers[inside] == SKELETON).all()


def test_a_token_that_straddles_leaves_belongs_to_its_first_one_or_to_the_heaviest(trained):
    """`):` is skeleton throughout; a token `x):` made of an identifier and marks is not."""
    straddling = copy.deepcopy(trained)
    straddling.add_tokens(["x)"])
    raw = b"if f(x):\n    y\n"
    ids, starts = tokens.tokenize(straddling, raw.decode())
    k = pieces(straddling, ids.tolist()).index(b"x)")
    tiers = byte_tiers(parse(raw))
    at = raw.index(b"x)")
    assert tiers[at : at + 2].tolist() == [DATA, SKELETON]
    assert tokens.token_tiers(straddling, ids, starts, tiers)[k] == DATA
    assert tokens.token_tiers(straddling, ids, starts, tiers, [0, 9, 1, 1, 1])[k] == SKELETON


def test_a_byte_order_mark_crlf_and_tabs_keep_their_places(tok):
    text = "\ufeffif x:\r\n\treturn 'é'\r\n"
    ids, starts = tokens.tokenize(tok, text)
    raw = text.encode()
    tiers = tokens.token_tiers(tok, ids, starts, byte_tiers(parse(raw)))
    for word, tier in ((b"if", CONDITION), (b"return", CONTROL), ("é".encode(), SKELETON)):
        held = [k for k, a in enumerate(tokens.anchors(tok, ids, starts)) if 0 <= a - raw.index(word) < len(word)]
        assert held
        assert (tiers[held] == tier).all()


def test_special_tokens_in_a_text_are_only_text(tok):
    special = {i: t.content for i, t in tok.backend_tokenizer.get_added_tokens_decoder().items() if t.special}
    assert tok.eos_token_id in special
    for i, name in special.items():
        text = f"x = '{name}'"
        ids, starts = tokens.tokenize(tok, text)
        assert not set(ids.tolist()) & special.keys()
        tiers = tokens.token_tiers(tok, ids, starts, byte_tiers(parse(text.encode())))
        assert (tiers[starts > 4] == SKELETON).all()
        assert i in tokens.tokenize(tok, text, special=True)[0]
    assert not tok.backend_tokenizer.encode_special_tokens  # as it was


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        ("Replace", "a =\tx", r"b'\\tx' at byte 3"),
        ("Lowercase", "x = Ab", r"b'Ab' at byte 4"),
        ("NFKC", "s = 'ﬁ'", "at byte 5"),
        ("StripAccents", "é = 1", "at byte"),
        ("Strip", "  x = 1  ", "at byte 0"),
        ("prefix", "x = 1", "at byte 0"),
        ("drops", "x = 'é'\n", "at byte"),
    ],
)
def test_a_tokenizer_that_loses_characters_is_refused(trained, kind, text, said):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    lossy = copy.deepcopy(trained)
    backend = lossy.backend_tokenizer
    if kind == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif kind == "drops":  # a BPE without all bytes leaves the others out
        few = {c: i for i, c in enumerate("x=1'Ġ")}
        bare = Tokenizer(models.BPE(vocab=few, merges=[]))
        bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), backend.decoder
        lossy._tokenizer = bare
    else:
        maker = getattr(normalizers, kind)
        steps = (
            [normalizers.NFD(), maker()]
            if kind == "StripAccents"
            else [maker("\t", " ") if kind == "Replace" else maker()]
        )
        backend.normalizer = normalizers.Sequence(steps)
    with pytest.raises(UserError, match="does not keep the text: .*" + said):
        tokens.tokenize(lossy, text)


def test_tokens_of_another_text_are_refused(trained):
    ids, _ = tokens.tokenize(trained, "x = 10")
    for wrong in (b"x = 1", b"x = 100", b"", b"y = 10"):
        with pytest.raises(UserError, match="does not keep the text"):
            tokens.place(trained, ids, wrong)


def test_the_empty_text_has_no_tokens(tok):
    ids, starts = tokens.tokenize(tok, "")
    assert len(ids) == len(starts) == 0
    assert tokens.token_tiers(tok, ids, starts, np.zeros(0, np.uint8), WEIGHTS).shape == (0,)
    assert tokens.token_spans(starts, np.zeros((0, 3), np.int32)).shape == (0, 3)


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
    assert tokens.LABELS[tokens.CODE :] == TIERS
    assert np.array_equal([tokens.PROMPT, tokens.REASONING], [0, 1])


def remote(folder, **config):
    """A folder whose config.json or tokenizer_config.json wants code of its own, and waits for a word if asked."""
    (folder / "own.py").write_text('raise SystemExit("code of a folder was run")')
    for name, more in config.items():
        path = folder / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **more}))


def test_code_that_a_folder_brings_along_is_never_run_and_never_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked"))
    tokens.train_tokenizer(["def f(): return 1"], 300, tmp_path / "t")
    names = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoModelForCausalLM": "own.M"}
    remote(tmp_path / "t", config={"model_type": "llada", "auto_map": names})  # as LLaDA's folder has it
    assert tokens.load_tokenizer(str(tmp_path / "t")).mask_token
    (tmp_path / "t" / "tokenizer.json").unlink()
    kind = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["own.T", None]}}
    remote(tmp_path / "t", tokenizer_config=kind)
    with pytest.raises(UserError, match=r"tokenizer: .* code of its own only, which is never run here"):
        tokens.load_tokenizer(str(tmp_path / "t"))
