"""Holes: against ordinary sampling, against a literal loop in the text's own order, and what must hold of them."""

import dataclasses
import json
import subprocess
import sys
from io import StringIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_decode import net
from test_sampling_run import tiny_tokenizer

from treediff import pipeline
from treediff.config import resolve
from treediff.data import benchmarks, holes
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.model import checkpoint, forward, llada
from treediff.runs import open_run
from treediff.sampling import decode, infill, terminal
from treediff.sampling import run as sampling
from treediff.scoring import infill as scoring
from treediff.training import launch

HOW = decode.Decoding(510, (509,), 0, 0, block_length=8, holes=1, early_exit=False)
MODES = {
    "exact": HOW,
    "3 a step": dataclasses.replace(HOW, holes=3),
    "guided": dataclasses.replace(HOW, guidance=1.5),
    "warm": dataclasses.replace(HOW, temperature=0.8),
    "random": dataclasses.replace(HOW, remasking="random"),
    "late EOS": dataclasses.replace(HOW, eos_suppression="confidence"),
    "threshold": dataclasses.replace(HOW, threshold=0.1),
    "prefix": dataclasses.replace(HOW, cache="prefix"),
    "dual": dataclasses.replace(HOW, cache="dual"),
    "all": dataclasses.replace(HOW, threshold=0.1, cache="dual", guidance=0.5, temperature=0.5),
}


def ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 500, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("mode", [m for m in MODES if m != "3 a step"])
def test_without_a_suffix_a_hole_is_an_answer(mode):
    how = MODES[mode]
    plain = dataclasses.replace(how, holes=0, gen_length=16, steps=16)
    want = decode.decode(net("tiny"), [ids(9, 0)], plain, [5])
    got = infill.fill(net("tiny"), [infill.Gapped([ids(9, 0), []], [16])], how, [5])[0]
    assert got.holes[0] == want.ids[0].tolist()
    assert got.committed_at[0] == want.committed_at[0].tolist()
    assert got.confidence[0] == want.confidence[0].tolist()


def literal(text: infill.Gapped, block_length: int) -> list[list[int]]:
    """LLaDA's loop on the text in its own order, the blocks running over the holes; softmax in float64."""
    x, open_ = [], []
    for piece, length in zip(text.known, [*text.lengths, 0], strict=True):
        x += piece
        open_ += range(len(x), len(x) + length)
        x += [510] * length
    x = torch.tensor([x])
    for begin in range(0, len(open_), block_length):
        block = open_[begin : begin + block_length]
        for _ in block:
            with torch.no_grad():
                logits = net("tiny").lm_head(forward.hidden_states(net("tiny"), x))[0].double()
            logits[:, 510] = -torch.inf
            p, token = torch.softmax(logits, -1).max(-1)
            best = max((at for at in block if x[0, at] == 510), key=lambda at: p[at])
            x[0, best] = token[best]
    out, filled = [], iter(x[0, open_].tolist())
    for length in text.lengths:
        out.append([next(filled) for _ in range(length)])
    return out


@pytest.mark.parametrize(
    ("pieces", "lengths"), [((5, 7), (6,)), ((0, 9), (11,)), ((4, 3, 6), (5, 7)), ((3, 0, 2, 8), (2, 0, 9))]
)
def test_holes_are_filled_as_in_the_text_s_own_order(pieces, lengths):
    text = infill.Gapped([ids(n, i) for i, n in enumerate(pieces)], list(lengths))
    got = infill.fill(net("tiny"), [text], HOW)[0]
    assert [len(h) for h in got.holes] == list(lengths)
    assert got.margin > 1e-4  # else rounding may decide
    assert got.holes == literal(text, 8)


TEXTS = [
    infill.Gapped([ids(5, 1), ids(7, 2)], [6]),
    infill.Gapped([ids(3, 3), ids(2, 4), ids(4, 5)], [3, 14]),
    infill.Gapped([ids(8, 6), ids(8, 7)], [0]),
    infill.Gapped([ids(1, 8), []], [9]),
]


@pytest.mark.parametrize("mode", MODES)
def test_texts_together_give_what_each_gives_alone(mode):
    uids = [5, 2**35, 7, 0]
    together = infill.fill(net("tiny"), TEXTS, MODES[mode], uids)
    for text, uid, mine in zip(TEXTS, uids, together, strict=True):
        alone = infill.fill(net("tiny"), [text], MODES[mode], [uid])[0]
        assert alone.holes == mine.holes
        assert alone.committed_at == mine.committed_at
        assert alone.margin_at == mine.margin_at or alone.margin < 1e-4
        assert all(at != decode.NEVER for hole in mine.committed_at for at in hole)
        assert 510 not in [i for hole in mine.holes for i in hole]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=2, max_size=4), st.data(), st.sampled_from(["exact", "threshold", "dual"]))
