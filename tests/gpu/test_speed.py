"""On a GPU: half precision and compiled blocks against float32, the bias's gradient against plain attention."""

import pytest
import torch

from tests import tiny
from tests.unit.modules.test_attention import plain
from vlmo.modules import attention
from vlmo.modules.attention import attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

STAGE3 = "task_mlm_itm_itc_base"


def on_gpu(model, batch):
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}
    return model.cuda(), moved


def losses(model, batch):
    torch.manual_seed(0)  # the same negatives
    return {name: output.loss for name, output in model(batch).items()}


def bias_gradient(model, batch):
    model.zero_grad()
    sum(losses(model, batch).values()).backward()
    return model.relative_position_bias_table.grad.clone()


def test_bf16_against_float32():
    model, batch = on_gpu(tiny.model(STAGE3), tiny.batch((6, 9)))  # (two pairs: the negatives are determined)
    exact = losses(model, batch)
    with torch.autocast("cuda", torch.bfloat16):
        rough = losses(model, batch)
    for name, loss in exact.items():
        assert rough[name].item() == pytest.approx(loss.item(), rel=3e-2), name


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_gradient_of_the_bias_against_plain_attention(dtype, tolerance):
    q, k, v = (torch.randn(3, 4, 21, 64, device="cuda", dtype=dtype) for _ in range(3))
    bias = torch.randn(1, 4, 21, 24, device="cuda", requires_grad=True)
    padding = torch.zeros(3, 1, 1, 24, device="cuda")
    padding[0, ..., 6:16] = -torch.inf
    weights = torch.randn(3, 4, 21, 64, device="cuda")
    (expected,) = torch.autograd.grad((plain(q.float(), k.float(), v.float(), bias, padding) * weights).sum(), bias)
    (found,) = torch.autograd.grad((attend(q, k, v, bias, padding).float() * weights).sum(), bias)
    assert (found - expected).norm() < tolerance * expected.norm()
    assert not found[..., 21:].any()


def test_gradient_of_the_table_against_plain_attention(monkeypatch):
    model, batch = on_gpu(tiny.model(STAGE3), tiny.batch((6, 9)))
    found = bias_gradient(model, batch)
    monkeypatch.setattr(attention, "attend", plain)
    expected = bias_gradient(model, batch)
    assert (found - expected).norm() < 1e-3 * expected.norm()


def test_deterministic_gradients_are_repeatable():
    model, batch = on_gpu(tiny.model(STAGE3), tiny.batch((6, 9)))
    torch.use_deterministic_algorithms(True)
    try:
        first, again = bias_gradient(model, batch), bias_gradient(model, batch)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, again)


def test_compiled_blocks():
    model, batch = on_gpu(tiny.model(STAGE3, drop_path_rate=0.1), tiny.batch((6, 9)))
    exact, expected = losses(model, batch), bias_gradient(model, batch)
    model.transformer.compile_steps()
    for name, loss in losses(model, batch).items():
        assert loss.item() == pytest.approx(exact[name].item(), rel=1e-4), name
    found = bias_gradient(model, batch)
    assert (found - expected).norm() < 1e-3 * expected.norm()
