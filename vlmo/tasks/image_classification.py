"""Image classification: the vision expert alone, fine-tuned as BEiT is on ImageNet (arXiv 2106.08254, appendix)."""

import csv
import io
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS, NUMBER, Batch
from vlmo.distributed.wire_format import as_pixels
from vlmo.files import atomic_write
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.settings.groups import NotNegative, PositiveInt
from vlmo.settings.option import option
from vlmo.tasks.base import LabelSmoothing, Measured, PredictionFiles, Step, Task, TaskOutput, Use, accuracy, mean
from vlmo.transforms.classification import seeded

# top-1 accuracy on ImageNet's validation images in percent (paper: Experiments), at 224 px
PUBLISHED = {"vlmo_base_patch16": 85.5}
PUBLISHED_AT, PUBLISHED_CLASSES = 224, 1000
SHOWN = 5  # classes of an image in the file of predictions, and those that top-5 accuracy looks at


class TokenTypes(nn.Module):
    """The token types of text and image under the names of released files; zeros, as files of stage 1 have none."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, width))


class Classified(NamedTuple):
    """The likeliest classes of an image, best first; none where it cannot be decoded."""

    image_id: str
    classes: list[str]


def mixed(image: Tensor, label: Tensor, keys: Tensor, options: Any) -> tuple[Tensor, Tensor]:
    """Mixes each image with another one of the batch, by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    Which, and how much, follows from the keys. Of an odd number of images, the last stays as it is.

    Args:
        image: (B, 3, size, size). label: (B,). keys: (B,).

    Returns:
        images, and (B, classes) targets, smoothed.
    """
    from timm.data.mixup import Mixup, mixup_target  # here, since importing timm takes longer than all else

    classes, smoothing = options.num_classes, options.label_smoothing
    mix = Mixup(options.mixup, options.cutmix, label_smoothing=smoothing, num_classes=classes)
    even = len(label) // 2 * 2
    alone = mixup_target(label[even:], classes, smoothing=smoothing)
    if not even:
        return image, alone
    with seeded(int(np.random.SeedSequence(keys.tolist()).generate_state(1)[0])):
        together, targets = mix(image[:even].clone(), label[:even])
    return torch.cat([together, image[even:]]), torch.cat([targets, alone])


def top_hits(logits: Tensor, labels: Tensor) -> Measured:
    """Counts the labels among the five largest logits; logits: (N, classes), labels: (N,)."""
    best = logits.topk(min(SHOWN, logits.shape[1]), dim=1).indices
    return (best == labels[:, None]).any(1).sum(), len(labels)


def classify_image(predictor: Any, image: Any, top_k: int = 5) -> list[Any]:
    """Gives the likeliest of the classes that the checkpoint was trained on, best first, with their probabilities."""

    def logits(model: Any, batch: Any) -> Tensor:
        return model.image_classifier(pooled(model.encode_image(batch["image"])[0]))

    scores = predictor.compute(logits, image=image).softmax(-1)
    names = predictor.answers or [str(number) for number in range(scores.shape[1])]
    return [predictor.best(row, names, top_k) for row in scores]


def pooled(hidden: Tensor) -> Tensor:
    """Gives the mean over the patches: (B, I, D) -> (B, D)."""
    return hidden[:, 1:].mean(dim=1)


class ClassificationOptions(LabelSmoothing):
    """Image classification"""

    num_classes: PositiveInt = option(1000, "number of classes")
    mixup: NotNegative = option(0.8, "alpha of mixup, which mixes the images of a pass and their labels; 0: off")
    cutmix: NotNegative = option(1.0, "alpha of CutMix, which takes turns with mixup; 0: off")


@TASKS.register("image_classification")
class ImageClassification(Task):
    """The mean over the patches, normalised, and a linear layer; cross-entropy."""

    name = "image_classification"
    alone = True
    datasets = frozenset({"labelled_images"})
    reads = frozenset({"image"})
    experts = ()
    has_text = False
    named_classes = True
    writes_predictions = True
    paths = ("image",)
    head_group = True
    required_heads = ("image_classifier",)
    sized_by = {"image_classifier.fc.": "num_classes"}
    Options = ClassificationOptions
    fields = {"image": FIELDS["image"], "label": NUMBER, "sample_key": NUMBER}
    metrics = ("loss", "accuracy", "accuracy_top5")
    uses = (
        Use(
            "classify_image",
            classify_image,
            "image_classifier",
            "classifying an image",
            ("image",),
            "classes",
            options={"top_k": 5},
        ),
    )

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        parts = OrderedDict(norm=nn.LayerNorm(width, eps=1e-6), fc=nn.Linear(width, self.options.num_classes))
        return {"image_classifier": nn.Sequential(parts), "token_type_embeddings": TokenTypes(width)}

    @classmethod
    def check(cls, settings: Any) -> list[str]:
        if settings.test_only or not (settings.mixup or settings.cutmix):
            return []
        problems = []
        if settings.layout_invariant:
            problems.append(
                "layout_invariant=True: mixup and cutmix mix the samples of a pass, on whose size nothing may depend "
                "then; give mixup=0 cutmix=0, or drop it"
            )
        elif settings.per_gpu_batchsize == 1:
            problems.append(
                "per_gpu_batchsize=1: mixup and cutmix mix the samples of a pass; give more, or switch both off"
            )
        return problems

    def derive(self, batch: Batch) -> dict[str, Tensor]:
        """In training, the mixed images and their targets."""
        if "sample_key" not in batch or not (self.options.mixup or self.options.cutmix):
            return {}
        fields: Any = batch
        image, targets = mixed(as_pixels(fields["image"]), fields["label"], fields["sample_key"], self.options)
        return {"image": image, "targets": targets}

    def requests(self, step: Step) -> list[Encode]:
        return [Encode(step.batch["image"])]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        batch: Any = step.batch
        logits, labels = step.heads["image_classifier"](pooled(encoded[0][0])), batch["label"]
        smoothing = self.options.label_smoothing if step.training else 0.0
        if "targets" in batch:
            loss = F.cross_entropy(logits.float(), batch["targets"], reduction="sum") / max(len(labels), 1)
        else:
            losses = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
            loss = losses / max(len(labels), 1)
        measured = {"loss": mean(loss, len(labels))}
        if "targets" not in batch:  # (of a mixed image there is no right class)
            measured |= {"accuracy": accuracy(logits, labels), "accuracy_top5": top_hits(logits, labels)}
        return TaskOutput(loss, {"logits": logits, "labels": labels}, measured)

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        fits = settings.image_size == PUBLISHED_AT and settings.num_classes == PUBLISHED_CLASSES
        if not fits or settings.model_arch not in PUBLISHED:
            return {}
        return {"image_classification/test/accuracy": PUBLISHED[settings.model_arch]}

    def predictions(self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Classified]:
        """Every image once, also those that cannot be decoded."""
        rows = [Classified(row["image_id"], []) for row in batch["skipped_targets"]]
        if output is not None:
            logits = output.outputs["logits"]
            names = label_names or [str(number) for number in range(logits.shape[1])]
            best = logits.topk(min(SHOWN, logits.shape[1]), dim=1).indices.tolist()
            rows += [
                Classified(image_id, [names[number] for number in numbers])
                for image_id, numbers in zip(batch["image_id"], best, strict=True)
            ]
        return rows

    def write_predictions(self, rows: list[Classified], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `image_classification_{checkpoint}.csv`: the image and its five likeliest classes, best first."""
        path = folder / f"image_classification_{checkpoint}.csv"
        lines = io.StringIO()
        table = csv.writer(lines, lineterminator="\n")
        table.writerow(["image_id", *(f"class_{place}" for place in range(1, SHOWN + 1))])
        table.writerows([row.image_id, *row.classes] for row in sorted(rows))
        with atomic_write(path) as file:
            file.write(lines.getvalue().encode())
        unread = sum(not row.classes for row in rows)
        warning = f"{path}: {unread} of {len(rows)} images cannot be decoded: their lines are empty"
        return PredictionFiles([path], {}, [warning] if unread else [])
