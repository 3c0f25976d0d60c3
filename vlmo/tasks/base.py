"""The contract of an objective: a loss, the heads it needs, and what is measured of it.

An objective declares its heads but does not own them: VLMo registers each under its given name at the root, where
released files have them. To add one, write `objectives/<name>.py` with a subclass of that name, and give it a weight
in `loss_names` (`vlmo/config.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric

from vlmo.settings import PATCH_SIZE, Settings

if TYPE_CHECKING:  # the module imports the objectives
    from vlmo.modules.vlmo_module import VLMo

Batch = Mapping[str, Any]


def num_samples(batch: Batch) -> int:
    """How many samples a batch has; 0 if it lost all of them as unreadable."""
    return next((len(batch[name]) for name in ("text_ids", "image") if name in batch), 0)


@dataclass
class ObjectiveOutput:
    """What one objective computed of a batch.

    Attributes:
        loss: scalar, weighted as published (the option `loss_names` multiplies it further).
        outputs: tensors for people and metrics: "logits", "labels", ...
        updates: per metric, the arguments of its update. A name with a slash ("dev/accuracy") names the phase itself.
        scalars: numbers to log that are no losses.
    """

    loss: Tensor
    outputs: dict[str, Tensor] = field(default_factory=dict)
    updates: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    scalars: dict[str, Tensor] = field(default_factory=dict)


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of (N, classes) logits; 0, not NaN, and with a gradient of zeros where there is no row."""
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def empty_batch(image_size: int, like: Tensor) -> dict[str, Any]:
    """The fields that the objectives read, without any sample; on the device and with the type of `like`.

    It is what a process computes whose images are all unreadable, because the others wait for its part of every
    exchange: losses of 0 whose gradients are zeros.
    """
    texts = like.new_zeros(0, 8, dtype=torch.long)
    images = like.new_zeros(0, 3, image_size, image_size)
    batch: dict[str, Any] = dict.fromkeys(("text_ids", "text_ids_mlm", "text_masks", "text_labels_mlm"), texts)
    batch |= dict.fromkeys(("image", "image_0", "image_1"), images)
    patches = (image_size // PATCH_SIZE) ** 2
    batch |= {"patch_mask": texts.new_zeros(0, patches, dtype=torch.bool), "visual_tokens": texts.new_zeros(0, patches)}
    batch |= {"vqa_labels": texts[:, :0], "vqa_scores": images[:, 0, 0, :0], "answers": texts[:, 0], "table_name": []}
    return batch


class Objective:
    """Base of all objectives; stateless, one instance a model."""

    name: ClassVar[str]
    metrics: ClassVar[dict[str, type[Metric]]]
    primary_metrics: ClassVar[tuple[str, ...]]  # metrics whose mean enters `val/the_metric`
    requires: ClassVar[tuple[str, ...]] = ()  # objectives whose output this one reads
    evaluation_heads: ClassVar[tuple[str, ...]] = ()  # heads without which a loaded file cannot be evaluated
    # what of the model its loss runs through: see `reach.py`
    paths: ClassVar[tuple[str, ...]]

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        """Heads by attribute name at the root of VLMo; one that another objective has registered is shared."""
        raise NotImplementedError

    def num_items(self, batch: Batch) -> Tensor | int:
        """How many things of the batch the loss is a mean over, up to a factor: the share of a part in the whole."""
        return num_samples(batch)

    def prepare(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> dict[str, Any]:
        """Fields, one entry a sample, that the loss needs of the whole batch before it is split into chunks."""
        return {}

    def compute(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> ObjectiveOutput:
        """The loss of a batch; `done`: the objectives before this one."""
        raise NotImplementedError


@dataclass
class Pairs:
    """Texts with images to encode jointly.

    Attributes:
        text_ids, text_masks: (N, T).
        images: (N, I, D), embedded.
        read: (N, R) positions of the text whose hidden states are wanted.
    """

    text_ids: Tensor
    text_masks: Tensor
    images: Tensor
    read: Tensor


class PairObjective(Objective):
    """An objective on pairs: it says which, all objectives' go through the model together, and it scores its own."""

    def pairs(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> Pairs | None:
        """The pairs that it needs, None if there is nothing to learn from; `done`: the objectives on one modality."""
        raise NotImplementedError

    def score(self, model: VLMo, batch: Batch, hidden: Tensor) -> ObjectiveOutput:
        """The loss from the hidden states (N, R, D) of its pairs at the positions that it wanted to read."""
        raise NotImplementedError


def compute_all(
    objectives: Sequence[Objective], model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]
) -> dict[str, ObjectiveOutput]:
    """The losses by name, unweighted; those on pairs come last, as all their pairs are encoded in one pass.

    Args:
        done: of objectives before these.
    """
    found = dict(done)
    for objective in objectives:
        if not isinstance(objective, PairObjective):
            found[objective.name] = objective.compute(model, batch, found)
    joint = [objective for objective in objectives if isinstance(objective, PairObjective)]
    asked = {objective: pairs for objective in joint if (pairs := objective.pairs(model, batch, found)) is not None}
    for objective, hidden in zip(asked, _encode_together(model, list(asked.values())), strict=True):
        found[objective.name] = objective.score(model, batch, hidden)
    return {name: output for name, output in found.items() if name not in done}


def _encode_together(model: VLMo, asked: Sequence[Pairs]) -> list[Tensor]:
    """(N, R, D) for each: one pass for all, so that small batches still fill a GPU."""
    if not asked:
        return []
    longest, most = max(pairs.text_ids.shape[1] for pairs in asked), max(pairs.read.shape[1] for pairs in asked)

    def together(rows: list[Tensor], width: int) -> Tensor:
        return torch.cat([F.pad(each, (0, width - each.shape[1])) for each in rows])

    hidden = model.encode_pairs(
        model.embed_text(together([pairs.text_ids for pairs in asked], longest)),
        torch.cat([pairs.images for pairs in asked]),
        together([pairs.text_masks for pairs in asked], longest),
        together([pairs.read for pairs in asked], most),
    )
    parts = hidden.split([len(pairs.text_ids) for pairs in asked])
    return [part[:, : pairs.read.shape[1]] for part, pairs in zip(parts, asked, strict=True)]
