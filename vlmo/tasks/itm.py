"""Image-text matching with hard negatives: one true pair against two that the contrast finds hard to tell from true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.distributed.collectives import all_gather_rows, fetch_rows, world_size
from vlmo.distributed.wire_format import from_bytes, pack_texts, text_width, to_bytes, unpack_texts
from vlmo.metrics import Accuracy, Mean
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import ITMHead
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, ObjectiveOutput, PairObjective, Pairs, mean_cross_entropy

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


def draw_negatives(logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One hard negative a row, drawn by the softmax of its similarities with the own pair (the diagonal) left out.

    Args:
        logits: (B, N), the B own rows of the similarities to all N pairs, own pairs first.
        generator: of the logits' device; None for the global one.

    Returns:
        (B,) column numbers.
    """
    # -inf before the softmax, not 0 after it: a dominant own pair would leave no weight to draw by
    weights = logits.detach().float().clone().fill_diagonal_(-torch.inf).softmax(dim=1)
    # as `torch.multinomial` draws, which waits for the device to look at the weights first
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(dim=1)


def same_chunk(size: int, chunk_size: int, device: torch.device) -> Tensor:
    """(size, size) bool: pairs of the same forward pass; a pair that is alone in its own may look at all."""
    chunk = torch.arange(size, device=device) // chunk_size
    same = chunk[:, None] == chunk
    return same | (same.sum(1, keepdim=True) < 2)


class ITM(PairObjective):
    """Each pair three times: as it is, its text with another image, its image with another text."""

    name = "itm"
    requires = ("itc",)
    metrics = {"loss": Mean, "accuracy": Accuracy}
    primary_metrics = ("accuracy",)
    paths = ("pair", "pooler")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"itm_score": ITMHead(embed_dim)}

    def prepare(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> dict[str, Tensor]:
        """`negative_image`, `negative_text_ids` and `negative_text_masks`; nothing where a single pair is all."""
        image, size = batch["image"], len(batch["image"])
        similarities = done["itc"].outputs
        if similarities["labels"].numel() < 2:
            return {}
        rows = [similarities[f"{direction}_logits"][:size] for direction in ("t2i", "i2t")]
        device = rows[0].device
        if model.settings.negatives == "local":
            near = same_chunk(size, model.settings.per_gpu_batchsize, device)
            rows = [each[:, :size].masked_fill(~near, -torch.inf) for each in rows]
        draw = None
        if not model.training:  # an evaluation draws alike whichever process meets the batch, and whenever
            draw = torch.Generator(image.device).manual_seed(int(batch["text_ids"].sum()))
        other_image, other_text = (draw_negatives(each, draw) for each in rows)
        shapes = similarities["shapes"].tolist()
        words = model.settings.vocab_size
        texts = pack_texts(batch["text_ids"].to(device), batch["text_masks"].to(device), words)
        texts = all_gather_rows(texts, shapes=[(count, length * text_width(words)) for count, length in shapes])
        ids, masks = unpack_texts(texts[other_text], words)  # (B, T)
        # the batch of `contrast_cache` lies beside the device, which only processes that exchange rows need
        source = image.to(device) if world_size() > 1 else image
        counts = [count for count, _ in shapes]
        negative = fetch_rows(source, other_image.to(source.device), counts, to_bytes, from_bytes)
        return {
            "negative_image": negative.to(image.device, image.dtype),
            "negative_text_ids": ids,
            "negative_text_masks": masks,
        }

    def pairs(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> Pairs | None:
        other: Mapping[str, Tensor] = batch
        if "negative_image" not in batch:
            other = self.prepare(model, batch, done) if done else {}
        if not other:  # a single pair has no negative
            if world_size() == 1 or not done:
                return None
            # the other processes wait for a gradient from here, if only of nothing
            other = {f"negative_{name}": batch[name][:0] for name in ("image", "text_ids", "text_masks")}
        size = len(other["negative_image"])
        longest = max(batch["text_ids"].shape[1], other["negative_text_ids"].shape[1])
        texts: list[Tensor] = []
        for name in ("text_ids", "text_masks"):
            sides = batch[name][:size], other[f"negative_{name}"]
            own, negative = (F.pad(side, (0, longest - side.shape[1])) for side in sides)  # 0: [PAD], and its mask
            texts.append(torch.cat([own, own, negative]))
        images = model.embed_image(torch.cat([batch["image"][:size], other["negative_image"]]), token_type=1)
        ids, masks = texts
        return Pairs(ids, masks, torch.cat([images, images[:size]]), first_positions(ids))

    def score(self, model: VLMo, batch: Batch, hidden: Tensor) -> ObjectiveOutput:
        logits = model.itm_score(model.pooler(hidden))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(logits) // 3] = 1
        loss = mean_cross_entropy(logits.float(), labels)
        return ObjectiveOutput(
            loss=loss,
            outputs={"logits": logits, "labels": labels},
            updates={"loss": (loss, len(labels)), "accuracy": (logits, labels)},
        )
