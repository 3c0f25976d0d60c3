"""Fused attention against plain formulas, with the gradient of its bias."""

import pytest
import torch

from vlmo.modules import attention
from vlmo.modules.attention import Attention, attend, rows_at

SIZE, HEADS, LENGTH, WIDTH = 3, 4, 7, 6


def plain(q, k, v, bias, padding):
    """The oracle: every score in memory."""
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    for part in (bias, padding):
        if part is not None:
            scores = scores + part[..., : k.shape[2]]
    return scores.softmax(-1) @ v


def inputs(size=SIZE, length=LENGTH, dtype=torch.float64):
    q, k, v = (torch.randn(size, HEADS, length, WIDTH, dtype=dtype, requires_grad=True) for _ in range(3))
    # rows longer than there are keys, as `AttentionMasks` makes them
    bias = torch.randn(1, HEADS, length, -(-length // 8) * 8, dtype=dtype, requires_grad=True)
    padding = torch.zeros(size, 1, 1, bias.shape[-1], dtype=dtype)
    padding[0, ..., 2:5] = padding[-1, ..., 3] = -torch.inf
    return q, k, v, bias, padding


def results(function, q, k, v, bias, padding):
    """Output and gradients."""
    out = function(q, k, v, bias, padding)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    leaves = [leaf for leaf in (q, k, v, bias) if leaf is not None and leaf.requires_grad]
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


@pytest.mark.parametrize("chunk", [1, 2 * LENGTH**2 * 8, 1 << 20], ids=["a head", "two heads", "all heads"])
@pytest.mark.parametrize("padded", [False, True])
def test_output_and_gradients(monkeypatch, chunk, padded):
    monkeypatch.setattr(attention, "SCORES_PER_CHUNK", chunk)
    q, k, v, bias, padding = inputs()
    for found, expected in zip(
        results(attend, q, k, v, bias, padding if padded else None),
        results(plain, q, k, v, bias, padding if padded else None),
        strict=True,
    ):
        assert torch.allclose(found, expected, atol=1e-12)


def test_a_bias_that_is_not_learnt_and_none():
    q, k, v, bias, padding = inputs()
    for given in ((bias.detach(), padding), (None, padding), (bias.detach(), None), (None, None)):
        for found, expected in zip(results(attend, q, k, v, *given), results(plain, q, k, v, *given), strict=True):
            assert torch.allclose(found, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.allclose(attend(q, k, v, bias, padding), plain(q, k, v, bias, padding), atol=1e-12)


def test_a_batch_without_samples():
    q, k, v, bias, padding = inputs()
    found = results(attend, *(part[:0].detach().requires_grad_() for part in (q, k, v)), bias, padding[:0])
    assert [part.shape[0] for part in found[:4]] == [0] * 4
    assert not found[4].any()


def test_half_precision_keeps_the_differences_between_scores():
    q, k, v, bias, padding = inputs(length=33, dtype=torch.float32)
    exact = results(plain, q, k, v, bias, padding)
    rough = results(attend, *(part.detach().bfloat16().requires_grad_() for part in (q, k, v)), bias, padding)
    assert [part.dtype for part in rough] == [torch.bfloat16] * 4 + [torch.float32]
    for found, expected in zip(rough, exact, strict=True):
        assert torch.allclose(found.float(), expected, atol=0.03 * expected.abs().max().item())


def test_no_score_is_kept_for_the_backward_pass():
    q, k, v, bias, padding = inputs(size=8, length=64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        attend(q, k, v, bias, padding)
    assert max(kept) < 8 * HEADS * 64 * 64


def test_reading_some_positions():
    layer = Attention(HEADS * WIDTH, HEADS).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(SIZE, LENGTH, HEADS * WIDTH, dtype=torch.float64)
    *_, bias, padding = inputs()
    read = torch.tensor([[0, 6], [2, 0], [5, 5]])

    def gradients(out):
        return [out, *torch.autograd.grad(out.square().sum(), [*layer.parameters(), bias])]

    whole, some = gradients(rows_at(layer(x, bias, padding), read)), gradients(layer(x, bias, padding, read))
    assert all(torch.allclose(one, other, atol=1e-12) for one, other in zip(whole, some, strict=True))
