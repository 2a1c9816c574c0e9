"""The sampler under Dream's algorithms against the official code's runs (golden/dream), and under shift."""

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_backbones import golden

from treediff.errors import UserError
from treediff.model import backbones, checkpoint, forward
from treediff.sampling import decode, infill

SHAPES = ("tiny_untied", "tiny_tied")
ALGORITHMS = {"maskgit_plus": "maskgit", "topk_margin": "margin", "entropy": "entropy", "origin": "origin"}
ALGORITHMS["confidence_threshold"] = "maskgit"
END = 503
NETS = {}


def net(shape: str):
    return NETS.setdefault(shape, checkpoint.load_backbone(str(golden(f"{shape}/checkpoint"))))


def cases(file: str, chosen) -> list:
    found = []
    for shape in SHAPES:
        try:
            runs = json.loads(golden(f"{shape}/{file}.json").read_text())
        except pytest.skip.Exception:
            continue
        found += [pytest.param(shape, r, id=f"{shape}-{r['tag']}") for r in runs if chosen(r)]
    return found or [pytest.param("", None, marks=pytest.mark.skip(reason=f"needs golden files of dream: {file}.json"))]


def decoding(run: dict, **changes) -> decode.Decoding:
    kw = {**run["kw"], **run.get("effective", {})}
    length = kw.get("max_new_tokens") or kw["max_length"] - len(run["prompt_ids"][0])
    values = {"gen_length": length, "steps": kw["steps"], "block_length": kw.get("block_length", length)}
    values |= {"temperature": kw["temperature"], "remasking": ALGORITHMS[kw["alg"]], "schedule": "timestep"}
    values |= {"top_p": kw.get("top_p") or 1.0, "top_k": kw.get("top_k") or 0, "eps": kw.get("eps", 1e-3)}
    return decode.Decoding(run["mask_id"], (END,), **{"official": True, **values, **changes})


def prompts(run: dict) -> list[list[int]]:
    seen = run.get("attention_mask") or [[1] * len(p) for p in run["prompt_ids"]]
    return [[i for i, s in zip(p, m, strict=True) if s] for p, m in zip(run["prompt_ids"], seen, strict=True)]


def same_steps(run: dict, how: decode.Decoding, name: str = "x_before_each_step") -> decode.Decoded:
    """Decode, and hold the ids and every state in between to the run's. Steps that commit nothing are left out."""
    states = []
    out = decode.decode(net(run["shape"]), prompts(run), how, watch=lambda answers, _: states.append(answers.tolist()))
    length = how.gen_length
    assert out.ids.tolist() == [row[-length:] for row in run["output_ids"]]
    want = [[row[-length:] for row in x] for x in run[name]] + [out.ids.tolist()]
    moved = [after for before, after in itertools.pairwise(want) if before != after]
    assert states[:-1] == moved
    assert out.forwards == len(moved)  # a step that commits nothing asks nothing
    return out


PLAIN = cases("generate", lambda r: r["deterministic"] and "infill" not in r["tag"] and "adverse" not in r["tag"])


@pytest.mark.parametrize(("shape", "run"), PLAIN)
def test_official_runs_token_for_token_and_step_for_step(shape, run):
    out = same_steps({**run, "shape": shape}, decoding(run))
    want = run["x_before_each_step"]
    for step, rows in enumerate(want):
        for row, state in enumerate(rows):
            assert out.state(row, step, run["mask_id"]).tolist() == state[-out.ids.shape[1] :]


OPEN = cases(
    "generate_open_dllm", lambda r: r["entry"] == "diffusion_generate" and r["deterministic"] and "p2" not in r["tag"]
)


@pytest.mark.parametrize(("shape", "run"), OPEN)
def test_open_dllm_s_runs(shape, run):
    same_steps({**run, "shape": shape}, decoding(run))


FAST = cases("generate_fast_dllm", lambda r: True)


