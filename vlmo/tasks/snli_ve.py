"""SNLI-VE: does the image entail the sentence, contradict it, or neither (arXiv 1901.06706)?"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS, IGNORE_INDEX, NUMBER
from vlmo.files import atomic_write
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.tasks.base import LabelSmoothing, PredictionFiles, Step, Task, TaskOutput, Use, accuracy, mean

LABELS = ("entailment", "neutral", "contradiction")  # in the order of their numbers


class Judged(NamedTuple):
    """What was predicted of one pair; the label is empty where the image cannot be decoded."""

    pair: str
    label: str


def entail(predictor: Any, image: Any, hypothesis: Any) -> list[dict[str, float]]:
    """Gives the probabilities that an image entails a sentence, says nothing of it, or contradicts it."""

    def logits(model: Any, batch: Any) -> Tensor:
        hidden = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
        return model.snli_ve_classifier(model.pooler(hidden))

    scores = predictor.compute(logits, image=image, text=hypothesis).softmax(-1)
    return [dict(zip(LABELS, row, strict=True)) for row in scores.tolist()]


class SNLIVEOptions(LabelSmoothing):
    """Visual entailment"""


@TASKS.register("snli_ve")
class SNLIVE(Task):
    """Cross-entropy over the three labels."""

    name = "snli_ve"
    labels = LABELS
    datasets = frozenset({"snli_ve"})
    paths = ("pair", "pooler")
    head_group = True
    writes_predictions = True
    required_heads = ("snli_ve_classifier",)
    Options = SNLIVEOptions
    fields = {**{name: FIELDS[name] for name in ("image", "text_ids", "text_masks")}, "entailment": NUMBER}
    metrics = ("loss", "accuracy", *LABELS)  # (those of a label: accuracy on its pairs, in evaluation)
    uses = (Use("entail", entail, "snli_ve_classifier", "judging entailment", ("image", "hypothesis"), "labels"),)

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"snli_ve_classifier": classifier(width, 2 * width, len(LABELS))}

    def requests(self, step: Step) -> list[Encode]:
        ids = step.batch["text_ids"]
        return [Encode(step.batch["image"], ids, step.batch["text_masks"], first_positions(ids))]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        batch: Any = step.batch
        logits = step.heads["snli_ve_classifier"](step.heads["pooler"](encoded[0][0]))
        labels = batch["entailment"]
        smoothing = self.options.label_smoothing if step.training else 0.0
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing) / max(len(labels), 1)
        output = TaskOutput(loss, {"logits": logits, "labels": labels})
        output.measured = {"loss": mean(loss, len(labels)), "accuracy": accuracy(logits, labels)}
        if not step.training:
            for number, label in enumerate(LABELS):
                own = torch.where(labels == number, labels, IGNORE_INDEX)
                output.measured[label] = accuracy(logits, own)
        return output

    def predictions(self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Judged]:
        """Every pair once, also those whose image cannot be decoded."""
        rows = [Judged(targets["pair_id"], "") for targets in batch["skipped_targets"]]
        if output is not None:
            best = output.outputs["logits"].argmax(-1).tolist()
            rows += [Judged(pair, LABELS[number]) for pair, number in zip(batch["pair_id"], best, strict=True)]
        return rows

    def write_predictions(self, rows: list[Judged], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `snli_ve_test_{checkpoint}.json`, an object of pairID to label."""
        path = folder / f"snli_ve_test_{checkpoint}.json"
        with atomic_write(path) as file:
            file.write(json.dumps(dict(sorted(rows)), indent=0).encode())
        unread = sum(not row.label for row in rows)
        warning = f"{path}: {unread} of {len(rows)} labels are empty, as the images of these pairs cannot be decoded"
        return PredictionFiles([path], {}, [warning] if unread else [])
