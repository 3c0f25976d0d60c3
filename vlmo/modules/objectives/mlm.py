"""Masked language modelling on pairs (stage 3): the words of the text from the rest of it and the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from vlmo.metrics import IGNORE, Accuracy, Mean
from vlmo.modules.heads import MLMHead
from vlmo.modules.objectives.base import Batch, Objective, ObjectiveOutput, mean_cross_entropy
from vlmo.settings import Settings

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo

STAGE3_WEIGHT = 0.25


def masked_word_loss(head: nn.Module, hidden: Tensor, labels: Tensor, weight: float) -> ObjectiveOutput:
    """Cross-entropy over the masked positions; the head runs on those alone, its vocabulary being most of its cost.

    Args:
        hidden: (B, T, D).
        labels: (B, T), -100 where a token was not masked.
    """
    masked = labels != IGNORE
    logits, labels = head(hidden[masked]), labels[masked]  # (M, vocabulary), (M,)
    # (a batch may have no masked token, without whole-word masking)
    loss = mean_cross_entropy(logits.float(), labels)
    return ObjectiveOutput(
        loss=weight * loss,
        outputs={"logits": logits, "labels": labels},
        updates={"loss": (weight * loss, len(labels)), "accuracy": (logits, labels)},
    )


class MLM(Objective):
    """Weighted by 0.25, as published."""

    name = "mlm"
    metrics = {"loss": Mean, "accuracy": Accuracy}
    headline = ("accuracy",)
    paths: ClassVar[tuple[str, ...]] = ("pair",)

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"mlm_score": MLMHead(embed_dim, settings.vocab_size)}

    def num_items(self, batch: Batch) -> Tensor | int:
        return (batch["text_labels_mlm"] != IGNORE).sum()

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        hidden = model.infer(batch, mask_text=True)["text_feats"]
        return masked_word_loss(model.mlm_score, hidden, batch["text_labels_mlm"], STAGE3_WEIGHT)
