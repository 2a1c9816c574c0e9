"""The sampler against the official code's runs (tests/golden/llada), and its properties."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_llada import golden
from torch.utils._python_dispatch import TorchDispatchMode

from treediff.config import resolve
from treediff.errors import UserError
from treediff.masking import rules
from treediff.model import checkpoint, forward, llada, lora
from treediff.sampling import decode

ENDS = {510: (509,), 126336: (126081, 126348)}


def cases(name: str) -> list:
    try:
        runs = json.loads((golden(name) / "generate.json").read_text())
    except pytest.skip.Exception:
        return []
    return [pytest.param(name, r, id=f"{name}-{i}") for i, r in enumerate(runs)]


NETS = {}


def net(name: str):
    return NETS.setdefault(name, checkpoint.load_backbone(str(golden(f"{name}/checkpoint"))))


def decoding(run: dict, **changes) -> decode.Decoding:
    kw = run["kw"]
    values = {"gen_length": kw["gen_length"], "steps": kw["steps"], "block_length": kw["block_length"]}
    values |= {"temperature": kw["temperature"], "guidance": kw["cfg_scale"], "remasking": kw["remasking"]}
    if kw.get("logits_eos_inf"):
        values["eos_suppression"] = "logits"
    if kw.get("confidence_eos_eot_inf"):
        values["eos_suppression"] = "confidence"
    return decode.Decoding(run["mask_id"], ENDS[run["mask_id"]], **{"official": True, **values, **changes})


def prompts(run: dict) -> list[list[int]]:
    seen = run["attention_mask_ids"] or [[1] * len(p) for p in run["prompt_ids"]]
    return [[i for i, s in zip(p, m, strict=False) if s] for p, m in zip(run["prompt_ids"], seen, strict=True)]


def replay(run: dict, monkeypatch) -> None:
    """Random numbers where the official code drew them: from torch's generator, for the whole canvas at each step."""
    width = len(run["output_ids"][0])
    torch.manual_seed(run["seed"])

    def draw(self, stream, place, n, part=slice(None)):
        if stream == decode.GUMBEL:
            u = torch.rand(len(place), width, n, dtype=torch.float64)
        else:
            u = torch.rand(len(place), width)[..., None]
        assert len(place) == 1
        assert place.numel() <= decode.LOGIT_ROWS
        return u[0, place[0]][part]

    monkeypatch.setattr(decode._Run, "draw", draw)


@pytest.mark.parametrize(("name", "run"), cases("tiny") + cases("real_ids"))
def test_official_runs_token_for_token_and_step_for_step(name, run, monkeypatch):
    if run["seed"] is not None:
        replay(run, monkeypatch)
    states = []
    out = decode.decode(
        net(name), prompts(run), decoding(run), watch=lambda answers, _: states.append(answers.tolist())
    )
    length = run["kw"]["gen_length"]
    assert out.ids.tolist() == [row[-length:] for row in run["output_ids"]]
    if "x_before_each_step" not in run:
        return
    want = [[row[-length:] for row in x] for x in run["x_before_each_step"]]
    # Steps that commit nothing are not watched, so states that repeat are left out on both sides.
    assert states[:-1] == [
        after for before, after in zip(want, [*want[1:], out.ids.tolist()], strict=True) if before != after
    ]
    if run["mask_left"]:
        return  # a committed mask token is open again, so one number per token cannot tell its whole story
    for step, rows in enumerate(want):
        for row, state in enumerate(rows):
            assert out.state(row, step, run["mask_id"]).tolist() == state
    smallest = run["min_relative_confidence_gap_taken_vs_left"]
    if smallest and run["kw"]["remasking"] == "low_confidence" and len(out.ids) == 1:
        # The official log has (p - q) / p; ours the difference of the log-odds, which is no less.
        assert out.margin.item() >= -torch.log1p(torch.tensor(-smallest)) - 1e-4


