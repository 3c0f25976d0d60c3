"""The multiway transformer: shared self-attention, one feed-forward expert a modality.

Paper: Mixture-of-Modality-Experts Transformer, equations 1 and 2.

A sequence is text [CLS] w1 .. wT, or an image [CLS] p1 .. pN, or a pair: the text followed by the image. Every block
attends over the whole sequence with the same weights. Its feed-forward part is an expert of the modality: text tokens
go through the language expert, image tokens through the vision expert; in the top blocks a pair goes whole through the
vision-language expert.

Shapes in comments: B batch, T text tokens, I image tokens (1 + patches), S sequence, D width, H heads.
The relative position bias comes from outside (`AttentionMasks`), because its table is one for all blocks.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlmo.errors import VLMoError
from vlmo.modules.attention import Modality
from vlmo.modules.block import NORM_EPS, Block
from vlmo.modules.random import fold_in, uniform
from vlmo.registry import ARCHITECTURES

PAD_ID = 0  # of BERT's vocabulary, which the released files fix
BERT_NORM_EPS = 1e-12
PATCH_SIZE = 16  # pixels a side, of every published architecture
# of compiled code: with padding or not, query positions or all, in training or evaluation, ...
MAX_VARIANTS = 32


@torch.no_grad()
def _trunc_normal(tensor: Tensor, std: float) -> None:
    """Draws from a normal distribution cut at -2 and 2, by timm's formula: torch's own draws other numbers."""
    tensor.uniform_(-1, 1).erfinv_().mul_(std * math.sqrt(2)).clamp_(-2, 2)


class PatchEmbed(nn.Module):
    """Square patches of an image, each projected to the width."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, patches, D)"""
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


