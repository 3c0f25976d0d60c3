"""Visual question answering as classification over the frequent answers, with soft scores."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.metrics import Mean, VQAScore
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.settings import Settings
from vlmo.tasks.base import Batch, ObjectiveOutput, PairObjective, Pairs

if TYPE_CHECKING:
    from vlmo.modules.vlmo_module import VLMo


def dense_targets(labels: Any, scores: Any, num_answers: int, device: torch.device) -> Tensor:
    """Scores of all answers, 0 where an answer was not given.

    Args:
        labels, scores: (B, K) tensors, label -1 where a question has fewer than K answers; or lists of lists.

    Returns:
        (B, answers) float32
    """
    if not isinstance(labels, Tensor):
        rows = torch.repeat_interleave(torch.tensor([len(row) for row in labels]))
        columns = torch.tensor(list(chain.from_iterable(labels)), dtype=torch.long)
        values = torch.tensor(list(chain.from_iterable(scores)), dtype=torch.float32)
        targets = torch.zeros(len(labels), num_answers)
        targets[rows, columns] = values
        return targets.to(device)
    # padding goes to one column more, which is cut off
    targets = torch.zeros(len(labels), num_answers + 1, device=device)
    columns = torch.where(labels < 0, num_answers, labels).to(device)
    return targets.scatter_(1, columns, scores.float().to(device))[:, :num_answers]


class VQA(PairObjective):
    """Binary cross-entropy over the answers, times their number."""

    name = "vqa"
    metrics = {"loss": Mean, "score": VQAScore}
    primary_metrics = ("score",)
    evaluation_heads = ("vqa_classifier",)
    paths = ("pair", "pooler")

    def heads(self, embed_dim: int, settings: Settings) -> dict[str, nn.Module | nn.Parameter]:
        return {"vqa_classifier": classifier(embed_dim, 2 * embed_dim, settings.vqav2_label_size)}

    def pairs(self, model: VLMo, batch: Batch, done: Mapping[str, ObjectiveOutput]) -> Pairs:
        ids, image = batch["text_ids"], model.embed_image(batch["image"], token_type=1)
        return Pairs(ids, batch["text_masks"], image, first_positions(ids))

    def score(self, model: VLMo, batch: Batch, hidden: Tensor) -> ObjectiveOutput:
        logits = model.vqa_classifier(model.pooler(hidden))
        targets = dense_targets(batch["vqa_labels"], batch["vqa_scores"], logits.shape[1], logits.device)
        loss = answer_loss(logits, targets)
        output = ObjectiveOutput(loss=loss, outputs={"logits": logits, "targets": targets})
        if "answered" in batch and not model.training:  # of the questions of a test set nothing is known to measure
            logits, targets = logits[batch["answered"]], targets[batch["answered"]]
        if len(logits):
            measured = loss if len(logits) == len(output.outputs["logits"]) else answer_loss(logits, targets)
            output.updates = {"loss": (measured, len(logits)), "score": (logits, targets)}
        return output


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """(B, answers) both; mean over all elements times the number of answers, as published; 0 without any question."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / max(len(logits), 1)