HOW = decode.Decoding(mask_id=510, ends=(509,), gen_length=16, steps=16, block_length=8)
MODES = {
    "exact": HOW,
    "guided": dataclasses.replace(HOW, guidance=1.5),
    "warm": dataclasses.replace(HOW, temperature=0.8),
    "random": dataclasses.replace(HOW, remasking="random"),
    "no EOS": dataclasses.replace(HOW, eos_suppression="logits"),
    "late EOS": dataclasses.replace(HOW, eos_suppression="confidence"),
    "threshold": dataclasses.replace(HOW, threshold=0.1),
    "prefix": dataclasses.replace(HOW, cache="prefix"),
    "dual": dataclasses.replace(HOW, cache="dual"),
    "all": dataclasses.replace(HOW, threshold=0.1, cache="dual", guidance=0.5, temperature=0.5),
}


@pytest.mark.parametrize("how", MODES.values(), ids=MODES)
def test_prompts_of_any_lengths_together_give_what_each_gives_alone(how):
    draw = torch.Generator().manual_seed(3)
    many = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (3, 11, 7, 11, 1)]
    uids = [5, 9, 2, 2**35, 0]
    together = decode.decode(net("tiny"), many, how, uids)
    for row, prompt in enumerate(many):
        alone = decode.decode(net("tiny"), [prompt], how, uids[row : row + 1])
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.committed_at[0], together.committed_at[row])
        assert torch.allclose(alone.confidence[0], together.confidence[row], atol=1e-5)
        assert alone.margin_at[0] == together.margin_at[row] or alone.margin[0] < 1e-4


def test_rows_that_are_done_early_do_not_depend_on_those_that_are_not():
    """Rows of a batch need different numbers of steps, and some end; whichever token we call the end."""
    draw = torch.Generator().manual_seed(4)
    many = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (3, 11, 7, 12, 1, 9)]
    how = dataclasses.replace(HOW, gen_length=32, steps=32, block_length=16, threshold=0.1, cache="dual")
    free = decode.decode(net("tiny"), many, how)
    assert len({int(at.max()) for at in free.committed_at}) > 2
    for end in free.ids.unique().tolist()[::6]:
        exits = dataclasses.replace(how, ends=(end,))
        together = decode.decode(net("tiny"), many, exits)
        for row in range(len(many)):
            alone = decode.decode(net("tiny"), many[row : row + 1], exits)
            assert torch.equal(alone.ids[0], together.ids[row])
            assert torch.equal(alone.committed_at[0], together.committed_at[row])


