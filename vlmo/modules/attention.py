"""Multi-head self-attention with a learnt bias and padding, fused.

PyTorch's own kernels do all but one thing: on a CPU none gives the bias a gradient, and what is left then keeps every
score for the backward pass. `_attend` here keeps none: forward it is PyTorch's fused kernel, backward it computes the
scores again, as many at a time as a CPU's caches hold.

Shapes: B batch, S sequence, D width, H heads, Q queries, K keys, d width of a head.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CHUNK = 5 << 19  # bytes of scores at a time on a CPU


class Attention(nn.Module):
    """Multi-head self-attention; q and v have a bias of their own, k has none (as in BEiT)."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """(B, S, D) -> (B, S, D), or (B, R, D) with `read`.

        Args:
            bias, padding: added to the scores, see `attend`.
            read: (B, R) positions whose output is wanted; None: all.
        """
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if read is None:
            q, k, v = F.linear(x, self.qkv.weight, qkv_bias).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            q = F.linear(rows_at(x, read), self.qkv.weight[:dim], self.q_bias)
            k, v = F.linear(x, self.qkv.weight[dim:], qkv_bias[dim:]).chunk(2, dim=-1)
            if bias is not None:
                bias = bias[0][:, read].transpose(0, 1)  # (B, H, R, S)
        # each by itself: of the three in one array the gradients would be copied twice
        q, k, v = (rearrange(each, "b s (h d) -> b h s d", h=self.num_heads) for each in (q, k, v))
        return self.proj(rearrange(attend(q, k, v, bias, padding), "b h s d -> b s (h d)"))


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """(B, S, D), (B, R) int64 -> (B, R, D)"""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def first_positions(like: Tensor) -> Tensor:
    """(B, 1) zeros for `like` (B, ...): to read [CLS] alone."""
    return torch.zeros(len(like), 1, dtype=torch.long, device=like.device)


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
    if bias is not None and q.device.type == "cpu" and bias.shape[:3] == (1, q.shape[1], keys):
        return _attend(q, k, v, bias[..., :keys], padding)
    parts = [part.to(q.dtype) for part in (bias, padding) if part is not None]
    mask = sum(parts[1:], parts[0])[..., :keys] if parts else None  # sliced after the sum: its rows stay aligned
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@torch.library.custom_op("vlmo::attend", mutates_args=(), device_types="cpu")
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    out = _empty(q)
    for samples, heads in _chunks(q):  # (a mask of the whole batch would be B times the bias)
        part = samples, heads
        mask = _mask(bias, padding, samples, heads).to(q.dtype)
        out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=mask)
    return out


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and heads to compute at a time: some samples whole, or some heads of one."""
    of_a_head = q.shape[2] ** 2 * 4
    heads = min(max(CHUNK // of_a_head, 1), q.shape[1])
    samples = max(CHUNK // (of_a_head * q.shape[1]), 1)
    for head in range(0, q.shape[1], heads):
        for sample in range(0, len(q), samples):
            yield slice(sample, sample + samples), slice(head, head + heads)


def _mask(bias: Tensor, padding: Tensor | None, samples: slice, heads: slice) -> Tensor:
    return bias[:, heads] if padding is None else bias[:, heads] + padding[samples, ..., : bias.shape[-1]]


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
    scale = q.shape[-1] ** -0.5
    for samples, heads in _chunks(q):
        part = samples, heads
        shape = q[part].shape[:2]
        # bias.dtype: scores of half precision would lose what little their differences are
        qi, ki, vi, do, o = (each[part].to(bias.dtype).flatten(0, 1) for each in (q, k, v, gradient, out))
        mask = _mask(bias, padding, samples, heads).expand(*shape, -1, -1).flatten(0, 1)
        p = torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale).softmax(dim=-1)
        ds = torch.bmm(do, vi.transpose(1, 2)).sub_((do * o).sum(-1, keepdim=True)).mul_(p)
        dbias[0, heads] += ds.unflatten(0, shape).sum(0) if shape[0] > 1 else ds
        dv[part] = (p.transpose(1, 2) @ do).unflatten(0, shape)
        dq[part] = (ds @ ki).mul_(scale).unflatten(0, shape)
        dk[part] = (ds.transpose(1, 2) @ qi).mul_(scale).unflatten(0, shape)
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
