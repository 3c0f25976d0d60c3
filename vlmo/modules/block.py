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
        real: Tensor | None = None,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, S, D).
            bias, padding, read: see `Attention`.
            text_len: tokens of the text, at the front of a pair.
            real: (B, S) bool, False on tokens whose result nothing reads; None: all are read.
        """
        arguments = x, bias, modality, text_len, padding, read, real
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
        real: Tensor | None,
    ) -> Tensor:
        x = self._attend(x, bias, padding, read)
        if modality == "vl" and self.has_text_expert and not self.has_vl_expert:
            assert read is None, "below the VL experts, text and image go different ways"
            # .contiguous(): the parts of a pair are strided, which makes the feed-forward's matrix products copy twice
            text, image = (part.contiguous() for part in x.split([text_len, x.shape[1] - text_len], dim=1))
            text = self._expert(text, self.norm2_text, self.mlp_text, None if real is None else real[:, :text_len])
            return torch.cat([text, self._expert(image, self.norm2_imag, self.mlp_imag)], dim=1)
        if modality == "vl" and self.has_vl_expert:
            return self._expert(x, self.norm2_vl, self.mlp_vl, real)
        if modality == "text" and self.has_text_expert:
            return self._expert(x, self.norm2_text, self.mlp_text, real)
        return self._expert(x, self.norm2_imag, self.mlp_imag, real)

    # Stochastic depth: samples that are dropped pass by, the others' branches are scaled up. A CPU computes the others
    # alone, and of them the tokens that are read. A GPU computes all: it would have to be waited for to know how many.

    def _attend(self, x: Tensor, bias: Tensor | None, padding: Tensor | None, read: Tensor | None) -> Tensor:
        step = partial(self.steps[0], self, bias)
        keep, scale = self._drawn(x)
        if keep is None:
            return step(scale, x, padding, read)
        passing = x if read is None else rows_at(x, read)
        return _on_rows(step, scale, keep.nonzero()[:, 0], passing, x, padding, read)

    def _expert(self, x: Tensor, norm: nn.Module, mlp: nn.Module, real: Tensor | None = None) -> Tensor:
        step = partial(self.steps[1], norm, mlp, self.gamma_2)
        keep, scale = self._drawn(x)
        kept = real if keep is None else keep if real is None else keep & real
        if x.device.type != "cpu" or kept is None:
            return step(scale, x)
        tokens = x.flatten(0, 1)
        return _on_rows(step, scale, kept.expand(x.shape[:2]).flatten().nonzero()[:, 0], tokens, tokens).view_as(x)

    def _drawn(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Which samples of x keep a branch, (B, 1) bool, and the scalar that scales theirs; None, None if all do.

        On a GPU, which computes all: None, and a scale of each sample, (B, 1, 1), 0 for those that are dropped.
        """
        rate = self.drop_path.drop_prob
        if not self.training or not rate:
            return None, None
        drawn = x.new_empty(len(x), 1, 1).bernoulli_(1 - rate)
        if x.device.type != "cpu":
            return None, drawn / (1 - rate)
        return drawn[..., 0] > 0, x.new_full((), 1 / (1 - rate))


def _on_rows(
    step: Callable[..., Tensor], scale: Tensor | None, rows: Tensor, passing: Tensor, *arguments: Tensor | None
) -> Tensor:
    """The step on those rows of its arguments; the other rows of the result are those of `passing`."""
    if len(rows) == len(passing):
        return step(scale, *arguments)
    selected = (each if each is None else each.index_select(0, rows) for each in arguments)
    return passing.index_copy(0, rows, step(scale, *selected).to(passing.dtype))


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
) -> Tensor:
    """x + scale * gamma * expert(norm(x)); an expert sees one token at a time."""
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
