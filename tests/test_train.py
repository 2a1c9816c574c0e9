"""The loss against the official code's, the order of samples, and the update's independence of the batch's layout."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from modes import NoSync
from safetensors.torch import load_file
from test_llada import golden

from treediff.config import resolve
from treediff.errors import UserError
from treediff.masking import tokens
from treediff.model import checkpoint, llada, lora
from treediff.model import forward as forward_passes
from treediff.model.forward import hidden_states
from treediff.training import batch, heartbeat, steplog, train
from treediff.training import loss as eq1
from treediff.training.loss import Denoiser, no_sums

CFG = resolve("paper")


def denoiser():
    return Denoiser(checkpoint.load_backbone(str(golden("tiny/checkpoint"))))


def forward(net, noisy, ids, mask, weight):
    """The loss of tensors (B, L), by way of a micro-batch."""
    seen = torch.ones(mask.shape, dtype=torch.bool)
    m = batch.micro(noisy, ids, mask, weight, torch.zeros(len(mask), dtype=torch.long), mask.byte(), seen)
    return net(m.noisy, m.places, m.targets, m.weight, m.attention_mask)


def losses():
    return load_file(golden("tiny/losses.safetensors"))


@pytest.mark.parametrize("chunk", [5, 10_000])
def test_eq_1_is_the_mean_over_masked_tokens(monkeypatch, chunk):
    monkeypatch.setattr(eq1, "LOGIT_ROWS", chunk)
    g, net = losses(), denoiser()
    mask = g["sft_masked_indices"]
    labels = torch.full(mask.shape, tokens.REASONING, dtype=torch.uint8)
    weight = batch.loss_weights(CFG, labels, mask, g["p_mask"][:, 0].double(), mask | True)
    loss, ce = forward(net, g["sft_noisy"], g["input_ids"], mask, weight)
    assert loss.item() == pytest.approx(g["unweighted_mean_masked_ce"].item(), rel=1e-5)
    assert ce.sum().item() == pytest.approx(g["unweighted_sum_masked_ce"].item(), rel=1e-5)


@pytest.mark.parametrize("chunk", [7, 10_000])
@pytest.mark.parametrize(("kind", "mask", "noisy"), [("sft", "sft_masked_indices", "sft_noisy"), ("pretrain", "", "")])
def test_llada_s_losses_and_their_gradients(monkeypatch, chunk, kind, mask, noisy):
    """Its pre-training loss is that of an answer without a prompt."""
    monkeypatch.setattr(eq1, "LOGIT_ROWS", chunk)
    g, net, want = losses(), denoiser(), load_file(golden(f"tiny/grads_{kind}_loss.safetensors"))
    cfg = CFG.but(loss_weight="inverse_p", normaliser="answer")
    mask, noisy = g[mask or "masked_indices"], g[noisy or "noisy"]
    labels = torch.full(mask.shape, tokens.REASONING, dtype=torch.uint8)
    for row, n in enumerate(g["prompt_lengths"].tolist() if kind == "sft" else []):
        labels[row, :n] = tokens.PROMPT
    weight = batch.loss_weights(cfg, labels, mask, g["p_mask"][:, 0].double(), mask | True)
    loss, ce = forward(net, noisy, g["input_ids"], mask, weight)
    if kind == "sft":
        assert torch.allclose(ce, g["sft_token_ce"], rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(g[f"{kind}_loss"].item(), rel=1e-5)
    loss.backward()
    for name, p in net.backbone.named_parameters():
        gradient = want[llada.official_name(name)]
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


def made(cfg, step=3):
    rows, uids = data_set(20)
    return batch.Batch(cfg, rows, uids, step, 50, eos=509, mask=510)


@pytest.mark.parametrize("padding", ["multiple", "batch", "one"])
def test_the_update_does_not_depend_on_the_layout(monkeypatch, padding):
    monkeypatch.setattr(batch, "MULTIPLE", 8)
    base = CFG.but(eos_padding=padding, masking="ast")
    gradients = []
    for micro, accumulation, processes in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2)):
        cfg = base.but(micro_batch=micro, accumulation=accumulation, processes=processes)
        net, b = denoiser(), made(cfg)
        for rank in range(processes):
            for number in range(accumulation):
                m = b.micro(rank, number)
                loss, _ = net(m.noisy, m.places, m.targets, m.weight, m.attention_mask)
                loss.backward()  # DeepSpeed's division and our factor cancel: gradients add up
        gradients.append(torch.cat([p.grad.flatten() for p in net.parameters()]))
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-6


def test_recomputing_activations_changes_nothing():
    cfg = CFG.but(micro_batch=4, accumulation=1, processes=1, lora_rank=4, lora_dropout=0.0)
    gradients = []
    for how in ("none", "every_2", "all"):
        net = Denoiser(lora.add_lora(checkpoint.load_backbone(str(golden("tiny/checkpoint"))), cfg)).train()
        train.recompute(net.backbone, how)
        marked = [layer.gradient_checkpointing for layer in net.backbone.get_base_model().model.layers]
        assert marked == {"none": [False] * 2, "every_2": [True, False], "all": [True] * 2}[how]
        b = made(cfg)
        forward(net, b.noisy, b.ids, b.mask, b.weight)[0].backward()
        gradients.append([p.grad for p in net.parameters() if p.grad is not None])
    assert len(gradients[0]) == 2 * 7 * 2
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*gradients, strict=True))


def test_a_run_is_trained_by_one_process_at_a_time(tmp_path):
    lock = heartbeat.alone(tmp_path)
    with pytest.raises(UserError, match="another process is training this run"):
        heartbeat.alone(tmp_path, wait=0.3)
    lock.release()
    heartbeat.alone(tmp_path).release()


def test_strategies_see_the_same_rows_and_noise():
    batches = [
        made(CFG.but(masking=m, micro_batch=8, accumulation=1, processes=1)) for m in ("random", "ast_span", "ast")
    ]
    for b in batches[1:]:
        assert torch.equal(b.ids, batches[0].ids)
        assert torch.equal(b.p, batches[0].p)
        reasoning = b.labels == tokens.REASONING
        assert torch.equal(b.mask & reasoning, batches[0].mask & reasoning)
        assert not torch.equal(b.mask, batches[0].mask)


def test_without_eos_to_train_on_rows_of_like_length_go_together_and_padding_is_cut():
    cfg = CFG.but(eos_padding="one", micro_batch=2, accumulation=2, processes=2)
    b, plain = made(cfg), made(cfg.but(eos_padding="batch"))
    assert sorted(b.uid.tolist()) == sorted(plain.uid.tolist())
    lengths = b.attention_mask.sum(1)
    shapes = [[b.micro(rank, number).noisy.shape[1] for rank in range(2)] for number in range(2)]
    assert max(shapes[0]) <= min(shapes[1])  # ranks work on like lengths at the same time
    for rank, number in itertools.product(range(2), range(2)):
        part, m = b.part(rank, number), b.micro(rank, number)
        assert m.noisy.shape == (2, int(lengths[part].max()))
        assert torch.equal(m.targets, b.ids[part][b.mask[part]])
        assert torch.equal(m.noisy.flatten()[m.places], torch.full_like(m.targets, 510))
    assert sum(2 * w for pair in shapes for w in pair) < plain.ids.numel()


def test_every_epoch_is_a_permutation():
    cfg = CFG.but(micro_batch=1, accumulation=4, processes=1)
    uids = np.arange(10) * 31
    seen = np.concatenate([batch.rows_of_step(cfg, uids, s) for s in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_eos_up_to_a_multiple_depends_on_the_row_alone(monkeypatch):
    monkeypatch.setattr(batch, "MULTIPLE", 8)
    cfg = CFG.but(micro_batch=1, accumulation=8, processes=1)
    b, rows = made(cfg), data_set(20)[0]
    own = [len(rows[i]["input_ids"]) for i in batch.rows_of_step(cfg, data_set(20)[1], 3)]
    read = 0
    for number, n in enumerate(own):
        m = b.micro(0, number)
        end = (n // 8 + 1) * 8  # at least one EOS
        assert m.noisy.shape == (1, end)
        assert m.attention_mask is None
        answer = b.labels[number] == tokens.REASONING
        assert answer[n:end].all()
        assert not answer[end:].any()
        read += end
    assert (b.tokens, b.row_tokens) == (read, sum(own))
    assert b.tokens < made(cfg.but(eos_padding="batch")).tokens


def test_a_row_does_not_grow_beyond_the_longest_allowed():
    row = [{"input_ids": np.zeros(130, np.int64), "labels": np.ones(130, np.uint8)}]
    ids, labels, _ = batch.padded(row, 9, "multiple", 160)
    assert ids.shape == (1, 160)
    assert (labels == tokens.REASONING).all()
    assert batch.padded(row, 9, "multiple", 4096)[0].shape == (1, 256)
    assert batch.padded(row, 9, "multiple", 131)[0].shape == (1, 131)


def test_micro_batches_are_cut_to_their_own_longest():
    cfg = CFG.but(micro_batch=2, accumulation=4, processes=1, eos_padding="one")
    b = made(cfg)
    widths = [b.micro(0, i).noisy.shape[1] for i in range(4)]
    assert widths == b.attention_mask.sum(1).view(4, 2).max(1).values.tolist()
    assert len(set(widths)) > 1
    assert b.tokens == 2 * sum(widths)


def test_cudnn_serves_only_where_no_mask_can_occur():
    assert forward_passes.cudnn_serves(CFG)
    for change in ({"eos_padding": "one"}, {"eos_padding": "batch"}, {"micro_batch": 2}):
        assert not forward_passes.cudnn_serves(CFG.but(**change))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for on in (True, False):
        with forward_passes.cudnn(on):
            assert torch.backends.cuda.cudnn_sdp_enabled() == on
        assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_eos_is_trained_on():
    b = made(CFG.but(micro_batch=4, accumulation=1, processes=1, eos_padding="batch"))
    assert (b.labels[b.ids == 509] == tokens.REASONING).all()
    assert b.attention_mask.all()
    assert (b.ids[:, -1] == 509).all()
    one = made(CFG.but(micro_batch=4, accumulation=1, processes=1, eos_padding="one"))
    assert ((one.labels == tokens.REASONING) & (one.ids == 509)).sum(1).tolist() == [1] * 4


def test_the_paper_takes_3516_steps():
    assert batch.total_steps(CFG, 150_000) == 3516


def test_learning_rate_warms_up_and_decays():
    factors = [train.lr_factor(CFG, s, 1000) for s in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) == factors[99] == 1.0
    assert factors[-1] < 1e-4
    assert all(a > b for a, b in itertools.pairwise(factors[100:]))
    assert factors[550] == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.5)), abs=1e-3)


def test_the_log_drops_what_a_resumed_run_will_repeat(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(5)) + '{"step": 5, "lo')
    steplog.keep_before(path, 3)
    assert [r["step"] for r in steplog.read_log(tmp_path)] == [0, 1, 2]


def sums(mean: float, loss: float) -> torch.Tensor:
    """A step of ten masked tokens."""
    s = no_sums(torch.device("cpu"))
    s[0, 0], s[1, 0], s[0, -1], s[1, -1] = 10 * mean, 10, loss, 10
    return s


@pytest.mark.parametrize(
    ("mean", "loss", "norm", "said"),
    [
        (2.0, math.nan, 1.0, r"loss is nan at step 12 .samples 77; last good checkpoint: checkpoints/step-10"),
        (2.0, 2.0, math.inf, r"gradient norm is inf at step 12"),
        (50.0, 50.0, 1.0, r"loss has exploded \(50 nats per masked token, .* at step 12"),
    ],
)
def test_a_step_that_failed_stops_the_run_one_step_later(runs, mean, loss, norm, said):
    cfg = resolve("tiny")
    cfg.run_dir.mkdir(parents=True)
    log = steplog.StepLog(cfg, 10, vocabulary=500, flops=1.0, peak=None)
    fake = SimpleNamespace(step=12, uid=torch.tensor([77]), p=torch.ones(1), tokens=1, row_tokens=1)
    log.add(fake, sums(mean, loss), norm, 0.0)
    with pytest.raises(UserError, match=said):
        log.drain()
    assert steplog.read_log(cfg.run_dir) == []


class Engine:
    """Stands in for DeepSpeed's."""

    def __init__(self, net):
        self.net = net

    def __call__(self, *args):
        return self.net(*args)

    def backward(self, loss):
        loss.backward()


