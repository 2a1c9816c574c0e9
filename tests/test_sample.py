"""The sampler against the official code's runs (tests/golden/llada), and its properties."""

import json

import pytest
import torch
from test_model import golden

from treediff import model, sample
from treediff.config import UserError


def cases(name: str) -> list:
    try:
        runs = json.loads((golden(name) / "generate.json").read_text())
    except pytest.skip.Exception:
        return []
    greedy = [r for r in runs if r["kw"]["temperature"] == 0 and r["kw"]["remasking"] == "low_confidence"]
    plain = [r for r in greedy if not r["kw"]["cfg_scale"] and "logits_eos_inf" not in r["kw"]]
    return [
        pytest.param(name, r, id=f"{name}-{i}") for i, r in enumerate(plain) if "confidence_eos_eot_inf" not in r["kw"]
    ]


NETS = {}


def net(name: str):
    return NETS.setdefault(name, model.load_backbone(str(golden(f"{name}/checkpoint"))))


def decoding(run: dict, **changes) -> sample.Decoding:
    kw = run["kw"]
    eos = {510: 509, 126336: 126081}[run["mask_id"]]
    values = {"gen_length": kw["gen_length"], "steps": kw["steps"], "block_length": kw["block_length"]}
    return sample.Decoding(mask_id=run["mask_id"], eos_id=eos, official=True, **{**values, **changes})


def prompts(run: dict) -> list[list[int]]:
    seen = run["attention_mask_ids"] or [[1] * len(p) for p in run["prompt_ids"]]
    return [[i for i, s in zip(p, m, strict=False) if s] for p, m in zip(run["prompt_ids"], seen, strict=True)]


@pytest.mark.parametrize(("name", "run"), cases("tiny") + cases("real_ids"))
def test_official_runs_token_for_token_and_step_for_step(name, run):
    out = sample.decode(net(name), prompts(run), decoding(run))
    length = run["kw"]["gen_length"]
    assert out.ids.tolist() == [row[-length:] for row in run["output_ids"]]
    if run["mask_left"]:
        return  # a committed mask token is open again, so one number per token cannot tell its whole story
    for step, states in enumerate(run["x_before_each_step"]):
        for row, state in enumerate(states):
            assert out.state(row, step, run["mask_id"]).tolist() == state[-length:]


def test_prompts_of_any_lengths_together_give_what_each_gives_alone():
    how = sample.Decoding(mask_id=510, eos_id=509, gen_length=16, steps=16, block_length=8)
    draw = torch.Generator().manual_seed(3)
    many = [torch.randint(0, 500, (n,), generator=draw).tolist() for n in (3, 11, 7, 11)]
    together = sample.decode(net("tiny"), many, how)
    for row, prompt in enumerate(many):
        alone = sample.decode(net("tiny"), [prompt], how)
        assert torch.equal(alone.ids[0], together.ids[row])
        assert torch.equal(alone.committed_at[0], together.committed_at[row])


def test_early_exit_changes_nothing_before_the_first_eos():
    prompt = [[5, 6, 7]]
    free = sample.Decoding(mask_id=510, eos_id=0, gen_length=32, steps=32, block_length=8)
    full = sample.decode(net("tiny"), prompt, free).ids[0].tolist()
    for eos in set(full):  # whichever token we call EOS, the text before it must be the same
        how = sample.Decoding(mask_id=510, eos_id=eos, gen_length=32, steps=32, block_length=8)
        out = sample.decode(net("tiny"), prompt, how)
        cut = full.index(eos)
        assert out.ids[0].tolist()[: cut + 1] == full[: cut + 1]
        assert out.forwards <= 32


def test_the_mask_token_is_never_committed_by_default():
    run = next(p.values[1] for p in cases("tiny") if p.values[1]["mask_left"])
    out = sample.decode(net("tiny"), prompts(run), decoding(run, steps=32).__class__(510, 509, 32, 8, 8))
    assert not (out.ids == 510).any()


def test_temperature_is_a_function_of_the_seed():
    def run(seed):
        how = sample.Decoding(510, 509, 16, 16, 8, temperature=0.9, seed=seed)
        return sample.decode(net("tiny"), [[1, 2, 3]], how).ids.tolist()

    assert run(0) == run(0)
    assert run(0) != run(1)


def test_lengths_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="block_length"):
        sample.Decoding(510, 509, gen_length=30, steps=30, block_length=8)
    with pytest.raises(UserError, match="steps"):
        sample.Decoding(510, 509, gen_length=32, steps=30, block_length=8)


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("<think>\na\n</think>\n\n```python\nx = 1\n```", "x = 1"),
        ("```python\nx = 1", "x = 1"),
        ("Here:\n```\nx = 1\n```\nor\n```python\ny = 2\n```", "x = 1"),
        ("x = 1\n", "x = 1"),
        ("<think>```python\nno\n```</think>\n```py\nyes = 1\n```", "yes = 1"),
    ],
)
def test_first_fence(answer, program):
    assert sample.extract(answer, "solve", "first_fence") == program


def test_a_file_of_other_settings_is_refused_and_a_cut_line_is_dropped(tmp_path):
    path = tmp_path / "s.jsonl"
    line = json.dumps({"task_id": "a", "settings": {"T": 64}})
    path.write_text(line + "\n" + line[:9])
    assert sample._kept(path, {"T": 64}) == {"a"}
    assert path.read_text() == line + "\n"
    with pytest.raises(UserError, match="T = 64, not 32"):
        sample._kept(path, {"T": 32})
