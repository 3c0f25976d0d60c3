"""The multiway transformer: shared self-attention, one feed-forward expert a modality (paper: section 3.1, figure 2).

A sequence is text [CLS] w1 .. wT, or an image [CLS] p1 .. pN, or a pair: the text followed by the image. Every block
attends over the whole sequence with the same weights. Its feed-forward part is an expert of the modality: text tokens
go through the language expert, image tokens through the vision expert; in the top blocks a pair goes whole through the
vision-language expert.

Shapes in comments: B batch, T text tokens, I image tokens (1 + patches), S sequence, D width, H heads.
The relative position bias is computed outside (`vlmo_module.py`), because its table is one for all blocks.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from timm.layers import trunc_normal_
from timm.models import register_model
from torch import Tensor, nn

from vlmo.errors import VLMoError
from vlmo.modules.block import NORM_EPS, Block, Modality, attention_step, expert_step, offloading_wrapper

MAX_VARIANTS = 32  # of a compiled step: with padding or not, read or whole, in training or evaluation, ...


class PatchEmbed(nn.Module):
    """Square patches of an image, each projected to the width."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, size, size) -> (B, patches, D)"""
        return rearrange(self.proj(image), "b d h w -> b (h w) d")


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
        patch_size: int = 16,
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
        recompute = activation_checkpointing is True
        self.window = img_size // patch_size  # patches a side
        self.relative_positions = relative_positions
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = None if relative_positions else nn.Parameter(torch.zeros(1, 1 + self.window**2, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, layer_scale, experts if i >= vl_start else single, recompute)
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
                trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        trunc_normal_(self.cls_token, std=0.02)
        if self.pos_embed is not None:
            trunc_normal_(self.pos_embed, std=0.02)

    def compile_steps(self) -> None:
        """Has the blocks' steps compiled when they first run: once for all blocks and for all lengths and batches."""
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
        compiled = tuple(torch.compile(step, dynamic=True) for step in (attention_step, expert_step))
        for module in self.modules():
            if isinstance(module, Block):
                module.steps = compiled

    def embed_image(self, image: Tensor, patch_mask: Tensor | None = None, mask_token: Tensor | None = None) -> Tensor:
        """(B, 3, size, size) -> (B, I, D): [CLS] and the patches, before any block.

        Args:
            patch_mask: (B, I - 1) bool: patches whose embedding is replaced by `mask_token`.
            mask_token: (1, 1, D).
        """
        patches = self.patch_embed(image)
        if patch_mask is not None and mask_token is not None:
            patches = torch.where(patch_mask.unsqueeze(-1), mask_token.to(patches.dtype), patches)
        x = torch.cat([self.cls_token.expand(len(image), -1, -1).to(patches.dtype), patches], dim=1)
        return x if self.pos_embed is None else x + self.pos_embed

    def encode(
        self,
        x: Tensor,
        biases: Sequence[Tensor | None],
        modality: Modality,
        text_len: int = 0,
        vl_branch: bool = False,
        padding: Tensor | None = None,
        read: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """All blocks and the last norm over one sequence; with `vl_branch` also its vision-language view.

        The vision-language view of a single modality leaves the hidden state before the first VL block and passes the
        remaining blocks again, with the VL expert (paper: section 3.2, the features of the VL-FFN branch).

        Args:
            x: (B, S, D) embeddings.
            biases: per block, added to the attention scores; padding: added in all blocks (see `attend`).
            modality: of the experts to use.
            text_len: tokens of the text at the front of a pair.
            read: (B, R) positions that are wanted: the last block computes those alone, and of padding the experts
                compute nothing on a CPU; None: all.

        Returns:
            hidden states (B, S, D), or (B, R, D), and those of the VL branch or None.
        """
        branch = real = None
        if read is not None and padding is not None:  # nobody reads what becomes of the padding
            real = padding[:, 0, 0, : x.shape[1]] == 0
        for i, (block, bias) in enumerate(zip(self.blocks, biases, strict=True)):
            if vl_branch and i == self.vl_start:
                branch = x
            wanted = (None, real) if i < len(self.blocks) - 1 else (read, None)
            if branch is not None:
                branch = block(branch, bias, "vl", 0, padding, *wanted)
            x = block(x, bias, modality, text_len, padding, *wanted)
        return self.norm(x), None if branch is None else self.norm(branch)


# --- the sizes; to add one, write its entry and its function ----------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # a narrow and shallow network learns from nothing only with a start that is less damped
    "vlmo_tiny_patch16": dict(embed_dim=96, depth=3, num_heads=4, vl_start=2, layer_scale=1.0, init_std=0.1),
    "vlmo_base_patch16": dict(embed_dim=768, depth=12, num_heads=12, vl_start=10),
    "vlmo_base_plus_patch16": dict(
        embed_dim=544, depth=24, num_heads=16, vl_start=21, layer_scale=None, relative_positions=False
    ),
    "vlmo_large_patch16": dict(embed_dim=1024, depth=24, num_heads=16, vl_start=21),
}


def build_transformer(name: str, **kwargs: Any) -> MultiWayTransformer:
    """The transformer called `name`; `kwargs` are arguments of `MultiWayTransformer` over those of the size."""
    return MultiWayTransformer(**(ARCHITECTURES[name] | kwargs))


def _from_timm(name: str, pretrained: bool, **kwargs: Any) -> MultiWayTransformer:
    if pretrained:
        raise VLMoError(f"{name}: timm has no weights for it; load a file with VLMo and load_path")
    for unused in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm hands these to every entry point
        kwargs.pop(unused, None)
    return build_transformer(name, **kwargs)


@register_model
def vlmo_tiny_patch16(pretrained: bool = False, **kwargs: Any) -> MultiWayTransformer:
    """For the demo and the tests; not a size of the paper."""
    return _from_timm("vlmo_tiny_patch16", pretrained, **kwargs)


@register_model
def vlmo_base_patch16(pretrained: bool = False, **kwargs: Any) -> MultiWayTransformer:
    """Base of the paper."""
    return _from_timm("vlmo_base_patch16", pretrained, **kwargs)


@register_model
def vlmo_base_plus_patch16(pretrained: bool = False, **kwargs: Any) -> MultiWayTransformer:
    """Base plus: deeper and narrower, absolute positions, no LayerScale."""
    return _from_timm("vlmo_base_plus_patch16", pretrained, **kwargs)


@register_model
def vlmo_large_patch16(pretrained: bool = False, **kwargs: Any) -> MultiWayTransformer:
    """Large of the paper."""
    return _from_timm("vlmo_large_patch16", pretrained, **kwargs)
