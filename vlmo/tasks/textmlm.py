"""Masked language modelling on text alone (stage 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from vlmo.settings import Settings
from vlmo.tasks.base import Batch, Objective, ObjectiveOutput
from vlmo.tasks.mlm import MLM, masked_word_loss, masked_words

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


class TextMLM(Objective):
    """Words of a text from the rest of it, through the language experts."""

    name = "textmlm"
    metrics = MLM.metrics
    primary_metrics = MLM.primary_metrics
    paths = ("text",)

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return MLM().heads(embed_dim, settings)

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        read, _ = masked_words(batch)
        hidden, _ = model.encode_text(batch["text_ids_mlm"], batch["text_masks"], vl_branch=False, read=read)
        return masked_word_loss(model, batch, hidden, weight=1.0)