class TextEmbeddings(nn.Module):
    """BERT's input embedding: word + token type 0 (+ position), LayerNorm, dropout.

    A module of its own because transformers >= 5 always adds absolute positions, which base and large must not: their
    positions come from the relative bias, and the parameter is kept unused, for the names and shapes of released files.
    """

    def __init__(
        self, vocab_size: int, embed_dim: int, max_text_len: int, absolute_positions: bool, dropout: float
    ) -> None:
        super().__init__()
        self.absolute_positions = absolute_positions
        self.word_embeddings = nn.Embedding(vocab_size, embed_dim, padding_idx=PAD_ID)
        self.position_embeddings = nn.Embedding(max_text_len, embed_dim)
        self.token_type_embeddings = nn.Embedding(2, embed_dim)
        self.LayerNorm = nn.LayerNorm(embed_dim, eps=BERT_NORM_EPS)  # BERT's name, part of the state dict's contract
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, D); keys: (B,) what dropout follows from, None: the global generator."""
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        if self.absolute_positions:
            positions = torch.arange(ids.shape[1], device=ids.device)
            x = x + self.position_embeddings(positions)
        x = self.LayerNorm(x)
        if keys is None or not self.training or not self.dropout.p:
            return self.dropout(x)
        return x * (uniform(keys, *x.shape[1:]) >= self.dropout.p) / (1 - self.dropout.p)


class Pooler(nn.Module):
    """Takes tanh of a linear map of position 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) -> (B, D)"""
        return torch.tanh(self.dense(hidden[:, 0]))


class MultiWayTransformer(nn.Module):
    """The blocks, the image embedding and the last norm.

    Args:
        img_size: pixels a side.
        patch_size: pixels a side of a patch.
        embed_dim: width D.
        depth: number of blocks.
        num_heads: attention heads of every block.
        vl_start: number of the first block with a vision-language expert (`depth`: none has one).
        mlp_ratio: hidden width of an expert over D.
        layer_scale: initial value of LayerScale's gammas; None: no LayerScale.
        relative_positions: positions come from the relative position bias; else `pos_embed` is added to the image.
        drop_path_rate: stochastic depth of the last block; it rises linearly from 0.
        experts: those that the blocks have beside the vision expert, "vl" from `vl_start` on. Without any, the vision
            expert takes every modality: a standard transformer.
        init_std: deviation of the initial weights.
        activation_checkpointing: True: blocks keep their input alone and compute the rest again in the backward pass;
            "offload": and keep that in the CPU's memory.

    Raises:
        VLMoError: if "offload" is asked for without fairscale.
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = PATCH_SIZE,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        vl_start: int = 10,
        mlp_ratio: float = 4.0,
        layer_scale: float | None = 0.1,
        relative_positions: bool = True,
        drop_path_rate: float = 0.0,
        experts: Collection[Modality] = ("text", "vl"),
        init_std: float = 0.02,
        activation_checkpointing: bool | Literal["offload"] = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.depth, self.num_heads = embed_dim, depth, num_heads
        self.vl_start = vl_start if "vl" in experts else depth
        single = tuple(expert for expert in experts if expert != "vl")
        self.recompute = activation_checkpointing is True
        self.patch_size = patch_size
        self.window = img_size // patch_size  # patches a side
        self.relative_positions = relative_positions
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = None if relative_positions else nn.Parameter(torch.zeros(1, 1 + self.window**2, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale, experts if i >= vl_start else single)
            for i, rate in enumerate(rates)
        )
        if activation_checkpointing == "offload":
            wrap = offloading_wrapper()
            for block in self.blocks:
                wrap(block, offload_to_cpu=True)  # in place: names stay
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.init_weights(init_std)

    def init_weights(self, std: float) -> None:
        """Truncated normal of deviation `std`; biases 0, norms 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                _trunc_normal(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        _trunc_normal(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            _trunc_normal(self.pos_embed, std=0.02)

    def compile_blocks(self) -> None:
        """Has what the blocks compute compiled when they first run."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
        for module in self.modules():
            if isinstance(module, Block):
                module.compile_residuals(self.recompute)
        self.recompute = False  # (the blocks do)

    def embed_image(self, image: Tensor, patch_mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """Embeds images: (B, 3, size, size) -> (B, I, D), [CLS] and the patches, before any block.

        Args:
            patch_mask: (B, I - 1) bool: patches whose embedding is replaced by `mask_token`.
            mask_token: (1, 1, D).
        """
        patches = self.patch_embed(image)
        if patch_mask is not None and mask_token is not None:
            patches = torch.where(patch_mask.unsqueeze(-1), mask_token.to(patches.dtype), patches)
        x = torch.cat([self.cls_token.expand(image.shape[0], -1, -1).to(patches.dtype), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def encode(
        self,
        x: Tensor,
        biases: Sequence[Tensor | None],
        modality: Modality,
        text_len: int = 0,
        vl_branch: bool = False,
        padding: Tensor | None = None,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Applies all blocks and the last norm to one sequence; with `vl_branch` also its vision-language view.

        The vision-language view of a single modality leaves the hidden state before the first VL block and passes the
        remaining blocks again, with the VL expert: the features of the VL-FFN branch.

        Args:
            x: (B, S, D) embeddings.
            biases: per block, added to the attention scores; padding: added in all blocks (see `attend`).
            modality: of the experts to use.
            text_len: tokens of the text at the front of a pair.
            positions: (B, R) query positions: the last block computes those alone, and the experts compute nothing of
                padding on a CPU; None: all.
            keys: (B,) what stochastic depth follows from, see `DropPath`; None: the global generator.

        Returns:
            hidden states (B, S, D), or (B, R, D), and those of the VL branch or None.
        """
        vl_hidden: Tensor | None = None
        token_mask = None
        if positions is not None and padding is not None:  # nothing reads what becomes of the padding
            token_mask = padding[:, 0, 0, : x.shape[1]] == 0
        for i, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            last = i == self.depth - 1
            options = (padding, positions if last else None, None if last else token_mask)
            if vl_branch and i == self.vl_start:
                vl_hidden = x
            if vl_hidden is not None:
                again = None if keys is None else fold_in(keys, self.depth + i)
                vl_hidden = self._run(block, vl_hidden, bias, "vl", 0, *options, again)
            x = self._run(block, x, bias, modality, text_len, *options, None if keys is None else fold_in(keys, i))
        return self.norm(x), None if vl_hidden is None else self.norm(vl_hidden)

    def _run(self, block: nn.Module, *arguments: Any) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)


def offloading_wrapper() -> Callable[..., nn.Module]:
    """Gives fairscale's `checkpoint_wrapper`. Raises VLMoError if it is not installed."""
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ModuleNotFoundError as error:
        raise VLMoError(
            "activation_checkpointing=offload: fairscale is not installed: pip install fairscale, or give True"
        ) from error
    return checkpoint_wrapper


# --- the sizes; to add one, register its arguments under its name -----------------------------------------------------

# a narrow and shallow network learns from nothing only with a start that is less damped
ARCHITECTURES.register("vlmo_tiny_patch16")(
    dict(embed_dim=96, depth=3, num_heads=4, vl_start=2, layer_scale=1.0, init_std=0.1)
)
ARCHITECTURES.register("vlmo_base_patch16")(dict(embed_dim=768, depth=12, num_heads=12, vl_start=10))
ARCHITECTURES.register("vlmo_base_plus_patch16")(
    dict(embed_dim=544, depth=24, num_heads=16, vl_start=21, layer_scale=None, relative_positions=False)
)
ARCHITECTURES.register("vlmo_large_patch16")(dict(embed_dim=1024, depth=24, num_heads=16, vl_start=21))


def build_transformer(name: str, **kwargs: Any) -> MultiWayTransformer:
    """Builds the transformer called `name`; `kwargs` are arguments of `MultiWayTransformer` over those of the size."""
    return MultiWayTransformer(**(ARCHITECTURES[name] | kwargs))
