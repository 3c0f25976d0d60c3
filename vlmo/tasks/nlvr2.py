"""NLVR2: is the sentence true of the two pictures?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.metrics import Accuracy, Mean
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, ObjectiveOutput, PairObjective, Pairs

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


class NLVR2(PairObjective):
    """The sentence with each picture (image types 1 and 2) as a pair of its own; both pooled outputs together."""

    name = "nlvr2"
    metrics = {
        "loss": Mean,
        "accuracy": Accuracy,
        "dev/loss": Mean,
        "dev/accuracy": Accuracy,
        "test/loss": Mean,
        "test/accuracy": Accuracy,
    }
    primary_metrics = ("dev/accuracy",)
    evaluation_heads = ("nlvr2_classifier",)
    paths = ("pair", "pooler")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"nlvr2_classifier": classifier(2 * embed_dim, 2 * embed_dim, 2)}

    def pairs(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> Pairs:
        images = torch.cat([model.embed_image(batch[f"image_{i}"], token_type=i + 1) for i in (0, 1)])
        ids, masks = (batch[name].repeat(2, 1) for name in ("text_ids", "text_masks"))
        return Pairs(ids, masks, images, first_positions(ids))

    def score(self, model: VLMo, batch: Batch, hidden: Tensor) -> ObjectiveOutput:
        logits = model.nlvr2_classifier(torch.cat(model.pooler(hidden).chunk(2), dim=1))
        labels = torch.as_tensor(batch["answers"], device=logits.device).long()
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        output = ObjectiveOutput(loss=losses.sum() / max(len(losses), 1), outputs={"logits": logits, "labels": labels})
        if model.training:
            output.updates = _measure("", losses, logits, labels)
        else:  # validation and test tables come in one loader
            dev = torch.tensor(["dev" in name for name in batch["table_name"]], dtype=torch.bool, device=logits.device)
            for split, rows in (("dev/", dev), ("test/", ~dev)):
                output.updates |= _measure(split, losses[rows], logits[rows], labels[rows])
        return output


def _measure(prefix: str, losses: Tensor, logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor | int, ...]]:
    if not len(losses):
        return {}
    return {f"{prefix}loss": (losses.mean(), len(losses)), f"{prefix}accuracy": (logits, labels)}
