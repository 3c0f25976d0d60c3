"""Masked language modelling on text alone (stage 2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmo.modules.objectives.base import Batch, ObjectiveOutput
from vlmo.modules.objectives.mlm import MLM, masked_word_loss

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


class TextMLM(MLM):
    """Words of a text from the rest of it, through the language experts."""

    name = "textmlm"
    paths = ("text",)

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        hidden = model.infer_text(batch, mask_text=True, vl_branch=False)["text_feats"]
        return masked_word_loss(model.mlm_score, hidden, batch["text_labels_mlm"], weight=1.0)