@pytest.mark.parametrize(("shape", "run"), FAST)
def test_fast_dllm_s_runs(shape, run):
    """Its block decoding ranks by entropy whatever `alg` says, and leaves masks where steps = blocks."""
    kw, blocks = run["kw"], "block" in run["tag"]
    how = {"threshold": kw.get("threshold", 0.0), "cache": "none"}
    if blocks:
        how["cache"] = "dual" if kw.get("dual_cache") else "prefix"
    if kw["alg"] == "maskgit_plus":
        how["remasking"] = "entropy"
    out = same_steps({**run, "shape": shape}, decoding(run, **how), "x_before_each_forward")
    assert (out.ids == run["mask_id"]).sum() == run["mask_left"]


INFILL = ("infill_and_append", "infill_entropy_6")
HOLES = cases("generate", lambda r: r["tag"] in INFILL) + cases("generate_open_dllm", lambda r: r["tag"] in INFILL)


def pieces(ids: list[int], mask: int) -> infill.Gapped:
    """A text with masks as its known pieces and the lengths of its holes."""
    runs = [(masked, len(list(g))) for masked, g in itertools.groupby(i == mask for i in ids)]
    known, lengths, at = [[]], [], 0
    for masked, n in runs:
        if masked:
            lengths.append(n)
            known.append([])
        else:
            known[-1] = ids[at : at + n]
        at += n
    return infill.Gapped(known, lengths)