def test_early_exit_changes_nothing_before_the_first_end():
    prompt = [[5, 6, 7], [9, 9]]
    how = decode.Decoding(mask_id=510, ends=(0,), gen_length=32, steps=32, block_length=8)
    full = decode.decode(net("tiny"), prompt, dataclasses.replace(how, early_exit=False)).ids.tolist()
    for eos in set(full[0]):  # whichever token we call EOS, the text before it must be the same
        exits = dataclasses.replace(how, ends=(511, eos))
        out = decode.decode(net("tiny"), prompt, exits)
        cut = full[0].index(eos)
        assert out.ids[0].tolist()[: cut + 1] == full[0][: cut + 1]
        behind = -(-(cut + 1) // 8) * 8  # its block is finished, the ones after it are not begun
        assert (out.committed_at[0, :behind] >= 0).all()
        assert (out.committed_at[0, behind:] == decode.NEVER).all()
        if eos not in full[1]:
            assert out.ids[1].tolist() == full[1]
        assert out.forwards <= 32
    assert decode.decode(net("tiny"), prompt[:1], dataclasses.replace(how, ends=(full[0][3],))).forwards == 8


def test_the_mask_token_is_never_committed_by_default():
    run = next(p.values[1] for p in cases("tiny") if p.values[1]["mask_left"])
    official = decode.decode(net("tiny"), prompts(run), decoding(run))
    assert (official.ids == 510).sum() == run["mask_left"]
    for changes in ({}, {"threshold": 0.01}, {"cache": "dual"}):
        out = decode.decode(net("tiny"), prompts(run), decoding(run, official=False, **changes))
        assert not (out.ids == 510).any()


def suppressed_twin(prompt: list[int], how: decode.Decoding) -> list[int]:
    """LLaDA's loop with its two switches for ends of text, from their definition, one row, in float64."""
    x = torch.tensor([[*prompt, *[how.mask_id] * how.gen_length]])
    per_block = how.steps * how.block_length // how.gen_length
    for block in range(how.gen_length // how.block_length):
        stop = len(prompt) + (block + 1) * how.block_length
        for _ in range(per_block):
            with torch.no_grad():
                logits = net("tiny").lm_head(forward.hidden_states(net("tiny"), x))[0].double()
            if how.eos_suppression == "logits":
                logits[:, how.ends[0]] = -torch.inf
            token = logits.argmax(-1)
            if how.eos_suppression == "confidence":
                logits[:, list(how.ends)] = -torch.inf
            p = torch.softmax(logits, -1).gather(1, token[:, None])[:, 0]
            p[(x[0] != how.mask_id) | (torch.arange(x.shape[1]) >= stop)] = -1
            chosen = p.topk(how.block_length // per_block).indices
            x[0, chosen] = token[chosen]
    return x[0, len(prompt) :].tolist()


@pytest.mark.parametrize("switch", ["logits", "confidence"])
def test_ends_of_text_are_suppressed_as_llada_s_switches_define_it(switch):
    """The official runs have no end of text to suppress; here it is what the model says most."""
    prompt = [5, 6, 7]
    how = dataclasses.replace(HOW, gen_length=32, steps=16, official=True)
    free = decode.decode(net("tiny"), [prompt], how).ids[0]
    ends = tuple(free.unique(return_counts=True)[1].argsort(descending=True)[:2].tolist())
    often = dataclasses.replace(how, ends=tuple(free.unique()[list(ends)].tolist()), eos_suppression=switch)
    got = decode.decode(net("tiny"), [prompt], often).ids[0].tolist()
    assert got == suppressed_twin(prompt, often)
    assert got != free.tolist()
    if switch == "logits":
        assert often.ends[0] not in got


def test_temperature_and_random_order_are_functions_of_the_seed():
    for mode in ("warm", "random"):
        runs = [
            decode.decode(net("tiny"), [[1, 2, 3]], dataclasses.replace(MODES[mode], seed=seed)).committed_at.tolist()
            for seed in (0, 0, 1)
        ]
        assert runs[0] == runs[1] != runs[2]


def test_temperature_samples_the_softmax():
    """Many draws at one position against the probabilities themselves."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 9.0]]).repeat(20_000, 1)  # the last is the mask token
    how = decode.Decoding(mask_id=4, ends=(3,), gen_length=1, steps=1, block_length=1, temperature=2.0)
    u = rules.uniform(0, torch.arange(20_000), 0, 0, 5)
    token, odds = decode.propose(logits.clone(), how, torch.tensor([3]), u)
    want = torch.softmax(logits[0, :4] / 2.0, 0)
    assert (torch.bincount(token, minlength=5)[:4] / 20_000 - want).abs().max() < 0.015
    assert torch.allclose(1 / (1 + odds), torch.softmax(logits[:, :4], 1).gather(1, token[:, None])[:, 0], atol=1e-6)


def test_odds_tell_apart_what_a_probability_in_float32_cannot():
    logits = torch.zeros(2, 6)
    logits[:, 2] = torch.tensor([22.0, 23.0])
    _, odds = decode.propose(logits.clone(), dataclasses.replace(HOW, mask_id=5), torch.tensor([4]), None)
    assert torch.softmax(logits, 1)[0, 2] == torch.softmax(logits, 1)[1, 2] == 1
    assert odds[1] < odds[0]
    chosen, gap = decode.most_confident(odds[None], 1)
    assert chosen.tolist() == [[False, True]]
    assert gap.item() == pytest.approx(1.0, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0, float("inf")]), min_size=2, max_size=8), st.data())
def test_commitment_ties_go_by_position(values, data):
    odds = torch.tensor([values])
    number = data.draw(st.integers(1, len(values)))
    chosen, gap = decode.most_confident(odds, number)
    want = sorted(range(len(values)), key=lambda i: (values[i], i))[:number]
    assert chosen[0].nonzero()[:, 0].tolist() == sorted(want)
    assert gap.item() >= 0
    threshold = data.draw(st.sampled_from([0.3, 0.5, 0.9]))
    chosen, _ = decode.sure_enough(odds, threshold)
    want = {i for i, v in enumerate(values) if 1 / (1 + v) >= threshold} | {values.index(min(values))}
    assert set(chosen[0].nonzero()[:, 0].tolist()) == want


# --- fast modes ---------------------------------------------------------------------------------------------------


def test_a_threshold_nothing_reaches_commits_one_token_a_step():
    out = decode.decode(net("tiny"), [[1, 2, 3], [4]], dataclasses.replace(HOW, threshold=1.0, early_exit=False))
    want = decode.decode(net("tiny"), [[1, 2, 3], [4]], dataclasses.replace(HOW, early_exit=False))
    assert torch.equal(out.ids, want.ids)
    assert torch.equal(out.committed_at, want.committed_at)


def test_a_threshold_everything_reaches_takes_one_step_a_block():
    out = decode.decode(net("tiny"), [[1, 2, 3], [4]], dataclasses.replace(HOW, threshold=1e-9, early_exit=False))
    assert out.forwards == 2
    assert out.committed_at[:, 8:].unique().tolist() == [1]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_that_was_just_filled_changes_nothing(cache):
    """One step a block reads everything, so nothing is stale; and a window reads what a pass over all would give it."""
    one = dataclasses.replace(HOW, steps=2, cache=cache)
    many = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    assert torch.equal(
        decode.decode(net("tiny"), many, one).ids,
        decode.decode(net("tiny"), many, dataclasses.replace(one, cache="none")).ids,
    )
    ids, seen = decode.canvas(many, 16, 510)
    bias = forward.padding_bias(net("tiny"), seen)
    kept = forward.KeyValues()
    with torch.no_grad():
        whole = forward.window_states(net("tiny"), ids, 0, bias, kept)
        assert torch.allclose(whole[seen > 0], forward.hidden_states(net("tiny"), ids, seen)[seen > 0], atol=1e-5)
        first, end = 8, ids.shape[1] if cache == "prefix" else 16
        kept.window = slice(first, end)
        part = forward.window_states(net("tiny"), ids[:, first:end], first, bias, kept)
    assert torch.allclose(part, whole[:, first:end], atol=1e-5)


def test_a_cached_block_sees_its_own_commitments_and_stale_surroundings():
    """Against a twin that recomputes: keys and values outside the block from the block's first canvas, inside fresh."""
    how = dataclasses.replace(HOW, cache="dual", early_exit=False)
    prompt = [11, 12, 13, 14]
    got = decode.decode(net("tiny"), [prompt], how)
    llama = net("tiny").model
    ids, _ = decode.canvas([prompt], 16, 510)

    def layers(x, frozen=None, window=None):
        """Each block's input; inside the window fresh, outside from `frozen`."""
        hidden, inputs = llama.embed_tokens(x), []
        rope = llama.rotary_emb(hidden, torch.arange(x.shape[1])[None])
        for number, layer in enumerate(llama.layers):
            if frozen is not None:
                keep = frozen[number].clone()
                keep[:, window] = hidden[:, window]
                hidden = keep
            inputs.append(hidden)
            hidden = layer(hidden, attention_mask=None, position_embeddings=rope)
        return llama.norm(hidden), inputs

    with torch.no_grad():
        for block in range(2):
            window, frozen = slice(4 + 8 * block, 12 + 8 * block), None
            for _ in range(8):
                hidden, inputs = layers(ids, frozen, window)
                frozen = frozen or inputs
                logits = net("tiny").lm_head(hidden)
                logits[..., 510] = -torch.inf
                p, token = torch.softmax(logits, -1).max(-1)
                p[ids != 510] = -1
                p[:, : window.start], p[:, window.stop :] = -1, -1
                ids[0, p.argmax()] = token[0, p.argmax()]
    assert got.ids[0].tolist() == ids[0, 4:].tolist()


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits: their result decides a shape or a Python value."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if boolean or name in (
            "_local_scalar_dense",
            "nonzero",
            "is_nonzero",
            "masked_select",
            "item",
            "unique",
            "equal",
        ):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["exact", "guided", "warm", "random", "late EOS", "prefix", "dual"])
def test_the_host_waits_for_the_device_once_a_block_and_never_in_a_step(mode, monkeypatch):
    how, small = dataclasses.replace(MODES[mode], block_length=4), net("tiny")

    def waits(**changes) -> list[str]:
        with Waits() as mode, monkeypatch.context() as patch:
            for name in ("tolist", "cpu", "numpy"):  # these do not pass through the dispatcher
                real = getattr(torch.Tensor, name)
                patch.setattr(torch.Tensor, name, lambda t, n=name, f=real: mode.seen.append(n) or f(t))
            decode.decode(small, [[1, 2, 3], [4]], dataclasses.replace(how, **changes))
        return mode.seen

    begin = len(waits(early_exit=False))
    assert begin <= 1 + 5  # whether there is any padding, before the first step; and the five results
    assert len(waits()) <= begin + 4  # which rows have ended, per block
    assert len(waits(threshold=1.0)) >= 16  # the counter does count: a threshold looks at each step


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="block_length"):
        decode.Decoding(510, (509,), gen_length=30, steps=30, block_length=8)
    with pytest.raises(UserError, match="steps"):
        decode.Decoding(510, (509,), gen_length=32, steps=30, block_length=8)
    how = decode.Decoding(510, (509,), gen_length=32, steps=32, block_length=8, official=True, cache="dual")
    with pytest.raises(UserError, match="official"):
        decode.decode(net("tiny"), [[1]], how)