def test_nothing_outside_the_holes_is_ever_touched(pieces, data, mode):
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=len(pieces) - 1, max_size=len(pieces) - 1))
    text = infill.Gapped([ids(n, i) for i, n in enumerate(pieces)], lengths)
    given_, at = {}, 0
    for piece, length in zip(text.known, [*lengths, 0], strict=True):
        given_ |= dict(zip(range(at, at + len(piece)), piece, strict=True))
        at += len(piece) + length
    seen, real = [], forward.window_states

    def watch(model, x, places, bias, kept):
        seen.append(dict(zip(places[0].tolist(), x[0].tolist(), strict=True)))
        return real(model, x, places, bias, kept)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "window_states", watch)
        found = infill.fill(net("tiny"), [text], MODES[mode])[0]
    assert len(seen) <= sum(lengths)
    assert bool(seen) == (sum(lengths) > 0)  # a hole of length 0 costs no pass
    last: dict[int, int] = {}
    for canvas in seen:
        assert all(canvas[p] == token for p, token in given_.items() if p in canvas)
        assert all(canvas[p] == token for p, token in last.items() if token != 510 and p in canvas)
        last |= canvas
    assert [len(h) for h in found.holes] == lengths


def test_an_end_of_text_in_a_hole_ends_nothing():
    text = infill.Gapped([ids(5, 1), ids(7, 2)], [12])
    free = infill.fill(net("tiny"), [text], HOW)[0]
    for end in set(free.holes[0]):
        for how in (HOW, dataclasses.replace(HOW, threshold=1.0)):
            got = infill.fill(net("tiny"), [text], dataclasses.replace(how, ends=(end,)))[0]
            assert got.holes == free.holes


def test_llada_s_own_loop_has_no_holes():
    with pytest.raises(UserError, match="holes"):
        dataclasses.replace(HOW, early_exit=True)
    with pytest.raises(UserError, match="holes"):
        dataclasses.replace(HOW, official=True)


# --- where the holes are --------------------------------------------------------------------------------------------
CODE = '''def f(nums):
    """Sum."""
    total = 0
    for x in nums:
        if x > 3:
            total += x
    return total
'''


@pytest.mark.parametrize(
    ("position", "text", "node"),
    [
        ("3:5", "total = 0", "assignment"),
        ("3:13", "0", "integer"),
        ("4:5", "for x in nums:\n        if x > 3:\n            total += x", "for_statement"),
        ("5:12", "x > 3", "comparison_operator"),
        ("5:14", "x > 3", "comparison_operator"),
        ("7:5", "return total", "return_statement"),
    ],
)
def test_a_node_is_found_by_its_position(position, text, node):
    hole = holes.at_node("f.py", CODE.encode(), position)
    assert (hole.text, hole.node) == (text, node)
    assert hole.program(hole.text) == CODE
    if int(position[0]) > 2:
        assert hole.problem == 'def f(nums):\n    """Sum."""\n'


def test_a_line_keeps_its_indentation_and_its_end():
    for number, line in enumerate(CODE.splitlines(), 1):
        hole = holes.at_line("f.py", CODE.encode(), number)
        assert hole.text == line.strip()
        assert hole.program(hole.text) == CODE
        assert hole.program("") == CODE.replace(line, line[: len(line) - len(line.lstrip())])
    assert holes.at_line("f.py", b"a\r\n  b\r\n", 2).suffix == "\r\n"


@pytest.mark.parametrize(
    ("find", "said"),
    [
        (lambda: holes.at_line("f.py", CODE.encode(), 8), "f.py: there is no line 8; the file has 7"),
        (lambda: holes.at_line("f.py", CODE.encode(), 0), "f.py: there is no line 0"),
        (lambda: holes.at_line("f.py", b"x = 1\n", 1), "line 1 is the whole file"),
        (lambda: holes.at_node("f.py", CODE.encode(), "9:1"), "f.py: there is no 9:1; the file has 7 lines"),
        (lambda: holes.at_node("f.py", CODE.encode(), "3:99"), "f.py: there is no 3:99"),
        (lambda: holes.at_node("f.py", CODE.encode(), "three"), "give line:column"),
        (lambda: holes.at_node("f.py", CODE.encode(), "1:1"), "the node at 1:1 contains the whole file"),
        (lambda: holes.at_node("f.py", b"x = 1\ny = = 2\n", "1:1"), "f.py: line 2 does not parse; mend it"),
        (lambda: holes.marked("f.py", b"a\n<fill>\nb\n<fill>\n"), r"<fill> stands there 2 times \(lines 2, 4\)"),
        (lambda: holes.marked("f.py", b"a\n"), "f.py: no hole is given; point at one with --line, --node or"),
    ],
)
def test_a_hole_that_there_is_not_is_one_sentence(find, said):
    with pytest.raises(UserError, match=said):
        find()


