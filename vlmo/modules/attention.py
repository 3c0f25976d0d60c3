"""Softmax attention with a learnt bias and padding, fused.

PyTorch's own kernels do all but one thing: on a CPU none gives the bias a gradient, and what is left then keeps every
score for the backward pass. `_attend` here keeps none: forward it is PyTorch's fused kernel, backward it computes the
scores again, a few heads of one sample at a time.

Shapes: B batch, H heads, Q queries, K keys, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 5 << 19  # bytes of scores at a time in the backward pass on a CPU: about what its caches hold


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + padding) v.

    Args:
        q: (B, H, Q, d). k, v: (B, H, K, d).
        bias: broadcast to (B, H, Q, K); its rows may be longer than K, which keeps them aligned in memory.
        padding: (B, 1, 1, K), 0 or -inf; longer likewise.

    Returns:
        (B, H, Q, d)
    """
    keys = k.shape[2]
    if not len(q):  # by hand: some kernels refuse a batch without samples, others then give the bias no gradient
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias[..., :keys]).softmax(dim=-1) @ v
    learnt = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if bias is not None and learnt and q.device.type == "cpu" and bias.shape[:3] == (1, q.shape[1], keys):
        return _attend(q, k, v, bias[..., :keys], padding)
    parts = [part.to(q.dtype) for part in (bias, padding) if part is not None]
    mask = sum(parts[1:], parts[0])[..., :keys] if parts else None  # sliced after the sum: its rows stay aligned
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.library.custom_op("vlmo::attend", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    out = _empty(q)
    for i in range(len(q)):  # (a mask of the whole batch would be B times the bias)
        mask = bias if padding is None else bias + padding[i, ..., : k.shape[2]]
        out[i] = F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], attn_mask=mask.to(q.dtype))[0]
    return out


def _empty(q: Tensor) -> Tensor:
    """Like q, the heads of a position side by side in memory, as the next product reads them."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    return _empty(q)


@torch.library.custom_op("vlmo::attend_backward", mutates_args=(), device_types="cpu")
def _attend_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias: those of the scores are p * (dp - sum(dp * p)), where sum(dp * p) is do * o."""
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    dbias = torch.zeros_like(bias)
    scale, keys = q.shape[-1] ** -0.5, k.shape[2]
    at_once = max(CHUNK // (keys * keys * bias.element_size()), 1)
    for first in range(0, q.shape[1], at_once):
        heads = slice(first, first + at_once)
        for i in range(len(q)):
            # bias.dtype: scores of half precision would lose what little their differences are
            qi, ki, vi, do, o = (part[i, heads].to(bias.dtype) for part in (q, k, v, gradient, out))
            mask = bias[0, heads] if padding is None else bias[0, heads] + padding[i, ..., :keys]
            p = torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale).softmax(dim=-1)
            ds = torch.bmm(do, vi.transpose(1, 2)).sub_((do * o).sum(-1, keepdim=True)).mul_(p)
            dbias[0, heads] += ds
            dv[i, heads] = p.transpose(1, 2) @ do
            dq[i, heads] = (ds @ ki).mul_(scale)
            dk[i, heads] = (ds.transpose(1, 2) @ qi).mul_(scale)
    return dq, dk, dv, dbias


@_attend_backward.register_fake
def _(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _empty(q), _empty(k), _empty(v), torch.zeros_like(bias)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output)


def _differentiate(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
    return *_attend_backward(gradient, *ctx.saved_tensors), None


_attend.register_autograd(_differentiate, setup_context=_save)
