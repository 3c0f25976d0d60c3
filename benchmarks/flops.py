"""How many floating-point operations a step needs, by formula, and how many a device could do.

Counted are the matrix products of the blocks, of the patch embedding and of the masked-word head, a multiplication with
its addition as two operations, at the texts' padded length in the batch. Not counted: what is computed twice, the last
block's work on positions that nothing reads, heads on a single position (below 0.1 %).
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric.utilities.throughput import get_available_flops

from vlmo.modules import VLMo

PRODUCT = 2048  # rows and columns of the matrices by which a CPU is measured


class StepFlops:
    """Of training steps of `model`: a backward pass costs twice its forward pass, without weights' gradients once."""

    def __init__(self, model: VLMo) -> None:
        self.model = model
        self.dim, self.depth = model.transformer.embed_dim, model.transformer.depth
        self.vl_blocks = self.depth - model.transformer.vl_start
        self.attention_trains = model.transformer.blocks[0].attn.qkv.weight.requires_grad  # type: ignore[union-attr]

    def __call__(self, batch: Mapping[str, Any]) -> float:
        """Operations of a step on `batch` (on the CPU)."""
        active = self.model.settings.active
        size, text = batch["text_ids"].shape
        image = 1 + self.model.transformer.window**2
        words = int((batch["text_labels_mlm"] != -100).sum())
        total = 0.0
        if "textmlm" in active:
            total += self._blocks(size, text, words, self.depth) + self._words(words)
        if "mlm" in active:
            total += self._blocks(size, text + image, words, self.depth) + self._words(words)
        if "itm" in active:
            total += self._blocks(3 * size, text + image, 3 * size, self.depth)
        if "vqa" in active:
            total += self._blocks(size, text + image, size, self.depth)
        if "nlvr2" in active:
            total += self._blocks(2 * size, text + image, 2 * size, self.depth)
        for length in (text, image) if {"itc", "irtr"} & set(active) else ():
            total += self._blocks(size, length, size, self.depth)
            if "itc" in active:
                total += self._blocks(size, length, size, self.vl_blocks)
        images = {"textmlm": 0, "nlvr2": 2 * size}.get(active[0], size)
        return total + 2 * images * (image - 1) * 2 * 3 * 16**2 * self.dim  # images need no gradient

    def _blocks(self, size: int, length: int, read: int, blocks: int) -> float:
        """`blocks` blocks over `size` sequences of which `read` positions in all are read at their end."""
        tokens, square = size * length, self.dim**2
        projections = (blocks - 1) * 8 * tokens * square + 4 * tokens * square + 4 * read * square
        scores = (blocks - 1) * 4 * tokens * length * self.dim + 4 * read * length * self.dim
        experts = ((blocks - 1) * tokens + read) * 16 * square
        return (3 if self.attention_trains else 2) * projections + 3 * (scores + experts)

    def _words(self, words: int) -> float:
        return 3 * 2 * words * self.dim * (self.dim + self.model.settings.vocab_size)


def peak(device: torch.device, precision: str) -> tuple[float | None, str]:
    """Operations a second that the device could do, and the source of that number.

    Args:
        precision: Lightning's name.
    """
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision, torch.float32)
    if device.type == "cuda":
        return get_available_flops(device, dtype), "the data sheet, as Lightning lists it"
    x = torch.randn(PRODUCT, PRODUCT).to(dtype)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - start)
    return 2 * PRODUCT**3 / min(seconds), f"the fastest of six {PRODUCT} x {PRODUCT} products here"
