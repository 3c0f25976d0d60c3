"""Masked image modelling (stage 1): hidden patches from those that are shown (BEiT, arXiv 2106.08254)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vlmo.metrics import Accuracy, Mean
from vlmo.modules.image_tokenizer import NUM_CODES
from vlmo.settings import PATCH_SIZE, Settings
from vlmo.tasks.base import Batch, Objective, ObjectiveOutput, mean_cross_entropy

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


def normalised_patches(image: Tensor) -> Tensor:
    """The pixels of each patch, with the patch's own mean 0 and deviation 1 (MAE, arXiv 2111.06377, section 4.1).

    Args:
        image: (B, 3, size, size).

    Returns:
        (B, patches, 3 * PATCH_SIZE^2) float32
    """
    patches = rearrange(image.float(), "b c (h p) (w q) -> b (h w) (p q c)", p=PATCH_SIZE, q=PATCH_SIZE)
    centred = patches - patches.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / (patches.shape[-1] - 1)
    return centred / (variance + 1e-6).sqrt()  # a patch of a single colour has no deviation


class MIM(Objective):
    """Of each hidden patch its visual token (cross-entropy), or its normalised pixels (mean squared error)."""

    name = "mim"
    metrics = {"loss": Mean, "accuracy": Accuracy}
    primary_metrics = ("accuracy",)  # of visual tokens; pixels have none
    paths = ("image",)

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        outputs = NUM_CODES if settings.mim_target == "dalle" else 3 * PATCH_SIZE**2
        mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed_dim), std=0.02))
        return {"mim_mask_token": mask_token, "mim_score": nn.Linear(embed_dim, outputs)}

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        hidden = batch["patch_mask"]  # (B, patches) bool
        predicted = model.mim_score(model.encode_masked_image(batch["image"], hidden)[hidden]).float()
        if model.settings.mim_target == "pixels":
            pixels = normalised_patches(batch["image"])[hidden]
            loss = F.mse_loss(predicted, pixels, reduction="sum") / max(predicted.numel(), 1)
            return ObjectiveOutput(
                loss, {"logits": predicted, "targets": pixels}, updates={"loss": (loss, len(predicted))}
            )
        labels = batch["visual_tokens"][hidden]
        loss = mean_cross_entropy(predicted, labels)
        return ObjectiveOutput(
            loss,
            {"logits": predicted, "labels": labels},
            updates={"loss": (loss, len(labels)), "accuracy": (predicted, labels)},
        )
