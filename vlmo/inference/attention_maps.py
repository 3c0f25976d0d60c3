"""Where the tokens of a text look in an image: attention weights of a joint pass, and a drawing of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.modules.attention import Attention
from vlmo.modules.model import VLMoModel

FIELDS = 8  # patches a side up to which each is drawn as a field of one colour
DRAWN_SIZE = 640  # pixels of a drawing's longer side: to be seen on a screen, whatever the model's image size


@dataclass
class AttentionMap:
    """Holds the attention of a text's tokens to an image's patches.

    Attributes:
        image: as given, of any size and shape (the model sees all of it, squeezed into a square).
        tokens: of the text, [CLS] and [SEP] included.
        layers: numbers of the layers, from 0.
        weights: (layers, heads, tokens, h, w), of each token to each patch; a token's further attention, to 1 in all,
            goes to the text and to the image's [CLS].
    """

    image: Image.Image
    tokens: list[str]
    layers: list[int]
    weights: Tensor

    def picture(
        self, token: str | int | None = None, layer: int = -1, opacity: float = 0.6, longer_side: int = DRAWN_SIZE
    ) -> Image.Image:
        """Draws the image under a heat map of the weights, mean over heads, the strongest patch hottest.

        Args:
            token: the token or its number; None: the mean over all ([CLS] and [SEP] left out).
            layer: position in `layers`.
            opacity: of the hottest place.
            longer_side: of the drawing, in pixels; the image keeps its shape.

        Raises:
            VLMoError: if there is no such token or layer.
        """
        from matplotlib import colormaps  # (late: most uses draw nothing)

        if not -len(self.layers) <= layer < len(self.layers):
            raise VLMoError(f"layer={layer}: there are {len(self.layers)}, from 0")
        heat = self.weights[layer].mean(0)[self._numbers(token)].mean(0)
        scale = longer_side / max(self.image.size)
        width, height = (max(round(scale * side), 1) for side in self.image.size)
        image = self.image.resize((width, height), Image.Resampling.BICUBIC)
        # (between few patches there is nothing to interpolate: each is one field)
        mode = "bicubic" if len(heat) > FIELDS else "nearest"
        heat = F.interpolate(heat[None, None], (height, width), mode=mode)[0, 0].clamp(min=0)
        share = (heat / heat.max().clamp(min=1e-12)).numpy()
        colours = 255 * colormaps["inferno"](share)[:, :, :3]
        alpha = opacity * share[:, :, None]
        return Image.fromarray(((1 - alpha) * np.asarray(image) + alpha * colours).round().astype(np.uint8))

    def _numbers(self, token: str | int | None) -> list[int]:
        if token is None:
            return list(range(1, len(self.tokens) - 1)) or [0]
        numbers = [token] if isinstance(token, int) else [i for i, each in enumerate(self.tokens) if each == token]
        if not numbers or not -len(self.tokens) <= numbers[0] < len(self.tokens):
            raise VLMoError(f"token={token!r} is not in the text; its tokens are {' '.join(self.tokens)}")
        return numbers


def attention_weights(attention: Attention, x: Tensor, bias: Tensor | None, padding: Tensor | None) -> Tensor:
    """Gives (B, H, S, S), what `Attention.forward` multiplies the values by (fused kernels do not show it).

    Args:
        x: (B, S, D). bias, padding: as `Attention.forward` takes them.
    """
    q, k, _ = attention.qkv(x).chunk(3, dim=-1)
    q, k = (rearrange(part, "b s (h d) -> b h s d", h=attention.num_heads) for part in (q + attention.q_bias, k))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    for part in (bias, padding):
        if part is not None:
            scores = scores + part[..., : x.shape[1]]
    return scores.softmax(dim=-1)


@torch.inference_mode()
def text_to_patches(model: VLMoModel, batch: dict[str, Any], layers: Sequence[int]) -> Tensor:
    """Gives (layers, heads, T, h, w), the weights of one pair's text tokens to the image's patches, on the CPU.

    The layers are listened to while the model runs as usual, so that nothing of training knows of this.
    """
    found: dict[int, Tensor] = {}

    def listener(layer: int) -> Any:
        def listen(attention: Attention, inputs: tuple[Tensor, Tensor | None, Tensor | None, None]) -> None:
            found[layer] = attention_weights(attention, *inputs[:3])[0].float().cpu()

        return listen

    parts = [model.transformer.get_submodule(f"blocks.{layer}.attn") for layer in layers]
    handles = [part.register_forward_pre_hook(listener(layer)) for part, layer in zip(parts, layers, strict=True)]
    try:
        model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
    finally:
        for handle in handles:
            handle.remove()
    text_len = batch["text_ids"].shape[1]
    window = model.transformer.window
    weights = torch.stack([found[layer] for layer in layers])
    patches = weights[:, :, :text_len, text_len + 1 :]  # after the image's [CLS]
    return patches.unflatten(-1, (window, window))
