"""Contrast for retrieval fine-tuning: on the L/V-FFN features alone, by which the dual encoder ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmo.modules.heads import ITCHead
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, ObjectiveOutput
from vlmo.tasks.itc import INITIAL_LOG_SCALE, ContrastObjective, contrast, contrast_output

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


class IRTR(ContrastObjective):
    """Shares its heads with ITC, so that retrieval fine-tuning starts from the pre-trained ones."""

    name = "irtr"
    paths = ("text", "image")
    evaluation_heads = ("itc_text_proj", "itc_image_proj")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {
            "itc_text_proj": ITCHead(embed_dim),
            "itc_image_proj": ITCHead(embed_dim),
            "logit_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)),
        }

    def features(self, model: VLMo, batch: Batch) -> dict[str, Tensor]:
        return model.encode_apart(batch, vl_branch=False)

    def compare(self, model: VLMo, features: Mapping[str, Tensor], shapes: list[list[int]]) -> ObjectiveOutput:
        exact = model.settings.contrast_gradient == "exact"
        counts = [count for count, _ in shapes]
        compared = contrast(features["image"], features["text"], model.logit_scale, exact, counts)
        return contrast_output(*compared, {"logit_scale": model.logit_scale})