@pytest.mark.parametrize("padding", ["batch", "one"])
@pytest.mark.parametrize("checkpointing", ["none", "every_2", "all"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_host_does_not_wait_for_the_device_within_a_step(monkeypatch, padding, checkpointing, attention):
    monkeypatch.setattr(eq1, "LOGIT_ROWS", 5)
    cfg = CFG.but(eos_padding=padding, micro_batch=4, accumulation=1, processes=1, lora_rank=4)
    net = checkpoint.load_backbone(str(golden("tiny/checkpoint")))
    net.config._attn_implementation = attention
    net = Denoiser(lora.add_lora(net, cfg)).train()
    train.recompute(net.backbone, checkpointing)
    m, total = made(cfg).micro(0, 0), no_sums(torch.device("cpu"))
    assert (m.attention_mask is None) == (padding == "batch")
    with NoSync():
        train.micro_step(Engine(net), m, total, 1)
    with NoSync(), pytest.raises(AssertionError, match="local_scalar_dense"):
        total.sum().item()
    with NoSync(), pytest.raises(AssertionError, match="by a boolean mask"):
        m.noisy[m.noisy > 3]


def test_attention_has_no_mask_where_nothing_is_padded(monkeypatch):
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: calls.append(k) or real(*a, **k)
    )
    net = checkpoint.load_backbone(str(golden("tiny/checkpoint")))
    net.config._attn_implementation = "sdpa"
    hidden_states(net, torch.arange(12)[None])
    assert len(calls) == net.config.num_hidden_layers
    assert all(k["attn_mask"] is None and not k["is_causal"] for k in calls)


def test_the_next_batch_is_made_meanwhile_and_an_error_in_it_is_raised():
    cfg = CFG.but(micro_batch=1, accumulation=2, processes=1)

    def make(step):
        if step == 4:
            raise UserError("row 4")
        return made(cfg, step)

    with batch.Loader(make, 2, 6, 0, torch.device("cpu")) as loader:
        for step in (2, 3):
            got, parts, waited = loader.next()
            assert got.step == step
            assert waited >= 0
            assert len(parts) == 2
            assert torch.equal(parts[1].noisy, made(cfg, step).noisy[1:2])
        with pytest.raises(UserError, match="row 4"):
            loader.next()
