"""The loss against the official code's, the order of samples, and the update's independence of the batch's layout."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_model import golden

from treediff import model, tokens, train
from treediff.config import UserError, resolve

CFG = resolve("paper")


def denoiser():
    return train.Denoiser(model.load_backbone(str(golden("tiny/checkpoint"))))


def losses():
    return load_file(golden("tiny/losses.safetensors"))


@pytest.mark.parametrize("chunk", [5, 10_000])
def test_eq_1_is_the_mean_over_masked_tokens(monkeypatch, chunk):
    monkeypatch.setattr(train, "_CHUNK", chunk)
    g, net = losses(), denoiser()
    mask = g["sft_masked_indices"]
    labels = torch.full(mask.shape, tokens.REASONING, dtype=torch.uint8)
    weight = train.loss_weights(CFG, labels, mask, g["p_mask"][:, 0].double())
    loss, ce = net(g["sft_noisy"], g["input_ids"], mask, weight, None)
    assert loss.item() == pytest.approx(g["unweighted_mean_masked_ce"].item(), rel=1e-5)
    assert ce.sum().item() == pytest.approx(g["unweighted_sum_masked_ce"].item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_llada_s_sft_loss_and_its_gradients(monkeypatch, chunk):
    monkeypatch.setattr(train, "_CHUNK", chunk)
    g, net = losses(), denoiser()
    cfg = CFG.but(loss_weight="inverse_p", normaliser="answer")
    mask = g["sft_masked_indices"]
    labels = torch.full(mask.shape, tokens.REASONING, dtype=torch.uint8)
    for row, n in enumerate(g["prompt_lengths"].tolist()):
        labels[row, :n] = tokens.PROMPT
    weight = train.loss_weights(cfg, labels, mask, g["p_mask"][:, 0].double())
    loss, ce = net(g["sft_noisy"], g["input_ids"], mask, weight, None)
    assert torch.allclose(ce, g["sft_token_ce"], rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(g["sft_loss"].item(), rel=1e-5)
    loss.backward()
    want = load_file(golden("tiny/grads_sft_loss.safetensors"))
    for name, p in net.backbone.named_parameters():
        gradient = want[model.official_name(name)]
        assert (p.grad - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-8, name


class Rows(list):
    """Stands in for the encoded data set: a list of records."""


def data_set(n: int) -> tuple[Rows, np.ndarray]:
    draw = np.random.default_rng(0)
    rows = Rows()
    for _ in range(n):
        prompt, reasoning, code = draw.integers(2, 6), draw.integers(1, 9), draw.integers(4, 30)
        labels = np.concatenate([np.zeros(prompt), np.ones(reasoning), draw.integers(2, 7, code)]).astype(np.uint8)
        spans = np.array([[prompt + reasoning, prompt + reasoning + code, 2]], np.int32)
        rows.append({"input_ids": draw.integers(0, 500, len(labels)), "labels": labels, "spans": spans.reshape(-1)})
    return rows, np.arange(n, dtype=np.int64) * 7919


def batch(cfg, step=3):
    rows, uids = data_set(20)
    return train.Batch(cfg, rows, uids, step, 50, eos=509, mask=510)


@pytest.mark.parametrize("padding", ["batch", "one"])
def test_the_update_does_not_depend_on_the_layout(padding):
    base = CFG.but(eos_padding=padding, masking="ast")
    gradients = []
    for micro, accumulation, processes in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)):
        cfg = base.but(micro_batch=micro, accumulation=accumulation, processes=processes)
        net, b = denoiser(), batch(cfg)
        for rank in range(processes):
            for number in range(accumulation):
                part = b.part(rank, cfg, number)
                seen = b.seen[part]
                loss, _ = net(b.noisy[part], b.ids[part], b.mask[part], b.weight[part], None if seen.all() else seen)
                loss.backward()  # DeepSpeed's division and our factor cancel: gradients add up
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-6


def test_recomputing_activations_changes_nothing():
    cfg = CFG.but(micro_batch=4, accumulation=1, processes=1, lora_rank=4, lora_dropout=0.0)
    gradients = []
    for checkpointing in (False, True):
        net = train.Denoiser(model.add_lora(model.load_backbone(str(golden("tiny/checkpoint"))), cfg)).train()
        train.recompute(net.backbone) if checkpointing else None
        b = batch(cfg)
        net(b.noisy, b.ids, b.mask, b.weight, None)[0].backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2 * 7 * 2
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    lock = train._alone(tmp_path)
    with pytest.raises(UserError, match="another process is training this run"):
        train._alone(tmp_path)
    lock.close()
    train._alone(tmp_path).close()


def test_strategies_see_the_same_rows_and_noise():
    batches = [
        batch(CFG.but(masking=m, micro_batch=8, accumulation=1, processes=1)) for m in ("random", "ast_span", "ast")
    ]
    for b in batches[1:]:
        assert torch.equal(b.ids, batches[0].ids)
        assert torch.equal(b.p, batches[0].p)
        reasoning = b.labels == tokens.REASONING
        assert torch.equal(b.mask & reasoning, batches[0].mask & reasoning)
        assert not torch.equal(b.mask, batches[0].mask)


def test_every_epoch_is_a_permutation():
    cfg = CFG.but(micro_batch=1, accumulation=4, processes=1)
    uids = np.arange(10) * 31
    seen = np.concatenate([train.rows_of_step(cfg, uids, s) for s in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_eos_is_trained_on():
    b = batch(CFG.but(micro_batch=4, accumulation=1, processes=1))
    assert (b.labels[b.ids == 509] == tokens.REASONING).all()
    assert b.seen.all()
    assert (b.ids[:, -1] == 509).all()
    one = batch(CFG.but(micro_batch=4, accumulation=1, processes=1, eos_padding="one"))
    assert ((one.labels == tokens.REASONING) & (one.ids == 509)).sum(1).tolist() == [1] * 4


def test_the_paper_takes_3516_steps():
    assert train.total_steps(CFG, 150_000) == 3516


def test_learning_rate_warms_up_and_decays():
    factors = [train.lr_factor(CFG, s, 1000) for s in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == factors[99] == 1.0
    assert factors[-1] < 1e-4
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))
    assert factors[550] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-3)


def test_the_log_drops_what_a_resumed_run_will_repeat(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path))
    cfg = resolve("tiny")
    path = cfg.run_dir / "log.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    train.StepLog(cfg, 3)
    assert [r["step"] for r in train.read_log(cfg.run_dir)] == [0, 1, 2]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TREEDIFF_RUNS", str(tmp_path))
    cfg = resolve("tiny")
    sums = torch.zeros(2, len(train.NOISE_BUCKETS) - 1 + len(tokens.LABELS) + 1)
    sums[0, -1] = math.nan
    fake = SimpleNamespace(uid=torch.tensor([77]), p=torch.ones(1), ids=torch.zeros(1, 1))
    engine = SimpleNamespace(get_global_grad_norm=lambda: None)
    with pytest.raises(UserError, match=r"loss is nan at step 12 .samples 77"):
        train.StepLog(cfg, 0).add(12, sums, 0.1, 0.1, engine, fake, 0.0)