@pytest.mark.parametrize(("shape", "run"), HOLES)
def test_official_infilling(shape, run):
    mask, canvas = run["mask_id"], run["x_before_each_step"][0][0]
    text, masked = pieces(canvas, mask), canvas.count(mask)
    how = decoding(run, official=False, early_exit=False, block_length=masked, holes=masked // run["kw"]["steps"])
    states = []
    found = infill.fill(net(shape), [text], how, watch=lambda answers, _: states.append(answers[0].tolist()))[0]
    holes = [i for i, token in enumerate(canvas) if token == mask]
    want = [[x[0][i] for i in holes] for x in [*run["x_before_each_step"], run["output_ids"]]]
    assert [i for hole in found.holes for i in hole] == want[-1]
    assert states[:-1] == [after for before, after in itertools.pairwise(want) if before != after]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("remasking", ["maskgit", "entropy", "margin", "origin", "low_confidence"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_rows_of_unequal_mask_counts_do_not_depend_on_each_other(shape, remasking, cache):
    """Dream's own code takes the batch's mean: one row keeps masks, another loses its prompt to them."""
    mask = net(shape).official_config.get("mask_token_id", 505)
    texts = [
        infill.Gapped([[5, 6, 7], [8, 9], []], [6, 3]),
        infill.Gapped([[], [11]], [4]),
        infill.Gapped([[3], []], [1]),
    ]
    how = decode.Decoding(mask, (END,), 0, 0, 4, remasking=remasking, schedule="timestep", holes=2, early_exit=False)
    how = dataclasses.replace(how, cache=cache)
    together = infill.fill(net(shape), texts, how, [4, 5, 6])
    for i, text in enumerate(texts):
        alone = infill.fill(net(shape), [text], how, [4 + i])[0]
        assert together[i].holes == alone.holes
        assert together[i].committed_at == alone.committed_at
        assert all(mask not in hole for hole in alone.holes) or remasking == "origin"


def naive(net, canvas, mask, block, cache="none"):
    """One token a step in blocks of masks, in the order of the text, by literal loops: the surest by its lead.

    The logits for position i are those at i - 1. With a cache, what lies outside the window is as the block's first
    pass left it: its keys and values, and its logits.
    """
    ids, head = list(canvas), forward.lm_head(net)
    holes = [i for i, token in enumerate(ids) if token == mask]
    for start in range(0, len(holes), block):
        inside = holes[start : start + block]
        kept, whole = forward.KeyValues(), None
        for step in range(len(inside)):
            low, high = 0, len(ids)
            if cache != "none" and step:
                low, high = inside[0], (inside[-1] + 1 if cache == "dual" else len(ids))
            kept.window = slice(low, high) if step and cache != "none" else None
            x = torch.tensor([ids])[:, low:high]
            logits = head(forward.window_states(net, x, low, None, kept if cache != "none" else None))[0]
            logits[:, mask] = -torch.inf
            whole = logits.clone() if whole is None else whole
            best = None
            for i in inside:
                if ids[i] != mask:
                    continue
                row = max(i - 1, 0)
                p = (logits[row - low] if low <= row < high else whole[row]).softmax(0)
                two = p.topk(2)
                lead = (two.values[0] - two.values[1]).item()
                if best is None or lead > best[0]:
                    best = (lead, i, two.indices[0].item())
            ids[best[1]] = best[2]
    return [ids[i] for i in holes]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_what_a_cache_keeps_under_shift(shape, cache):
    mask = net(shape).official_config.get("mask_token_id", 505)
    how = decode.Decoding(mask, (END,), 16, 16, 4, remasking="margin", cache=cache, early_exit=False)
    for seed in range(3):
        prompt = torch.randint(0, 500, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        with torch.no_grad():
            want = naive(net(shape), prompt + [mask] * 16, mask, 4, cache)
        assert decode.decode(net(shape), [prompt], how).ids[0].tolist() == want


@pytest.mark.parametrize("shape", SHAPES)
def test_holes_are_filled_as_in_the_order_of_the_text(shape):
    """The canvas holds the known text first: a token's predecessor is found by its place in the text."""
    mask = net(shape).official_config.get("mask_token_id", 505)
    how = decode.Decoding(mask, (END,), 0, 0, 4, remasking="margin", holes=1, early_exit=False)
    draw = torch.Generator().manual_seed(1)
    for lengths in ([5], [3, 6], [1, 1, 4]):
        known = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (0, 3, 2, 4)[: len(lengths) + 1]]
        text = list(known[0])
        for n, piece in zip(lengths, known[1:], strict=True):
            text += [mask] * n + piece
        with torch.no_grad():
            want = naive(net(shape), text, mask, 4)
        found = infill.fill(net(shape), [infill.Gapped(known, lengths)], how)[0]
        assert [i for hole in found.holes for i in hole] == want


HOW = decode.Decoding(mask_id=506, ends=(END,), gen_length=16, steps=16, block_length=8)
MODES = {
    "exact": HOW,
    "timestep": dataclasses.replace(HOW, schedule="timestep", remasking="entropy", steps=10),
    "cut": dataclasses.replace(HOW, remasking="margin", temperature=0.7, top_p=0.9, top_k=30),
    "origin": dataclasses.replace(HOW, schedule="timestep", remasking="origin"),
    "guided": dataclasses.replace(HOW, guidance=1.5, cache="dual"),
    "late EOS": dataclasses.replace(HOW, remasking="entropy", eos_suppression="confidence"),
    "threshold": dataclasses.replace(HOW, threshold=0.1, remasking="maskgit"),
    "prefix": dataclasses.replace(HOW, cache="prefix", threshold=0.2),
    "all": dataclasses.replace(HOW, threshold=0.1, cache="dual", guidance=0.5, temperature=0.5),
}


def some_net(kind: str):
    """Dream's shape with biases, shifted; or LLaDA's, not shifted. Needs no file."""
    if kind not in NETS:
        torch.manual_seed(3)
        sizes = {"num_hidden_layers": 2, "vocab_size": 512, "max_position_embeddings": 256, "rms_norm_eps": 1e-6}
        sizes |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128}
        record = backbones.DREAM if kind == "Dream" else backbones.LLADA
        config = {"model_type": kind if kind == "Dream" else "llada", "rope_theta": 1e6, "vocab_size": 512}
        config |= {record.key(name): size for name, size in sizes.items()}
        NETS[kind] = backbones.random_weights(config, torch.float32, "cpu")
    return NETS[kind]


@pytest.mark.parametrize("kind", ["Dream", "LLaDA"])
@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_prompts_of_any_lengths_together_give_what_each_gives_alone(kind, how):
    draw = torch.Generator().manual_seed(3)
    many = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (3, 11, 6, 11, 1)]
    uids = [5, 9, 2, 2**35, 0]
    together = decode.decode(some_net(kind), many, how, uids)
    for row, prompt in enumerate(many):
        alone = decode.decode(some_net(kind), [prompt], how, uids[row : row + 1])
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.committed_at[0], together.committed_at[row])


