"""A block: attention over the whole sequence, then the feed-forward expert of the modality (paper: figure 2).

    x = x + gamma_1 * attention(norm1(x))
    x = x + gamma_2 * expert(norm2(x))

Shapes in comments: B batch, S sequence, R query positions, D width.
"""

from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo.modules.attention import Attention, Modality, rows_at
from vlmo.modules.random import fold_in, uniform

NORM_EPS = 1e-6
EXPERT_DRAWS = {"text": 1, "image": 2, "vl": 3}  # beside the attention's, each a draw of its own


class FeedForward(nn.Module):
    """Two linear layers with a GELU between: one expert."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def leaves_out_rows(x: Tensor) -> bool:
    """Tells whether rows that nothing reads are left out: on a CPU. A GPU would be waited for to say how many stay.

    (Nor by a graph that is exported: its shapes follow from those of its inputs alone.)
    """
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


class DropPath(nn.Module):
    """Stochastic depth: draws which samples pass a branch by (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor, keys: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Draws which samples of x keep a branch, (B, 1) bool, and the scalar that scales theirs; None, None if all do.

        On a GPU, which computes all: None, and a scale of each sample, (B, 1, 1), 0 for those that are dropped.

        Args:
            keys: (B,) what the draw follows from (`vlmo/modules/random.py`); None: the global generator.
        """
        if not self.training or not self.drop_prob:
            return None, None
        keep_prob = 1 - self.drop_prob
        if keys is None:
            drawn = x.new_empty(len(x), 1, 1).bernoulli_(keep_prob)
        else:
            drawn = (uniform(keys, 1, 1) < keep_prob).to(x.dtype)
        if not leaves_out_rows(x):
            return None, drawn / keep_prob
        return drawn[..., 0] > 0, x.new_full((), 1 / keep_prob)


class Block(nn.Module):
    """Shared attention and one feed-forward expert a modality, both under stochastic depth.

    The names of the experts ("imag" for images) are those of released files.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        drop_path: float,
        layer_scale: float | None,
        experts: Collection[Modality],
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attn = Attention(dim, num_heads)
        self.drop_path = DropPath(drop_path)
        # which expert takes a modality; without its own the vision expert does
        self.experts = {modality: modality if modality in experts else "imag" for modality in ("text", "image", "vl")}
        for expert in [each for each in ("text", "imag", "vl") if each in self.experts.values()]:
            self.add_module(f"norm2_{expert}", nn.LayerNorm(dim, eps=NORM_EPS))
            self.add_module(f"mlp_{expert}", FeedForward(dim, int(dim * mlp_ratio)))
        self.gamma_1: nn.Parameter | float = 1.0
        self.gamma_2: nn.Parameter | float = 1.0
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.attention_residual, self.expert_residual = attention_residual, expert_residual

    def compile_residuals(self, recompute: bool) -> None:
        """Has what the block computes compiled when it first runs: once for all blocks, lengths and batches.

        Args:
            recompute: whether each residual stores its input alone, and is computed again in the backward pass.
        """
        self.attention_residual = _compiled(attention_residual, recompute)
        self.expert_residual = _compiled(expert_residual, recompute)

    def forward(
        self,
        x: Tensor,
        bias: Tensor | None,
        modality: Modality,
        text_len: int = 0,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        token_mask: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """Computes one block: (B, S, D) -> (B, S, D), or (B, R, D) with `positions`.

        Args:
            bias, padding, positions: see `Attention`.
            text_len: tokens of the text, at the front of a pair.
            token_mask: (B, S) bool, False on tokens whose result nothing reads; None: all are read.
            keys: (B,) of this use of the block, see `DropPath`.
        """
        x = self._attend(x, bias, padding, positions, keys)
        if modality == "vl" and self.experts["text"] == "text" and self.experts["vl"] != "vl":
            assert positions is None, "below the VL experts, text and image go different ways"
            # .contiguous(): the parts of a pair are strided, which makes the feed-forward's matrix products copy twice
            text, image = (part.contiguous() for part in x.split([text_len, x.shape[1] - text_len], dim=1))
            text = self._apply_expert("text", text, None if token_mask is None else token_mask[:, :text_len], keys)
            return torch.cat([text, self._apply_expert("image", image, None, keys)], dim=1)
        return self._apply_expert(modality, x, token_mask, keys)

    # With stochastic depth, samples that are dropped pass by and the others' branches are scaled up. A CPU computes the
    # others alone, and of them the tokens that are read. A GPU computes all: to know how many, one would wait for it.

    def _attend(
        self,
        x: Tensor,
        bias: Tensor | None,
        padding: Tensor | None,
        positions: Tensor | None,
        keys: Tensor | None,
    ) -> Tensor:
        residual = partial(self.attention_residual, self, bias)
        kept, scale = self.drop_path(x, keys)
        if kept is None:
            return residual(scale, x, padding, positions)
        passing = x if positions is None else rows_at(x, positions)
        return _apply_to_rows(residual, scale, kept.nonzero()[:, 0], passing, x, padding, positions)

    def _apply_expert(self, modality: Modality, x: Tensor, token_mask: Tensor | None, keys: Tensor | None) -> Tensor:
        name = self.experts[modality]
        norm, expert = self.get_submodule(f"norm2_{name}"), self.get_submodule(f"mlp_{name}")
        residual = partial(self.expert_residual, norm, expert, self.gamma_2)
        kept, scale = self.drop_path(x, None if keys is None else fold_in(keys, EXPERT_DRAWS[modality]))
        if not leaves_out_rows(x) or (kept is None and token_mask is None):
            return residual(scale, x)
        rows = token_mask if kept is None else kept if token_mask is None else kept & token_mask
        assert rows is not None
        tokens = x.flatten(0, 1)
        numbers = rows.expand(x.shape[:2]).flatten().nonzero()[:, 0]
        return _apply_to_rows(residual, scale, numbers, tokens, tokens).view_as(x)


def _apply_to_rows(
    residual: Callable[..., Tensor], scale: Tensor | None, rows: Tensor, passing: Tensor, *arguments: Tensor | None
) -> Tensor:
    """Computes those rows of the arguments; the other rows of the result are those of `passing`."""
    if len(rows) == len(passing):
        return residual(scale, *arguments)
    selected = (each if each is None else each.index_select(0, rows) for each in arguments)
    return passing.index_copy(0, rows, residual(scale, *selected).to(passing.dtype))


def attention_residual(
    block: Block,
    bias: Tensor | None,
    scale: Tensor | None,
    x: Tensor,
    padding: Tensor | None,
    positions: Tensor | None,
) -> Tensor:
    """Computes x + scale * gamma_1 * attention(norm1(x)); scale: a scalar, or (B, 1, 1)."""
    attended = block.attn(block.norm1(x), bias, padding, positions)
    return _add_scaled(x if positions is None else rows_at(x, positions), attended, block.gamma_1, scale)


def expert_residual(
    norm: nn.Module, expert: nn.Module, gamma: Tensor | float, scale: Tensor | None, x: Tensor
) -> Tensor:
    """Computes x + scale * gamma_2 * expert(norm2(x)); an expert sees one token at a time."""
    return _add_scaled(x, expert(norm(x)), gamma, scale)


def _add_scaled(x: Tensor, branch: Tensor, gamma: Tensor | float, scale: Tensor | None) -> Tensor:
    if scale is not None:
        gamma = gamma * scale
    return torch.addcmul(x, branch, gamma) if isinstance(gamma, Tensor) else x + gamma * branch


@cache
def _compiled(residual: Callable[..., Tensor], recompute: bool) -> Callable[..., Tensor]:
    return torch.compile(_recomputed(residual) if recompute else residual, dynamic=True)


def _recomputed(residual: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives the residual under an activation checkpoint that is part of the compiled code.

    (A checkpoint around compiled code can meet another of its variants in the backward pass than in the forward pass,
    with other intermediate results.)
    """

    def run(*arguments: Any) -> Tensor:
        def inner(*tensors: Tensor) -> Tensor:
            left = iter(tensors)
            return residual(*(next(left) if isinstance(each, Tensor) else each for each in arguments))

        given = [each for each in arguments if isinstance(each, Tensor)]
        return checkpoint(inner, *given, use_reentrant=False, preserve_rng_state=False)

    return run
