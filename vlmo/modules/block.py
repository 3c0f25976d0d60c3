"""A block: attention over the whole sequence, then the feed-forward expert of the modality (paper: figure 2).

Shapes in comments: B batch, S sequence, D width.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo.errors import VLMoError
from vlmo.modules.attention import Attention, rows_at

Modality = Literal["text", "image", "vl"]
NORM_EPS = 1e-6


class FeedForward(nn.Module):
    """Two linear layers with a GELU between: one expert."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """`x + gamma_1 * attention(norm1(x))`, then `x + gamma_2 * expert(norm2(x))`, both under stochastic depth."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        experts: Collection[Modality],
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.recompute = recompute
        self.steps: tuple[Callable[..., Tensor], ...] = (attention_step, expert_step)

        def norm() -> nn.Module:
            return nn.LayerNorm(dim, eps=NORM_EPS)

        def expert() -> nn.Module:
            return FeedForward(dim, int(dim * mlp_ratio))

        self.norm1 = norm()
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        self.has_text_expert = "text" in experts
        if self.has_text_expert:
            self.norm2_text, self.mlp_text = norm(), expert()
        self.norm2_imag, self.mlp_imag = norm(), expert()
        self.has_vl_expert = "vl" in experts
        if self.has_vl_expert:
            self.norm2_vl, self.mlp_vl = norm(), expert()
        self.gamma_1: nn.Parameter | float = 1.0
        self.gamma_2: nn.Parameter | float = 1.0
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        modality: Modality,
        text_len: int = 0,
        padding: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """x: (B, S, D); text_len: tokens of the text, at the front of a pair; bias, padding, read: see `Attention`."""
        arguments = x, bias, modality, text_len, padding, read
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, *arguments, use_reentrant=False)
        return self._forward(*arguments)

    def _forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        modality: Modality,
        text_len: int,
        padding: Tensor | None,
        read: Tensor | None,
    ) -> Tensor:
        x = self._under_depth(partial(self.steps[0], self, bias), x, padding, read)
        if modality == "vl" and self.has_text_expert and not self.has_vl_expert:
            assert read is None, "below the VL experts, text and image go different ways"
            # .contiguous(): the slices of a pair are strided, which makes the feed-forward's matrix products copy twice
            text = self._expert(x[:, :text_len].contiguous(), self.norm2_text, self.mlp_text)
            image = self._expert(x[:, text_len:].contiguous(), self.norm2_imag, self.mlp_imag)
            return torch.cat([text, image], dim=1)
        if modality == "vl" and self.has_vl_expert:
            return self._expert(x, self.norm2_vl, self.mlp_vl)
        if modality == "text" and self.has_text_expert:
            return self._expert(x, self.norm2_text, self.mlp_text)
        return self._expert(x, self.norm2_imag, self.mlp_imag)

    def _expert(self, x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
        return self._under_depth(partial(self.steps[1], norm, mlp, self.gamma_2), x)

    def _under_depth(
        self, step: Callable[..., Tensor], x: Tensor, padding: Tensor | None = None, read: Tensor | None = None
    ) -> Tensor:
        """A step under stochastic depth: samples that are dropped pass by, the others' branches are scaled up.

        A CPU computes the others alone. A GPU computes all, as it would have to be waited for to know their number.
        """
        rate = self.drop_path.drop_prob
        if not self.training or not rate:
            return step(None, x, padding, read)
        keep = x.new_empty(len(x), 1, 1).bernoulli_(1 - rate)
        if x.device.type != "cpu":
            return step(keep / (1 - rate), x, padding, read)
        kept, scale = keep.flatten().nonzero()[:, 0], x.new_full((), 1 / (1 - rate))
        if len(kept) == len(x):
            return step(scale, x, padding, read)
        arguments = (each if each is None else each.index_select(0, kept) for each in (x, padding, read))
        passing = x if read is None else rows_at(x, read)
        return passing.index_copy(0, kept, step(scale, *arguments).to(x.dtype))


def attention_step(
    block: "Block",
    bias: Tensor | None,
    scale: Tensor | None,
    x: Tensor,
    padding: Tensor | None,
    read: Tensor | None,
) -> Tensor:
    """x + scale * gamma_1 * attention(norm1(x)); scale: a scalar, or (B, 1, 1)."""
    attended = block.attn(block.norm1(x), bias, padding, read)
    return _add_scaled(x if read is None else rows_at(x, read), attended, block.gamma_1, scale)


def expert_step(
    norm: nn.Module,
    mlp: nn.Module,
    gamma: Tensor | float,
    scale: Tensor | None,
    x: Tensor,
    padding: None,
    read: None,
) -> Tensor:
    """x + scale * gamma * expert(norm(x)); (padding and read: the experts see one token at a time)."""
    return _add_scaled(x, mlp(norm(x)), gamma, scale)


def _add_scaled(x: Tensor, branch: Tensor, gamma: Tensor | float, scale: Tensor | None) -> Tensor:
    if scale is not None:
        gamma = gamma * scale
    return torch.addcmul(x, branch, gamma) if isinstance(gamma, Tensor) else x + gamma * branch


def offloading_wrapper() -> Callable[..., nn.Module]:
    """fairscale's `checkpoint_wrapper`. Raises VLMoError if it is not installed."""
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ModuleNotFoundError as error:
        raise VLMoError(
            "activation_checkpointing=offload: fairscale is not installed: pip install fairscale, or give True"
        ) from error
    return checkpoint_wrapper
