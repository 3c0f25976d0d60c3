"""NLVR2: is the sentence true of the two images?"""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS, FLAG, VALUES
from vlmo.files import atomic_write
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.tasks.base import (
    LabelSmoothing,
    Measured,
    PredictionFiles,
    Step,
    Task,
    TaskOutput,
    Use,
    accuracy,
    entropy,
    mean,
)

# accuracy on the public test set in percent (paper: table 1), by architecture, at 384 px
PUBLISHED = {"vlmo_base_patch16": 83.3, "vlmo_base_plus_patch16": 85.1, "vlmo_large_patch16": 86.9}
PUBLISHED_AT = 384  # image size


class Statement(NamedTuple):
    """What was predicted of one sentence about one pair of images."""

    table: str  # such as nlvr2_dev
    identifier: str  # {split}-{set}-{pair}-{sentence}
    sentence: str
    label: bool
    prediction: bool | None  # None where an image cannot be decoded


def nlvr2_csv(statements: Iterable[Statement]) -> str:
    """Lines `identifier,prediction` with true or false, no heading, as NLVR2's metrics.py reads them.

    What could not be predicted stays empty, which the script takes for wrong.
    """
    words = {True: "true", False: "false", None: ""}
    lines = io.StringIO()
    rows = ((s.identifier, words[s.prediction]) for s in sorted(statements, key=_order))
    csv.writer(lines, lineterminator="\n").writerows(rows)  # (one's own identifiers may have commas)
    return lines.getvalue()


def _order(statement: Statement) -> list[Any]:
    """By the numbers within the identifier."""
    parts = re.split(r"(\d+)", statement.identifier)  # text and numbers in turn
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def consistency(statements: Sequence[Statement]) -> float | None:
    """Share of the sentences that were judged right about every pair they are used with.

    A sentence is used with several pairs of one set (the second part of the identifier). Pairs that cannot be decoded
    are left out. None if there is nothing predicted, or identifiers are of another form.
    """
    from vlmo.datasets.nlvr2_dataset import set_of  # here: whoever only predicts needs no data sets

    right: dict[tuple[str, str], bool] = {}
    for statement in statements:
        place = set_of(statement.identifier)
        if place is None:
            return None
        if statement.prediction is not None:
            key = (place, statement.sentence)
            right[key] = right.get(key, True) and statement.prediction == statement.label
    return sum(right.values()) / len(right) if right else None


def compare(predictor: Any, image_a: Any, image_b: Any, statement: Any) -> list[float]:
    """Gives the probability that a statement is true of two images, left and right."""

    def logits(model: Any, batch: Any) -> Tensor:
        text = batch["text_ids"], batch["text_masks"]
        pooled = [model.pooler(model.encode_pair(*text, batch[f"image_{i}"], i + 1)) for i in (0, 1)]
        return model.nlvr2_classifier(torch.cat(pooled, dim=1))

    scores = predictor.compute(logits, image_0=image_a, image_1=image_b, text=statement)
    return scores.softmax(-1)[:, 1].tolist()


class NLVR2Options(LabelSmoothing):
    """Visual reasoning about two images"""


@TASKS.register("nlvr2")
class NLVR2(Task):
    """The sentence with each image (token types 1 and 2) as a pair of its own; both pooled outputs together."""

    name = "nlvr2"
    datasets = frozenset({"nlvr2"})
    token_types = 3
    paths = ("pair", "pooler")
    head_group = True
    writes_predictions = True
    required_heads = ("nlvr2_classifier",)
    Options = NLVR2Options
    fields = {
        **{name: FIELDS[name] for name in ("image_0", "image_1", "text_ids", "text_masks")},
        "answers": FLAG,  # whether the sentence is true
        "table_name": VALUES,  # of the sample's file, which tells dev from test
    }
    metrics = ("loss", "accuracy", "dev/loss", "dev/accuracy", "test/loss", "test/accuracy")
    primary_metrics = ("dev/accuracy",)
    uses = (
        Use(
            "compare",
            compare,
            "nlvr2_classifier",
            "comparing two images",
            ("image_a", "image_b", "statement"),
            "true",
        ),
    )

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {"nlvr2_classifier": classifier(2 * width, 2 * width, 2)}

    def requests(self, step: Step) -> list[Encode]:
        ids, masks = step.batch["text_ids"], step.batch["text_masks"]
        images = step.batch["image_0"], step.batch["image_1"]
        first = first_positions(ids)
        return [Encode(image, ids, masks, first, token_type=i) for i, image in enumerate(images, 1)]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        batch: Any = step.batch
        pooled = torch.cat([step.heads["pooler"](hidden) for hidden, _ in encoded], dim=1)
        logits = step.heads["nlvr2_classifier"](pooled)
        labels = torch.as_tensor(batch["answers"], device=logits.device).long()
        smoothing = self.options.label_smoothing if step.training else 0.0
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        output = TaskOutput(losses.sum() / max(len(losses), 1), {"logits": logits, "labels": labels})
        if step.training:
            output.measured = _measure("", losses, logits, labels)
        else:  # validation and test tables come in one loader
            dev = torch.tensor(["dev" in name for name in batch["table_name"]], dtype=torch.bool, device=logits.device)
            for split, rows in (("dev/", dev), ("test/", ~dev)):
                output.measured |= _measure(split, losses[rows], logits[rows], labels[rows])
        return output

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The more frequent of true and false."""
        true = torch.cat([batch["answers"] for batch in batches]).double().mean()
        shares = torch.stack([true, 1 - true])
        return {"loss": entropy(shares), "accuracy": float(shares.max())}

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        fits = settings.image_size == PUBLISHED_AT and settings.model_arch in PUBLISHED
        return {"nlvr2/test/accuracy": PUBLISHED[settings.model_arch]} if fits else {}

    def predictions(self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Statement]:
        """Every statement once, also those with an image that cannot be decoded."""
        rows = [
            Statement(row["table_name"], row["identifier"], row["sentence"], row["answers"], None)
            for row in batch["skipped_targets"]
        ]
        if output is not None:
            predicted = (output.outputs["logits"].argmax(-1) == 1).tolist()
            columns = batch["table_name"], batch["identifier"], batch["sentence"], batch["answers"].tolist(), predicted
            rows += [Statement(*row) for row in zip(*columns, strict=True)]
        return rows

    def write_predictions(self, rows: list[Statement], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `{table}_{checkpoint}.csv` for each table, and measures `nlvr2/{dev,test}/consistency`."""
        tables: dict[str, list[Statement]] = defaultdict(list)
        for statement in rows:
            tables[statement.table].append(statement)
        files = PredictionFiles([], {}, [])
        for table, statements in sorted(tables.items()):
            share = consistency(statements)
            if share is not None:
                files.metrics[f"nlvr2/{'dev' if 'dev' in table else 'test'}/consistency"] = share
            path = folder / f"{table}_{checkpoint}.csv"
            with atomic_write(path) as file:
                file.write(nlvr2_csv(statements).encode())
            files.paths.append(path)
            unread = sum(statement.prediction is None for statement in statements)
            if unread:
                files.warnings.append(
                    f"{path}: {unread} of {len(statements)} predictions are empty, as an image of these pairs cannot "
                    "be decoded; the official script counts them as wrong"
                )
        return files


def _measure(prefix: str, losses: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Measured]:
    if not len(losses):
        return {}
    return {f"{prefix}loss": mean(losses.mean(), len(losses)), f"{prefix}accuracy": accuracy(logits, labels)}
