"""Image-text contrast (stage 3): which text belongs to which image? (Paper: Image-Text Contrast.)"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS
from vlmo.distributed.collectives import all_gather_rows
from vlmo.errors import VLMoError
from vlmo.modules.attention import first_positions
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.settings.groups import Positive
from vlmo.settings.option import option
from vlmo.tasks.base import LabelSmoothing, Step, Task, TaskOutput, accuracy, mean, mean_cross_entropy, num_samples
from vlmo.tasks.contrast_losses import SIGLIP_BIAS, SIGLIP_LOG_SCALE, cross_entropy, siglip

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
    same_image: Tensor | None = None,
    positive: bool = False,
    decoupled: bool = False,
    smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes InfoNCE over the pairs of all processes, both ways (paper: Image-Text Contrast).

    Captions of one image are taken for strangers of it there. With `same_image` they are not: they are left out of the
    denominators, or (`positive`) are right answers too, and the loss is the mean over them, as of Supervised
    Contrastive Learning (arXiv 2004.11362, equation 2).

    Args:
        image, text: (B, D), unit length, of this process.
        log_scale: scalar, log of the inverse temperature.
        exact_gradient: see `all_gather_rows`.
        counts: B of every process, by rank, where it is known already.
        same_image: (N, N) bool, which two different pairs have one image; None: none has, as published.
        positive: see above.
        decoupled, smoothing: see `cross_entropy`.

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
    if decoupled or smoothing:
        how = same_image, positive, decoupled, smoothing
        loss = cross_entropy(logits, *how) + cross_entropy(logits.t(), *how)
    elif same_image is None:
        loss = mean_cross_entropy(logits, labels) + mean_cross_entropy(logits.t(), labels)
    elif positive:
        right = same_image.float().fill_diagonal_(1)
        right = right / right.sum(1, keepdim=True)
        loss = mean_cross_entropy(logits, right) + mean_cross_entropy(logits.t(), right)
    else:
        others = logits.masked_fill(same_image, -torch.inf)
        loss = mean_cross_entropy(others, labels) + mean_cross_entropy(others.t(), labels)
    return loss / 2, logits, labels


def same_images(keys: Tensor, rows: int | None = None) -> Tensor:
    """Tells which two different pairs have one image, (N, N) bool, or the first rows of that.

    Args:
        keys: (N,) equal where the image is.
    """
    return (keys[:rows, None] == keys).fill_diagonal_(False)


def count_same_images(keys: Tensor) -> Tensor:
    """Counts the pairs of pairs that have one image, a scalar, without comparing all with all."""
    keys = keys.sort().values
    alike = torch.searchsorted(keys, keys, right=True) - torch.searchsorted(keys, keys)  # with each, itself included
    return (alike - 1).sum() / 2


class ContrastOptions(LabelSmoothing):
    """Contrast"""

    contrast_loss: Literal["softmax", "decoupled", "siglip"] = option(
        "softmax",
        "InfoNCE (softmax, as published), the same without the own pair in the denominator (decoupled), or SigLIP's "
        "sigmoid of every pair (siglip)",
    )
    contrast_gradient: Literal["own", "exact"] = option(
        "own",
        "over several devices: the gradient of the own rows (as published), or the exact one of the joint batch, which "
        "siglip always has",
    )
    same_image: Literal["published", "mask", "positive"] = option(
        "published",
        "other captions of a pair's image: negatives (as published), left out of contrast and matching (mask), "
        "or positives of the contrast",
    )
    logit_scale_max: Positive | None = option(
        None, "what the contrast multiplies cosines by is at most this, such as 100; None: not limited (as published)"
    )


class ContrastTask(Task):
    """Base of tasks that encode images and texts apart and compare all with all.

    A subclass says what of the encoded sequences is compared (`features`) and how (`compare`). In between,
    `contrast_cache` collects the features of many chunks.
    """

    provides = "contrast"
    spans_processes = True
    fields = {name: FIELDS[name] for name in ("image", "image_key", "text_ids", "text_masks")}
    metrics: ClassVar[tuple[str, ...]] = ("loss", "i2t_accuracy", "t2i_accuracy")
    primary_metrics = ("i2t_accuracy", "t2i_accuracy")
    Options = ContrastOptions
    vl_branch: ClassVar[bool] = False  # whether features of the VL-FFN branch are compared too

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"itc_text_proj": ITCHead(width), "itc_image_proj": ITCHead(width), **self._temperature()}

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
        keys = self._image_keys(step, features["image"].device)
        output = self._compare_branch(step, features, "", keys)
        if keys is not None:
            output.scalars["same_image_pairs"] = count_same_images(keys)
        if "vl_image" in features:
            vl_output = self._compare_branch(step, features, "vl_", keys)
            output.loss = (output.loss + vl_output.loss) / 2
            (total, count), (vl_total, _) = output.measured["loss"], vl_output.measured["loss"]
            output.measured["loss"] = (total + vl_total) / 2, count
            for name in ("i2t_accuracy", "t2i_accuracy"):
                output.measured[f"vl_{name}"] = vl_output.measured[name]
            output.outputs |= {f"vl_{way}_logits": vl_output.outputs[f"{way}_logits"] for way in ("i2t", "t2i")}
            output.scalars["vl_logit_scale"] = vl_output.scalars["logit_scale"]
        return output

    def _compare_branch(
        self, step: Step, features: Mapping[str, Tensor], branch: str, keys: Tensor | None
    ) -> TaskOutput:
        """Compares the features of one branch, "" or "vl_".

        Args:
            keys: (N,) of all processes' images.
        """
        options, counts = self.options, [size.samples for size in step.sizes]
        image, text = features[f"{branch}image"], features[f"{branch}text"]
        log_scale = step.heads[f"logit_{branch}scale"]
        positive, same = options.same_image == "positive", None
        if options.same_image != "published":
            assert keys is not None
            same = same_images(keys, len(image) if options.contrast_loss == "siglip" else None)
        if options.contrast_loss == "siglip":
            bias = step.heads[f"logit_{branch}bias"]
            total, *ways = siglip(image, text, log_scale, bias, counts, same, positive)
            # (the mean over processes, each of which has its own rows of the joint batch)
            loss, labels = total * len(counts) / max(sum(counts), 1), torch.arange(len(image), device=image.device)
            output = contrast_output(loss, ways[0], labels, same, ways[1])
            output.measured["loss"] = total.detach().double(), len(image)
        else:
            exact = options.contrast_gradient == "exact" or step.keys is not None
            decoupled = options.contrast_loss == "decoupled"
            smoothing = options.label_smoothing if step.training else 0.0
            compared = contrast(image, text, log_scale, exact, counts, same, positive, decoupled, smoothing)
            output = contrast_output(*compared, same)
        output.scalars = {"logit_scale": log_scale.detach().exp()}
        return output

    def limit_weights(self, heads: Mapping[str, Any]) -> None:
        if self.options.logit_scale_max is not None:
            for name in ("logit_scale", "logit_vl_scale"):
                if name in heads:
                    heads[name].clamp_(max=math.log(self.options.logit_scale_max))

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        problems = []
        if settings.contrast_loss == "siglip" and settings.label_smoothing:
            problems.append("label_smoothing: contrast_loss=siglip has no softmax to smooth; drop one")
        if settings.logit_scale_max and (settings.use_sharded_training or settings.strategy.startswith("deepspeed")):
            problems.append("logit_scale_max: DeepSpeed keeps its own copy of the weights; use strategy=auto or fsdp2")
        return problems

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        return self.compare(step, self.features(step, encoded))

    def scores(self, heads: Mapping[str, Any], image: Tensor, text: Tensor) -> Tensor:
        """Compares all images with all texts at the learnt temperature: (I, D), (T, D) features -> (I, T) logits."""
        return heads["logit_scale"].detach().float().exp() * image @ text.t()

    def _image_keys(self, step: Step, device: torch.device) -> Tensor | None:
        """Gives (N,) keys of all processes' images, the own first; None where the batch does not say which it has."""
        if "image_key" in step.batch:
            keys = step.batch["image_key"].to(device)
            return all_gather_rows(keys[:, None], shapes=[(size.samples, 1) for size in step.sizes])[:, 0]
        if self.options.same_image == "published":
            return None
        raise VLMoError(f"same_image={self.options.same_image}: the batch has no image_key to know equal images by")

    def _temperature(self, branch: str = "") -> dict[str, nn.Module | nn.Parameter]:
        """Gives `logit_scale`, and `logit_bias` where the loss has one; of a branch likewise."""
        has_bias = self.options.contrast_loss == "siglip"
        scale = nn.Parameter(torch.tensor(SIGLIP_LOG_SCALE if has_bias else INITIAL_LOG_SCALE))
        bias: dict[str, nn.Module | nn.Parameter] = {f"logit_{branch}bias": nn.Parameter(torch.tensor(SIGLIP_BIAS))}
        return {f"logit_{branch}scale": scale} | (bias if has_bias else {})

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Any of the texts that are contrasted over all processes could be the image's."""
        devices = self.options.devices * self.options.num_nodes
        size = min(max(num_samples(batch) for batch in batches) * devices, self.options.joint_batch)
        loss = {"loss": math.log(size)} if self.options.contrast_loss == "softmax" else {}
        return loss | {key: 1 / size for key in self.metrics if key != "loss"}

    @property
    def _has_vl_branch(self) -> bool:
        return self.vl_branch and not self.options.shared_ffn


