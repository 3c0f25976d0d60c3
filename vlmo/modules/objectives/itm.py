"""Image-text matching with hard negatives: one true pair against two that the contrast finds hard to tell from true."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmo.distributed import fetch_rows, gather_own_first, world_size
from vlmo.metrics import Accuracy, Mean
from vlmo.modules.heads import ITMHead
from vlmo.modules.objectives.base import Batch, Objective, ObjectiveOutput, mean_cross_entropy
from vlmo.modules.pixels import from_bytes, to_bytes
from vlmo.settings import Settings

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


def draw_negatives(logits: Tensor) -> Tensor:
    """One hard negative a row, drawn by the softmax of its similarities with the own pair (the diagonal) left out.

    Args:
        logits: (B, N), the B own rows of the similarities to all N pairs, own pairs first.

    Returns:
        (B,) column numbers.
    """
    if not len(logits):
        return torch.zeros(0, dtype=torch.long, device=logits.device)  # (`multinomial` refuses to draw nothing)
    # -inf before the softmax, not 0 after it: a dominant own pair would leave no weight to draw by
    weights = logits.detach().float().clone().fill_diagonal_(-torch.inf).softmax(dim=1)
    return torch.multinomial(weights, 1).squeeze(1)


class ITM(Objective):
    """Each pair three times: as it is, its text with another image, its image with another text."""

    name = "itm"
    requires = ("itc",)
    metrics = {"loss": Mean, "accuracy": Accuracy}
    headline = ("accuracy",)
    paths = ("pair", "pooler")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"itm_score": ITMHead(embed_dim)}

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput | None:
        size = len(batch["image"])
        similarities = done["itc"].outputs
        if similarities["labels"].numel() < 2:  # a single pair has no negative
            if world_size() == 1:
                return None
            size = 0  # the other processes wait for a gradient from here, if only of nothing
        other_image = draw_negatives(similarities["t2i_logits"][:size])
        other_text = draw_negatives(similarities["i2t_logits"][:size])
        shapes = similarities["shapes"].tolist()
        texts = torch.stack([batch["text_ids"], batch["text_masks"]], dim=1)
        texts = gather_own_first(texts.int(), shapes=shapes)  # (N, 2, T)
        own = torch.arange(size, device=texts.device)
        ids, masks = texts[torch.cat([own, own, other_text])].long().unbind(1)
        image = batch["image"]
        negative = fetch_rows(image, other_image, [count for count, _ in shapes], to_bytes, from_bytes)
        pairs = {  # all in one pass
            "image": torch.cat([image[:size], negative, image[:size]]),
            "text_ids": ids,
            "text_masks": masks,
        }
        logits = model.itm_score(model.infer(pairs)["cls_feats"])
        labels = torch.zeros(3 * size, dtype=torch.long, device=logits.device)
        labels[:size] = 1
        loss = mean_cross_entropy(logits.float(), labels)
        return ObjectiveOutput(
            loss=loss,
            outputs={"logits": logits, "labels": labels},
            updates={"loss": (loss, len(labels)), "accuracy": (logits, labels)},
        )
