"""Image-text contrast (stage 3): which text belongs to which image?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmo.distributed import gather_own_first, gather_shapes
from vlmo.metrics import Accuracy, Mean
from vlmo.modules.heads import ITCHead
from vlmo.modules.objectives.base import Batch, Objective, ObjectiveOutput, mean_cross_entropy
from vlmo.settings import Settings

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo

INITIAL_LOG_SCALE = math.log(1 / 0.07)


def contrast(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    exact_gradient: bool,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """InfoNCE over the pairs of all processes, both ways.

    Args:
        image, text: (B, D), unit length, of this process.
        log_scale: scalar, log of the inverse temperature.
        exact_gradient: see `gather_own_first`.
        counts: B of every process, by rank, where it is known already.

    Returns:
        loss, image-to-text logits (N, N) and labels (N,) for N pairs, this process's first.
    """
    both = torch.cat([image.float(), text.float()], dim=1)  # (one exchange instead of two)
    shapes = None if counts is None else [(count, both.shape[1]) for count in counts]
    image, text = gather_own_first(both, exact_gradient, shapes).chunk(2, dim=1)
    # fp32: the exponentials of up to 100 * cosine lose the small differences in half precision
    with torch.autocast(image.device.type, enabled=False):
        logits = log_scale.float().exp() * image @ text.t()
    labels = torch.arange(len(logits), device=logits.device)
    loss = mean_cross_entropy(logits, labels) + mean_cross_entropy(logits.t(), labels)
    return loss / 2, logits, labels


def contrast_output(loss: Tensor, logits: Tensor, labels: Tensor, scales: Mapping[str, Tensor]) -> ObjectiveOutput:
    """What is reported of a contrast: both directions' logits and accuracies, and the inverse temperatures."""
    return ObjectiveOutput(
        loss=loss,
        outputs={"i2t_logits": logits, "t2i_logits": logits.t(), "labels": labels},
        updates={
            "loss": (loss, len(labels)),
            "i2t_accuracy": (logits, labels),
            "t2i_accuracy": (logits.t(), labels),
        },
        scalars={name: scale.detach().exp() for name, scale in scales.items()},
    )


class ITC(Objective):
    """Mean of the contrast on the L/V-FFN features and of that on the VL-FFN features."""

    name = "itc"
    metrics = {"loss": Mean, "i2t_accuracy": Accuracy, "t2i_accuracy": Accuracy}
    headline = ("i2t_accuracy", "t2i_accuracy")
    paths = ("text", "image", "vl branch")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {
            "itc_text_proj": ITCHead(embed_dim),
            "itc_image_proj": ITCHead(embed_dim),
            "itc_vl_text_proj": ITCHead(embed_dim),
            "itc_vl_image_proj": ITCHead(embed_dim),
            "logit_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)),
            "logit_vl_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)),
        }

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        shapes = gather_shapes(batch["text_ids"])
        counts = [count for count, _ in shapes]
        image, text = model.infer_image(batch), model.infer_text(batch)
        exact = model.settings.contrast_gradient == "exact"
        loss, logits, labels = contrast(image["cls_feats"], text["cls_feats"], model.logit_scale, exact, counts)
        vl_feats = image["cls_vlffn_feats"], text["cls_vlffn_feats"]
        vl_loss, vl_logits, _ = contrast(*vl_feats, model.logit_vl_scale, exact, counts)
        scales = {"logit_scale": model.logit_scale, "logit_vl_scale": model.logit_vl_scale}
        output = contrast_output((loss + vl_loss) / 2, logits, labels, scales)
        output.outputs |= {"vl_i2t_logits": vl_logits, "vl_t2i_logits": vl_logits.t(), "shapes": torch.tensor(shapes)}
        return output
