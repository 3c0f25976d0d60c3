"""How many floating-point operations a step needs, by formula, and how many a device could do.

Counted are the matrix products of the blocks, of the patch embedding and of the masked-word head, a multiplication with
its addition as two operations, of texts without their padding. Not counted: what is computed twice, the last block's
work on positions that nothing reads, heads on a single position (below 0.1 %), and on a CPU the share of the blocks
that stochastic depth leaves out, as it computes the others alone.
"""

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning_fabric.utilities.throughput import get_available_flops
from torch import Tensor

from vlmo.modules import VLMo

PRODUCT = 2048  # rows and columns of the matrices by which a CPU is measured


class StepFlops:
    """Of training steps of `model`: a backward pass costs twice its forward pass, without weights' gradients once."""

    def __init__(self, model: VLMo) -> None:
        self.model = model
        self.dim, self.start = model.transformer.embed_dim, model.transformer.vl_start
        self.attention_trains = model.transformer.blocks[0].attn.qkv.weight.requires_grad  # type: ignore[union-attr]
        rates = [block.drop_path.drop_prob for block in model.transformer.blocks]  # type: ignore[union-attr]
        self.computed = [1 - float(rate) if model.device.type == "cpu" else 1.0 for rate in rates]  # type: ignore[arg-type]

    def __call__(self, batch: Mapping[str, Any]) -> float:
        """Operations of a step on `batch` (on the CPU)."""
        active = self.model.settings.active
        size = len(batch["text_ids"])
        texts = batch["text_masks"].sum(dim=1)
        images = torch.full_like(texts, 1 + self.model.transformer.window**2)
        pairs = texts + images
        words = int((batch["text_labels_mlm"] != -100).sum())
        total = 0.0
        if "textmlm" in active:
            total += self._blocks(texts, words) + self._words(words)
        if "mlm" in active:
            total += self._blocks(pairs, words) + self._words(words)
        if "itm" in active:  # (the negatives are not of the batch, but as long on average)
            total += 3 * self._blocks(pairs, size)
        if "vqa" in active:
            total += self._blocks(pairs, size)
        if "nlvr2" in active:
            total += 2 * self._blocks(pairs, size)
        for lengths in (texts, images) if {"itc", "irtr"} & set(active) else ():
            total += self._blocks(lengths, size)
            if "itc" in active:
                total += self._blocks(lengths, size, self.start)
        embedded = {"textmlm": 0, "nlvr2": 2 * size}.get(active[0], size)
        patches = embedded * self.model.transformer.window**2
        return total + 2 * patches * 2 * 3 * 16**2 * self.dim  # images need no gradient

    def _blocks(self, lengths: Tensor, read: int, start: int = 0) -> float:
        """The blocks from `start` on over sequences of these lengths, of which `read` positions in all are read."""
        tokens, square, total = int(lengths.sum()), self.dim**2, 0.0
        for number, computed in enumerate(self.computed[start:], start):
            last = number == len(self.computed) - 1
            queries = read if last else tokens
            projections = 4 * (tokens + queries) * square
            keys = queries * float(lengths.float().mean()) if last else int(lengths.square().sum())
            scores, experts = 4 * keys * self.dim, 16 * queries * square
            total += computed * ((3 if self.attention_trains else 2) * projections + 3 * (scores + experts))
        return total

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
