"""Image-text contrast (stage 3): which text belongs to which image?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vlmo.distributed.collectives import all_gather_rows, gather_shapes
from vlmo.metrics import Accuracy, Mean
from vlmo.modules.heads import ITCHead
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, Objective, ObjectiveOutput, mean_cross_entropy

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
    image, text = all_gather_rows(both, exact_gradient, shapes).chunk(2, dim=1)
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


class ContrastObjective(Objective):
    """Encodes images and texts apart and compares all with all: in two steps, for `contrast_cache.py`."""

    metrics = {"loss": Mean, "i2t_accuracy": Accuracy, "t2i_accuracy": Accuracy}
    primary_metrics = ("i2t_accuracy", "t2i_accuracy")

    def features(self, model: VLMo, batch: Batch) -> dict[str, Tensor]:
        """What is compared: (B, D) each, of unit length, by name."""
        raise NotImplementedError

    def compare(self, model: VLMo, features: Mapping[str, Tensor], shapes: list[list[int]]) -> ObjectiveOutput:
        """The loss of a batch; shapes: of its texts on every process, as `gather_shapes` gives them."""
        raise NotImplementedError

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        shapes = gather_shapes(batch["text_ids"])
        return self.compare(model, self.features(model, batch), shapes)


class ITC(ContrastObjective):
    """Mean of the contrast on the L/V-FFN features and of that on the VL-FFN features, if there is a VL-FFN."""

    name = "itc"
    paths = ("text", "image", "vl branch")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        heads: dict[str, nn.Module | nn.Parameter] = {
            "itc_text_proj": ITCHead(embed_dim),
            "itc_image_proj": ITCHead(embed_dim),
        }
        scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        if settings.shared_ffn:  # no VL-FFN
            return heads | {"logit_scale": scale}
        heads |= {"itc_vl_text_proj": ITCHead(embed_dim), "itc_vl_image_proj": ITCHead(embed_dim)}
        return heads | {"logit_scale": scale, "logit_vl_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))}

    def features(self, model: VLMo, batch: Batch) -> dict[str, Tensor]:
        return model.encode_apart(batch, vl_branch=not model.settings.shared_ffn)

    def compare(self, model: VLMo, features: Mapping[str, Tensor], shapes: list[list[int]]) -> ObjectiveOutput:
        counts = [count for count, _ in shapes]
        exact = model.settings.contrast_gradient == "exact"
        loss, logits, labels = contrast(features["image"], features["text"], model.logit_scale, exact, counts)
        scales, vl_outputs = {"logit_scale": model.logit_scale}, {}
        if not model.settings.shared_ffn:
            vl_feats = features["vl_image"], features["vl_text"]
            vl_loss, vl_logits, _ = contrast(*vl_feats, model.logit_vl_scale, exact, counts)
            loss = (loss + vl_loss) / 2
            scales["logit_vl_scale"] = model.logit_vl_scale
            vl_outputs = {"vl_i2t_logits": vl_logits, "vl_t2i_logits": vl_logits.t()}
        output = contrast_output(loss, logits, labels, scales)
        output.outputs |= vl_outputs | {"shapes": torch.tensor(shapes)}
        return output