def test_ast_holes_are_whole_nodes_and_a_seeded_choice(shared):
    data = {"humaneval": str(shared / "data/benchmarks/HumanEvalPlus-v0.1.10.jsonl.gz")}
    cfg = resolve("paper", benchmark_files=data, limit=20, holes_per_program=2)
    every = holes.load(cfg, "ast-humaneval")
    assert len({h.id for h in every}) == len(every)
    for h in every:
        program = h.prefix + h.text + h.suffix
        assert 0 < len(h.text.strip()) < len(program.strip())
        node = holes.parse(program.encode()).tree.root_node.descendant_for_byte_range(
            len(h.prefix.encode()), len((h.prefix + h.text).encode()) - 1
        )
        while node.start_byte == len(h.prefix.encode()) and node.type != h.node:
            node = node.parent
        assert (node.type, node.text.decode().rstrip()) == (h.node, h.text)
        assert h.text not in ("", None)
    assert holes.load(cfg, "ast-humaneval") == every
    assert holes.load(cfg.but(hole_seed=1), "ast-humaneval") != every
    only = holes.load(cfg.but(tier="control"), "ast-humaneval")
    assert only == [h for h in every if h.tier == "control"]
    assert max(sum(h.task == t for h in only) for t in {h.task for h in only}) == 2


@pytest.mark.parametrize(("name", "nodes"), [("single-line", 657), ("multi-line", 1010)])
def test_which_lines_are_nodes_is_as_counted_elsewhere(shared, name, nodes):
    file = shared / f"data/benchmarks/infilling/HumanEval-{holes._FILES[name][0]}.jsonl.gz"
    every = holes.infilling(name, file)
    assert sum(bool(h.node) for h in every) == nodes
    assert len({h.task for h in every}) == 164
    assert all(h.problem and h.prefix.strip().startswith(h.problem.strip()) for h in every)


