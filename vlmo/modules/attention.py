"""Multi-head self-attention with a learnt bias and padding, fused; and the bias and padding of a sequence.

PyTorch's own kernels do all but one thing: on a CPU none gives the bias a gradient, and what is left then keeps every
score for the backward pass. `_attend` here keeps none: forward it is PyTorch's fused kernel; backward it computes the
scores again, as many at a time as a CPU's caches hold, as FlashAttention does (arXiv 2205.14135, section 3.1).

Shapes: B batch, S sequence, D width, H heads, Q queries, K keys, R query positions, d width of a head.
"""

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmo.modules import positions as relpos

Modality = Literal["text", "image", "vl"]

SCORES_PER_CHUNK = 5 << 19  # bytes: 2.5 MiB of scores at a time, what the L2 cache of a server core holds
ALIGNED = 8  # the fused kernels on GPUs copy a mask whose rows do not start at multiples of this


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
        self, x: Tensor, bias: Tensor | None, padding: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Attends: (B, S, D) -> (B, S, D), or (B, R, D) with `positions`.

        Args:
            bias, padding: added to the scores, see `attend`.
            positions: (B, R) query positions, whose output alone is computed; None: all.
        """
        qkv_bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        if type(self.qkv) is not nn.Linear:  # an adapter (LoRA) has more than one weight
            q, k, v = (self.qkv(x) + qkv_bias).chunk(3, dim=-1)
            q = q if positions is None else rows_at(q, positions)
        elif positions is None:
            q, k, v = F.linear(x, self.qkv.weight, qkv_bias).chunk(3, dim=-1)
        else:
            dim = x.shape[-1]
            q = F.linear(rows_at(x, positions), self.qkv.weight[:dim], self.q_bias)
            k, v = F.linear(x, self.qkv.weight[dim:], qkv_bias[dim:]).chunk(2, dim=-1)
        if positions is not None and bias is not None:
            bias = bias[0][:, positions].transpose(0, 1)  # (B, H, R, S)
        # each by itself: of the three in one array the gradients would be copied twice
        q, k, v = (rearrange(each, "b s (h d) -> b h s d", h=self.num_heads) for each in (q, k, v))
        return self.proj(rearrange(attend(q, k, v, bias, padding), "b h s d -> b s (h d)"))


def rows_at(x: Tensor, positions: Tensor) -> Tensor:
    """Picks rows: (B, S, D), (B, R) int64 -> (B, R, D)."""
    return x.gather(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def first_positions(like: Tensor) -> Tensor:
    """Gives (B, 1) zeros for `like` (B, ...): the query position of [CLS] alone."""
    return torch.zeros(like.shape[0], 1, dtype=torch.long, device=like.device)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    """Computes softmax(q k^T / sqrt(d) + bias + padding) v.

    Args:
        q: (B, H, Q, d). k, v: (B, H, K, d).
        bias: broadcast to (B, H, Q, K); its rows may be longer than K, which keeps them aligned in memory.
        padding: (B, 1, 1, K), 0 or -inf; longer likewise.

    Returns:
        (B, H, Q, d)
    """
    keys = k.shape[2]
    if not q.shape[0]:  # by hand: some kernels refuse a batch without samples, others then give the bias no gradient
        scores = q @ k.transpose(-2, -1)
        return (scores if bias is None else scores + bias[..., :keys]).softmax(dim=-1) @ v
    # (a graph that leaves PyTorch has its operations alone)
    own = q.device.type == "cpu" and not torch.compiler.is_exporting()
    if own and bias is not None and bias.shape[:3] == (1, q.shape[1], keys):
        # (calling the operator imports torch's compiler, a second that a prediction need not wait)
        plain = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        return (_attend_in_chunks if plain else _attend)(q, k, v, bias[..., :keys], padding)
    parts = [part.to(q.dtype) for part in (bias, padding) if part is not None]
    mask = sum(parts[1:], parts[0])[..., :keys] if parts else None  # sliced after the sum: its rows stay aligned
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_in_chunks(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, padding: Tensor | None) -> Tensor:
    out = _empty(q)
    for samples, heads in _chunks(q):  # (a mask of the whole batch would be B times the bias)
        part = samples, heads
        mask = _mask(bias, padding, samples, heads).to(q.dtype)
        out[part] = F.scaled_dot_product_attention(q[part], k[part], v[part], attn_mask=mask)
    return out


_attend = torch.library.custom_op("vlmo::attend", _attend_in_chunks, mutates_args=(), device_types="cpu")


def _chunks(q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Samples and heads to compute at a time: some samples whole, or some heads of one."""
    head_bytes = q.shape[2] ** 2 * 4
    heads = min(max(SCORES_PER_CHUNK // head_bytes, 1), q.shape[1])
    samples = max(SCORES_PER_CHUNK // (head_bytes * q.shape[1]), 1)
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
    """Gives the gradients of q, k, v and bias, by FlashAttention's names: P = softmax(S), O = P V, and then

    dV = P^T dO, dP = dO V^T, dS = P * (dP - sum(dO * O)), dQ = dS K, dK = dS^T Q, dbias = dS summed over the samples.
    """
    dq, dk, dv = _empty(q), _empty(k), _empty(v)
    dbias = torch.zeros_like(bias)
    scale = q.shape[-1] ** -0.5
    for samples, heads in _chunks(q):
        part = samples, heads
        shape = q[part].shape[:2]
        # bias.dtype: scores of half precision would lose what little their differences are
        qi, ki, vi, d_out, o = (each[part].to(bias.dtype).flatten(0, 1) for each in (q, k, v, gradient, out))
        mask = _mask(bias, padding, samples, heads).expand(*shape, -1, -1).flatten(0, 1)
        p = torch.baddbmm(mask, qi, ki.transpose(1, 2), alpha=scale).softmax(dim=-1)
        d_scores = torch.bmm(d_out, vi.transpose(1, 2)).sub_((d_out * o).sum(-1, keepdim=True)).mul_(p)
        dbias[0, heads] += d_scores.unflatten(0, shape).sum(0) if shape[0] > 1 else d_scores
        dv[part] = (p.transpose(1, 2) @ d_out).unflatten(0, shape)
        dq[part] = (d_scores @ ki).mul_(scale).unflatten(0, shape)
        dk[part] = (d_scores.transpose(1, 2) @ qi).mul_(scale).unflatten(0, shape)
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


def _rest_of_row(length: int) -> int:
    """How many entries a row of a mask is filled up with; none in a graph that is exported."""
    return 0 if torch.compiler.is_exporting() else -length % ALIGNED


class AttentionMasks(nn.Module):
    """Makes what is added to the attention scores of every block: the relative position bias, and -inf on padding.

    It holds the index tensors, which are derived and never saved: a file of another resolution would carry wrong ones.
    (The table itself is at the root of the model, as in released files.)

    Args:
        window: image patches a side.
        max_text_len: longest text in tokens.
        max_text_len_of_initckpt: text length that the table has room for.
        depth: number of blocks.
        relative_positions: without, only padding is masked.
    """

    def __init__(
        self, window: int, max_text_len: int, max_text_len_of_initckpt: int, depth: int, relative_positions: bool
    ) -> None:
        super().__init__()
        self.depth = depth
        self.max_text_len = max_text_len
        self.num_image_tokens = 1 + window**2
        self.relative_positions = relative_positions
        if relative_positions:
            image = relpos.image_relative_position_index(window)
            text = relpos.text_relative_position_index(max_text_len, window, max_text_len_of_initckpt)
            joint = relpos.joint_relative_position_index(text, image, window)
            self.register_buffer("image_index", image, persistent=False)
            self.register_buffer("text_index", text, persistent=False)
            self.register_buffer("joint_index", joint, persistent=False)

    def forward(
        self, table: Tensor | None, modality: Modality, text_mask: Tensor | None = None
    ) -> tuple[list[Tensor | None], Tensor | None]:
        """Gives the biases of the blocks, and the padding, the same in all; None where there is nothing to add.

        They are apart because together they are B times as large as the bias.

        Args:
            table: (rows, depth * heads), the relative position bias table.
            modality: "text", "image", or "vl" for a pair.
            text_mask: (B, T), 0 on padding; None for images.

        Returns:
            biases (1, heads, S, S'), padding (B, 1, 1, S'): S' is S rounded up to a multiple of ALIGNED, what is beyond
            S counts for nothing.
        """
        biases: list[Tensor | None] = [None] * self.depth
        if table is not None:
            biases = list(self._biases(table, modality, 0 if text_mask is None else text_mask.shape[1]))
        if text_mask is None:
            return biases, None
        after = self.num_image_tokens if modality == "vl" else 0
        after += _rest_of_row(text_mask.shape[1] + after)
        padded = F.pad(text_mask == 0, (0, after), value=False)
        return biases, torch.zeros(padded.shape, device=padded.device).masked_fill(padded, -torch.inf)[:, None, None]

    def _biases(self, table: Tensor, modality: Modality, text_len: int) -> list[Tensor]:
        """Gathers, for each block, (1, heads, S, S')."""
        index = self._index(modality, text_len)
        index = F.pad(index, (0, _rest_of_row(index.shape[0])))
        bias = F.embedding(index, table)  # (S, S', depth * heads)
        return list(bias.permute(2, 0, 1).contiguous().unsqueeze(0).chunk(self.depth, dim=1))

    def _index(self, modality: Modality, text_len: int) -> Tensor:
        """Gives rows of the table, (S, S) int64; shorter texts leave out the rows and columns that they lack."""
        if modality == "image":
            return self.get_buffer("image_index")
        index = self.get_buffer("text_index" if modality == "text" else "joint_index")
        kept = torch.arange(text_len, device=index.device)
        if modality == "vl":
            kept = torch.cat([kept, torch.arange(self.max_text_len, index.shape[0], device=index.device)])
        return index[kept][:, kept]
