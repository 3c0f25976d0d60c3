"""Masked language modelling on pairs (stage 3): the words of the text from the rest of it and the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmo.metrics import IGNORE_INDEX, Accuracy, Mean
from vlmo.modules.heads import MLMHead
from vlmo.modules.linear_cross_entropy import CHUNK
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, ObjectiveOutput, PairObjective, Pairs, mean_cross_entropy

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo

STAGE3_WEIGHT = 0.25


def locate_masked_words(labels: Tensor) -> dict[str, Tensor]:
    """Where the masked words of texts are; on a GPU this waits for the device, so it is best done before.

    Args:
        labels: (B, T), -100 where a token was not masked.

    Returns:
        masked_read: (B, R) their positions, R being the most in one text; shorter rows are filled up with 0.
        masked_kept: (M,) numbers of the B * R that are no filling.
    """
    masked = labels != IGNORE_INDEX
    counts = masked.sum(dim=1)
    most = max(int(counts.max()), 1) if len(labels) else 1
    real = torch.arange(most, device=labels.device) < counts[:, None]
    read = labels.new_zeros(len(labels), most)
    read[real] = masked.nonzero()[:, 1]
    return {"masked_read": read, "masked_kept": real.flatten().nonzero()[:, 0]}


def masked_words(batch: Batch) -> tuple[Tensor, Tensor]:
    """`masked_read` and `masked_kept` of a batch, which may have them already."""
    found = batch if "masked_kept" in batch else locate_masked_words(batch["text_labels_mlm"])
    return found["masked_read"], found["masked_kept"]


def masked_word_loss(model: VLMo, batch: Batch, hidden: Tensor, weight: float) -> ObjectiveOutput:
    """Cross-entropy over the masked words; the head runs on those alone, its vocabulary being most of its cost.

    Args:
        hidden: (B, R, D), read at `masked_read`.

    Returns:
        with outputs "labels" and, of few words, "logits".
    """
    read, kept = masked_words(batch)
    labels = batch["text_labels_mlm"].gather(1, read).flatten()[kept]  # (M,)
    words = hidden.flatten(0, 1)[kept]  # (M, D)
    outputs = {"labels": labels}
    if len(labels) > CHUNK:
        loss, predicted = model.mlm_score.loss(words, labels)
    else:
        outputs["logits"] = predicted = model.mlm_score(words)  # (M, vocabulary)
        # (a batch may have no masked word, without whole-word masking)
        loss = mean_cross_entropy(predicted.float(), labels)
    updates = {"loss": (weight * loss, len(labels)), "accuracy": (predicted, labels)}
    return ObjectiveOutput(weight * loss, outputs, updates=updates)


class MLM(PairObjective):
    """Weighted by 0.25, as published."""

    name = "mlm"
    metrics = {"loss": Mean, "accuracy": Accuracy}
    primary_metrics = ("accuracy",)
    paths = ("pair",)

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"mlm_score": MLMHead(embed_dim, settings.vocab_size)}

    def num_items(self, batch: Batch) -> Tensor | int:
        return (batch["text_labels_mlm"] != IGNORE_INDEX).sum()

    def pairs(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> Pairs:
        image = model.embed_image(batch["image"], token_type=1)
        return Pairs(batch["text_ids_mlm"], batch["text_masks"], image, masked_words(batch)[0])

    def score(self, model: VLMo, batch: Batch, hidden: Tensor) -> ObjectiveOutput:
        return masked_word_loss(model, batch, hidden, STAGE3_WEIGHT)