@pytest.mark.parametrize(
    ("line", "said"), [({"task_id": "a/b/c/d"}, "row 1: entry_point is missing"), ({}, "row 1: task_id is missing")]
)
def test_a_file_that_is_not_humaneval_infilling_is_named(tmp_path, line, said):
    (tmp_path / "x.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(UserError, match=said):
        holes.infilling("single-line", tmp_path / "x.jsonl")


# --- a run's completions --------------------------------------------------------------------------------------------
@pytest.fixture
def run(runs, tmp_path):
    """A backbone of random weights."""
    cfg = resolve("tiny", masking="none", d_model=32, n_layers=1, n_heads=2, mlp_hidden=48, limit=3, sample_batch=4)
    tiny_tokenizer(tmp_path / "tok")
    cfg = cfg.but(tokenizer=str(tmp_path / "tok"), hole_lengths=[2, 5])
    tok = tokens.load_tokenizer(cfg.tokenizer)
    open_run(cfg, *launch.TRAINING_STAGES)
    made = llada.new_backbone(cfg, len(tok), tok.eos_token_id, tok.mask_token_id)
    checkpoint.save_backbone(made, cfg.run_dir / "model")
    benchmarks.write_tinycode(cfg)
    return cfg


def test_the_canvas_holds_the_program_and_gives_nothing_of_the_hole_away(run):
    tok = tokens.load_tokenizer(run.tokenizer)
    spell = tokens.byte_table(tok).spelling
    for hole in holes.load(run, "ast-tinycode"):
        for context in ("answer", "program"):
            gap = infill.place(run.but(hole_context=context), tok, hole)
            other = infill.place(run.but(hole_context=context), tok, dataclasses.replace(hole, text="something else"))
            assert (gap.ids, gap.before) == (other.ids, other.before)
            before, after = (b"".join(spell[i] for i in part).decode() for part in gap.text(3).known)
            blank = " " if hole.prefix.endswith(" ") else ""
            assert f"{before}{blank}".endswith(hole.prefix)
            assert after.startswith(hole.suffix.rstrip("\n"))
            assert (hole.problem.strip() in before) == (context == "answer")
            assert (f"<think>\n{hole.reasoning}\n</think>" in before) == (context == "answer")
            assert hole.reasoning
            truth, _ = tokens.tokenize(tok, blank + hole.text)
            assert gap.size == len(truth)
            assert infill.completion(tok, gap, [*truth.tolist(), *tokens.endings(tok)]) == hole.text


@pytest.mark.parametrize("length", ["oracle", "4", "0", "search"])
def test_holes_are_filled_scored_and_counted(run, length):
    cfg = run.but(hole_length=length)
    pipeline.infilled(cfg, "ast-tinycode")
    every = {h.id: h for h in holes.load(cfg, "ast-tinycode")}
    found = scoring.outcomes(cfg, "ast-tinycode")
    assert found.keys() == every.keys()
    rows = [json.loads(x) for x in sampling.samples_path(cfg, "ast-tinycode", None).read_text().splitlines()]
    for r in rows:
        assert r["solution"] == every[r["hole"]].program(r["completion"])
        assert r["settings"]["hole_length"] == length
        assert len(r["ids"]) == r["length"]
        want = {"oracle": [r["size"]], "4": [4], "0": [0], "search": [2, 5]}[length]
        assert r["length"] in want
        if length == "search":
            best = max(r["tried"].values())
            assert r["tried"][str(r["length"])] == best
    if length == "0":
        assert {h for h, r in found.items() if r["passed"]} == scoring.floor(cfg, "ast-tinycode")
    assert f"hole_length {length}" in pipeline.infill_said(cfg, "ast-tinycode")


def test_a_hole_that_does_not_fit_and_one_of_unknown_length_are_refused(run):
    model = infill.Infiller(run)
    long = holes.marked("long.py", b"<fill>" + b"\nx = 1" * 700)
    with pytest.raises(UserError, match=r"long.py: the text around the hole takes \d+ tokens \(\d+ of them after it\)"):
        model.gap(long, 0)
    with pytest.raises(UserError, match=r"nobody knows the true length of the hole in a.py"):
        infill.Infiller(run.but(hole_length="oracle")).gap(holes.marked("a.py", b"x = <fill>\n"), 0)
    with pytest.raises(UserError, match=r"hole_length: .*oracle"):
        run.but(hole_length="long")
    with pytest.raises(UserError, match="model: an autoregressive model fills no holes"):
        infill.Infiller(run.but(model="x"))


class Tty(StringIO):
    def isatty(self):
        return True


def test_the_terminal_shows_the_program_around_its_hole(run, monkeypatch):
    hole = holes.at_node("f.py", CODE.encode(), "5:12")
    text = terminal.fill(run, hole, plain := StringIO())
    assert plain.getvalue() == text
    assert text.startswith(hole.prefix)
    assert text.endswith(hole.suffix)
    monkeypatch.setattr(terminal.Screen.__init__, "__defaults__", (0.0,))
    screen = Tty()
    assert terminal.fill(run, hole, screen) == text
    frames = screen.getvalue().split("\x1b[J")
    assert any(terminal.HIDDEN in f and "total += x" in f and "for x in nums" in f for f in frames)


def test_a_long_program_is_shown_where_its_hole_is(run):
    tok = tokens.load_tokenizer(run.tokenizer)
    source = (
        "".join(f"x{i} = {i}\n" for i in range(100)) + "y = <fill>\n" + "".join(f"z{i} = {i}\n" for i in range(100))
    )
    hole = holes.marked("f.py", source.encode())
    rows = terminal.hole_frame(tok, hole, [tok.mask_token_id] * 3, [], 40, 10).splitlines()
    assert len(rows) == 10
    assert any(terminal.HIDDEN in row for row in rows)


def test_the_command_takes_a_backbone_s_folder(run, tmp_path):
    folder = tmp_path / "backbone"
    tok = tokens.load_tokenizer(run.tokenizer)
    made = llada.new_backbone(run, len(tok), tok.eos_token_id, tok.mask_token_id)
    checkpoint.save_backbone(made, folder, tok)
    (tmp_path / "f.py").write_text(CODE)
    command = [sys.executable, "-m", "treediff.cli", "infill", str(tmp_path / "f.py"), "--backbone", str(folder)]
    done = subprocess.run([*command, "--line", "5", "--hole_length", "3"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(CODE.partition("        if")[0])
    assert done.stdout.endswith("            total += x\n    return total\n")
    done = subprocess.run([*command, "--line", "50"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "there is no line 50" in done.stderr