def contrast_output(
    loss: Tensor,
    logits: Tensor,
    labels: Tensor,
    same_image: Tensor | None = None,
    t2i_logits: Tensor | None = None,
) -> TaskOutput:
    """Gives what a contrast must say for the tasks that build upon it: similarities both ways, and their metrics.

    Args:
        logits: (N, N) image-to-text similarities of all processes' pairs, the own first; or the own rows of these.
        labels: (N,) the column of each row's own text.
        same_image: (N, N) bool, pairs that are no negatives of each other: accuracy does not count them as errors.
        t2i_logits: where `logits` are the own rows alone, those of the texts.
    """
    t2i_logits = logits.t() if t2i_logits is None else t2i_logits
    outputs = {"i2t_logits": logits, "t2i_logits": t2i_logits, "labels": labels}
    if same_image is not None:
        outputs["same_image"] = same_image
        logits, t2i_logits = (each.masked_fill(same_image, -torch.inf) for each in (logits, t2i_logits))
    return TaskOutput(
        loss=loss,
        outputs=outputs,
        measured={
            "loss": mean(loss, len(labels)),
            "i2t_accuracy": accuracy(logits, labels),
            "t2i_accuracy": accuracy(t2i_logits, labels),
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
        heads = super().heads(width)
        if not self._has_vl_branch:
            return heads
        heads |= {"itc_vl_text_proj": ITCHead(width), "itc_vl_image_proj": ITCHead(width)}
        return heads | self._temperature("vl_")
