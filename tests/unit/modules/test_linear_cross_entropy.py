"""The loss in chunks is the loss at once, in value and gradients."""

import pytest
import torch
import torch.nn.functional as F

from vlmo.modules import linear_cross_entropy as module
from vlmo.modules.linear_cross_entropy import linear_cross_entropy


def make(rows):
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((rows, 6), (50, 6), (50,))]
    return parts, torch.randint(50, (rows,), generator=generator)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)


@pytest.mark.parametrize("rows", [1, 8, 21])
def test_value_gradients_and_predictions(rows):
    parts, labels = make(rows)
    logits = F.linear(*parts)
    expected = torch.autograd.grad(3 * F.cross_entropy(logits, labels), parts)
    loss, predicted = linear_cross_entropy(*parts, labels)
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels))
    assert torch.equal(predicted, logits.argmax(-1))
    torch.testing.assert_close(torch.autograd.grad(3 * loss, parts), expected)


def test_no_row_is_no_loss():
    parts, labels = make(0)
    loss, _ = linear_cross_entropy(*parts, labels)
    assert loss == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, parts))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_under_autocast(kind):
    parts, labels = make(21)
    parts[2].requires_grad_(False)
    with torch.autocast("cpu", kind):
        loss, _ = linear_cross_entropy(*parts, labels)
        plain = F.cross_entropy(F.linear(*parts).float(), labels)
    torch.testing.assert_close(loss, plain)
    gradients = (torch.autograd.grad(each, parts[:2]) for each in (loss, plain))
    for found, expected in zip(*gradients, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0.05, atol=1e-3)


def test_small_gradients_survive_half_precision():
    """A thousand rows of which each gives a word a probability of a millionth."""
    hidden, weight = torch.zeros(1000, 1), torch.zeros(2, 1, requires_grad=True)
    bias = torch.tensor([0.0, -14.0], requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss, _ = linear_cross_entropy(hidden, weight, bias, torch.zeros(1000, dtype=torch.long))
    (by_bias,) = torch.autograd.grad(loss, [bias])
    torch.testing.assert_close(by_bias, torch.tensor([-8.3e-7, 8.3e-7]), rtol=0.05, atol=0)


def test_without_gradients_none_are_computed():
    parts, labels = make(21)
    with torch.no_grad():
        assert linear_cross_entropy(*parts, labels)[0].grad_fn is None