@pytest.mark.parametrize("kind", ["Dream", "LLaDA"])
def test_without_a_temperature_maskgit_is_low_confidence(kind):
    one, other = (dataclasses.replace(HOW, remasking=r) for r in ("maskgit", "low_confidence"))
    a, b = (decode.decode(some_net(kind), [[1, 2, 3]], how) for how in (one, other))
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.committed_at, b.committed_at)
    warm = dataclasses.replace(one, temperature=3.0, top_k=1)  # one token is left to draw from, and is sure
    assert torch.all(decode.decode(some_net(kind), [[1, 2, 3]], warm).confidence == 1)


@given(st.integers(0, 300), st.integers(1, 300))
@settings(max_examples=60)
def test_dream_s_schedule_commits_every_mask_and_less_at_first(masked, steps):
    numbers = decode.timestep_commits(masked, decode.shares(steps, 1e-3))
    assert len(numbers) == steps
    assert sum(numbers) == masked
    assert numbers[0] <= max(1, masked // steps) or steps == 1


def test_a_row_s_draws_under_origin_do_not_leave_masks():
    how = MODES["origin"]
    out = decode.decode(some_net("Dream"), [[1, 2]] * 8, how, range(8))
    assert (out.ids != how.mask_id).all()
    assert len({tuple(at) for at in out.committed_at.tolist()}) == 8
    early = (out.committed_at[:, :8] < 4).float().mean()
    assert 0.3 < early < 0.7  # each step takes as many on average


@given(st.floats(0.01, 1.0), st.integers(0, 12), st.integers(0, 2**31))
def test_likeliest_keeps_the_smallest_set_with_that_share(top_p, top_k, seed):
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(seed))
    kept = decode.likeliest(logits, top_p, top_k) > -torch.inf
    for row, keep in zip(logits.softmax(1).tolist(), kept.tolist(), strict=True):
        share, want = 0.0, []
        for i in sorted(range(10), key=lambda i: -row[i]):
            if want and (share > top_p and top_p < 1):
                break
            want.append(i)
            share += row[i]
        want = want[:top_k] if top_k else want
        assert [i for i in range(10) if keep[i]] == sorted(want)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remasking": "origin"}, "origin commits by the chance"),
        ({"remasking": "entropy", "threshold": 0.9}, "threshold: it is a probability, and entropy"),
    ],
)
def test_what_does_not_go_together_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        dataclasses.replace(HOW, **changes)


ORIGIN = cases("generate", lambda r: r["tag"] == "origin_T0_seed3")


@pytest.mark.parametrize(("shape", "run"), ORIGIN)
def test_origin_with_the_official_code_s_random_numbers(shape, run, monkeypatch):
    """It draws a number for each mask that is left, at each step, and commits where that is below the step's share."""

    def draw(self, stream, place, width, part=slice(None)):
        drawn = torch.zeros(place.numel(), dtype=torch.float64)
        left = int((self.answers == self.how.mask_id).sum())
        drawn[:left] = 1 - torch.rand(left).double()
        return drawn[:, None]

    monkeypatch.setattr(decode._Run, "draw", draw)
    torch.manual_seed(run["seed"])
    states = []
    decode.decode(net(shape), prompts(run), decoding(run), watch=lambda answers, _: states.append(answers.tolist()))
    length = run["kw"]["max_new_tokens"]
    assert states[:-1] == [[row[-length:] for row in x] for x in [*run["x_before_each_step"][1:], run["output_ids"]]]
