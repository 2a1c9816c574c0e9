"""What only a GPU can show; run with `make gpu` or `pytest -m gpu`. docs/training.md lists it."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from test_llada import golden

from treediff.config import resolve
from treediff.model import attention, forward, llada, lora
from treediff.training import loss, plan

pytestmark = pytest.mark.gpu

SHAPE = {"d_model": 512, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 1536, "vocab_size": 2000}


def network(**switches):
    cfg = resolve("paper", lora_dropout=0.0, **switches)
    return lora.add_lora(llada.random_backbone(SHAPE, torch.bfloat16, "cuda"), cfg).train(), cfg


@pytest.mark.parametrize("length", [192, 448, 1088])
def test_gradients_are_finite_with_a_mask_where_cudnn_fails(length):
    """pytorch issue 196678: lengths of which 64 is left over 128, a mask, very negative log-sum-exps."""
    net, _ = network()
    seen = torch.ones(2, length, dtype=torch.bool, device="cuda")
    seen[1, 70:] = False
    ids = torch.randint(0, 1999, (2, length), device="cuda")
    with forward.cudnn(False):
        forward.hidden_states(net, ids, seen).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_with_and_without_cudnn_the_loss_is_the_same():
    net, cfg = network()
    assert forward.cudnn_serves(cfg)
    ids, values = torch.randint(0, 1999, (1, 1024), device="cuda"), []
    places = torch.arange(0, 1024, 3, device="cuda")
    weight = torch.full((len(places),), 1 / len(places), device="cuda")
    for on in (True, False):
        with forward.cudnn(on):
            values.append(loss.Denoiser(net)(ids, places, ids[0, places], weight, None)[0].item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_compiled_blocks_give_the_same_loss_within_bf16():
    ids, values = torch.randint(0, 1999, (1, 512), device="cuda"), []
    places = torch.arange(0, 512, 3, device="cuda")
    weight = torch.full((len(places),), 1 / len(places), device="cuda")
    torch.manual_seed(0)
    net, _ = network()
    for compiled in (False, True):
        if compiled:
            lora.compile_blocks(net)
        values.append(loss.Denoiser(net)(ids, places, ids[0, places], weight, None)[0].item())
    assert values[0] == pytest.approx(values[1], rel=1e-2)


def test_the_rotary_golden_file_holds_on_the_device():
    g = load_file(golden("rotary.safetensors"))
    shape = {**plan.LLADA_8B, "n_layers": 1, "max_sequence_length": 4096, "rms_norm_eps": 1e-5, "rope_theta": 500000.0}
    config = llada.empty({**shape, "vocab_size": shape["embedding_size"]}, torch.bfloat16).config
    x, positions = g["x"][None].cuda(), g["positions"][None].cuda()
    cos, sin = attention.Rotary(config).cuda()(x, positions)
    got = attention.rotate(x, cos[:, None], sin[:, None])[0].cpu()
    assert (got != g["out"]).float().mean() < 0.01


def test_asking_for_free_memory_opens_nothing_on_the_device():
    code = "import torch; from treediff.training import plan; print(min(plan.free_memory())); "
    code += "assert not torch.cuda.is_initialized()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(torch.cuda.mem_get_info()[0], rel=0.2)
