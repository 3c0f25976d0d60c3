"""Image-text contrast (stage 3): which text belongs to which image? (Paper: section 3.2.)"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS
from vlmo.distributed.collectives import all_gather_rows
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.settings.option import OptionGroup, option
from vlmo.tasks.base import Step, Task, TaskOutput, accuracy, mean, mean_cross_entropy

INITIAL_LOG_SCALE = math.log(1 / 0.07)


class ITCHead(nn.Module):
    """Projection into the contrastive space."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D) of unit length"""
        return F.normalize(self.fc(x), dim=-1)


def contrast(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    exact_gradient: bool,
    counts: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes InfoNCE over the pairs of all processes, both ways (paper: equations 2 and 3).

    Args:
        image, text: (B, D), unit length, of this process.
        log_scale: scalar, log of the inverse temperature.
        exact_gradient: see `all_gather_rows`.
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


class ContrastOptions(OptionGroup):
    """Contrast"""

    contrast_gradient: Literal["own", "exact"] = option(
        "own", "over several devices: the gradient of the own rows (as published), or the exact one of the joint batch"
    )


class ContrastTask(Task):
    """Base of tasks that encode images and texts apart and compare all with all.

    A subclass says what of the encoded sequences is compared (`features`) and how (`compare`). In between,
    `contrast_cache` collects the features of many chunks.
    """

    provides = "contrast"
    spans_processes = True
    fields = {name: FIELDS[name] for name in ("image", "text_ids", "text_masks")}
    metrics: ClassVar[tuple[str, ...]] = ("loss", "i2t_accuracy", "t2i_accuracy")
    primary_metrics = ("i2t_accuracy", "t2i_accuracy")
    Options = ContrastOptions
    vl_branch: ClassVar[bool] = False  # whether features of the VL-FFN branch are compared too

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {
            "itc_text_proj": ITCHead(width),
            "itc_image_proj": ITCHead(width),
            "logit_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)),
        }

    def requests(self, step: Step) -> list[Encode]:
        ids, vl_branch = step.batch["text_ids"], self._has_vl_branch
        positions = first_positions(ids)
        return [
            Encode(image=step.batch["image"], positions=positions, vl_branch=vl_branch),
            Encode(text_ids=ids, text_masks=step.batch["text_masks"], positions=positions, vl_branch=vl_branch),
        ]

    def features(self, step: Step, encoded: Sequence[Hidden]) -> dict[str, Tensor]:
        """Gives what is compared, (B, D) each, of unit length: "image", "text", of the VL-FFN branch "vl_image", ..."""
        features = {}
        for side, (hidden, vl_hidden) in zip(("image", "text"), encoded, strict=True):
            features[side] = step.heads[f"itc_{side}_proj"](hidden[:, 0])
            if vl_hidden is not None:
                features[f"vl_{side}"] = step.heads[f"itc_vl_{side}_proj"](vl_hidden[:, 0])
        return features

    def compare(self, step: Step, features: Mapping[str, Tensor]) -> TaskOutput:
        """Computes the loss over the pairs of all processes from the features of this one's."""
        counts = [size.samples for size in step.sizes]
        exact = self.options.contrast_gradient == "exact" or step.keys is not None
        log_scale = step.heads["logit_scale"]
        output = contrast_output(*contrast(features["image"], features["text"], log_scale, exact, counts))
        output.scalars = {"logit_scale": log_scale.detach().exp()}
        if "vl_image" in features:
            log_scale = step.heads["logit_vl_scale"]
            vl_loss, vl_logits, labels = contrast(features["vl_image"], features["vl_text"], log_scale, exact, counts)
            output.loss = (output.loss + vl_loss) / 2
            output.measured["loss"] = mean(output.loss, len(vl_logits))
            output.measured["vl_i2t_accuracy"] = accuracy(vl_logits, labels)
            output.measured["vl_t2i_accuracy"] = accuracy(vl_logits.t(), labels)
            output.outputs |= {"vl_i2t_logits": vl_logits, "vl_t2i_logits": vl_logits.t()}
            output.scalars["vl_logit_scale"] = log_scale.detach().exp()
        return output

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        return self.compare(step, self.features(step, encoded))

    def scores(self, heads: Mapping[str, Any], image: Tensor, text: Tensor) -> Tensor:
        """Compares all images with all texts at the learnt temperature: (I, D), (T, D) features -> (I, T) logits."""
        return heads["logit_scale"].detach().float().exp() * image @ text.t()

    @property
    def _has_vl_branch(self) -> bool:
        return self.vl_branch and not self.options.shared_ffn


def contrast_output(loss: Tensor, logits: Tensor, labels: Tensor) -> TaskOutput:
    """Gives what a contrast must say for the tasks that build upon it: similarities both ways, and their metrics.

    Args:
        logits: (N, N) image-to-text similarities of all processes' pairs, the own first.
        labels: (N,) the column of each row's own text.
    """
    return TaskOutput(
        loss=loss,
        outputs={"i2t_logits": logits, "t2i_logits": logits.t(), "labels": labels},
        measured={
            "loss": mean(loss, len(labels)),
            "i2t_accuracy": accuracy(logits, labels),
            "t2i_accuracy": accuracy(logits.t(), labels),
        },
    )


@TASKS.register("itc")
class ITC(ContrastTask):
    """Mean of the contrast on the L/V-FFN features and of that on the VL-FFN features, if there is a VL-FFN."""

    name = "itc"
    stage = 3
    paths = ("text", "image", "vl branch")
    metrics = (*ContrastTask.metrics, "vl_i2t_accuracy", "vl_t2i_accuracy")
    vl_branch = True

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        heads: dict[str, Any] = {"itc_text_proj": ITCHead(width), "itc_image_proj": ITCHead(width)}
        scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))
        if not self._has_vl_branch:
            return heads | {"logit_scale": scale}
        heads |= {"itc_vl_text_proj": ITCHead(width), "itc_vl_image_proj": ITCHead(width)}
        return heads | {"logit_scale": scale, "logit_vl_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))}