def test_bf16_decodes(monkeypatch):
    half = checkpoint.load_backbone(str(golden("tiny/checkpoint")), torch.bfloat16)
    for mode in ("exact", "all", "dual"):
        out = decode.decode(half, [[1, 2, 3], [4]], MODES[mode])
        assert (out.ids < 512).all()
        assert not (out.ids == 510).any()


def test_a_backbone_with_an_adapter_decodes_like_the_merged_one():
    cfg = resolve("tiny", d_model=32, n_layers=2, n_heads=2, mlp_hidden=48)
    wrapped = lora.add_lora(llada.new_backbone(cfg, 512, 509, 510), cfg).eval()
    a = decode.decode(wrapped, [[1, 2, 3]], MODES["dual"]).ids
    assert torch.equal(a, decode.decode(wrapped.merge_and_unload(), [[1, 2, 3]], MODES["dual"]).ids)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "guided", "warm", "random", "late EOS", "prefix", "dual"])
def test_no_step_makes_the_host_wait_on_a_gpu_and_its_tokens_are_the_cpu_s(mode, monkeypatch):
    there = checkpoint.load_backbone(str(golden("tiny/checkpoint")), device="cuda")
    want = decode.decode(net("tiny"), [[1, 2, 3], [4]], MODES[mode])
    real = decode._Run.step

    def step(self, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            real(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(decode._Run, "step", step)
    got = decode.decode(there, [[1, 2, 3], [4]], MODES[mode])
    for row in range(2):
        if want.margin[row] > 1e-3:
            assert torch.equal(got.ids[row], want.ids[row])


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_recorded_passes_give_what_passes_launched_one_by_one_give_bit_for_bit(mode, monkeypatch):
    there = checkpoint.load_backbone(str(golden("tiny/checkpoint")), device="cuda").bfloat16()
    recorded, real = [], forward.Replay.record
    monkeypatch.setattr(forward.Replay, "record", lambda *given: recorded.append(given) or real(*given))
    prompts = [[1, 2, 3], [4], [5, 6]]
    got = decode.decode(there, prompts, MODES[mode])
    monkeypatch.setattr(forward.Replay, "__call__", lambda self, *given: forward.window_states(self.model, *given))
    want = decode.decode(there, prompts, MODES[mode])
    assert recorded
    for a, b in zip(vars(got).values(), vars(want).values(), strict=True):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b
