"""Visual question answering as classification over the frequent answers, with soft scores."""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.batch import FIELDS, FLAG, Field
from vlmo.errors import VLMoError
from vlmo.files import atomic_write
from vlmo.modules.attention import first_positions
from vlmo.modules.heads import classifier
from vlmo.modules.model import Encode, Hidden
from vlmo.registry import TASKS
from vlmo.settings.groups import PositiveInt
from vlmo.settings.option import option
from vlmo.tasks.base import LabelSmoothing, Measured, PredictionFiles, Step, Task, TaskOutput, Use, mean

# scores of VQA v2 test-dev in percent (paper: table 1), by architecture, at 480 px
PUBLISHED = {"vlmo_base_patch16": 76.6, "vlmo_base_plus_patch16": 78.5, "vlmo_large_patch16": 79.9}
PUBLISHED_AT = 480  # image size


def dense_targets(labels: Any, scores: Any, num_answers: int, device: torch.device) -> Tensor:
    """Gives the scores of all answers, 0 where an answer was not given.

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


def answer_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Takes (B, answers) both; mean over all elements times the number of answers, as published; 0 without any."""
    return F.binary_cross_entropy_with_logits(logits.float(), targets, reduction="sum") / max(len(logits), 1)


def soft_accuracy(logits: Tensor, targets: Tensor) -> Measured:
    """Sums the scores that the annotators' answers give to the predicted answers; logits, targets: (N, answers)."""
    return targets.gather(1, logits.argmax(-1, keepdim=True)).sum(dtype=torch.float64), len(logits)


class Answered(NamedTuple):
    """One row of the file that the VQA server takes; the answer is empty where the image cannot be decoded."""

    question: Any  # its id
    answer: str


def vqa_json(rows: Iterable[tuple[int, str]]) -> str:
    """The VQA server's format, in the order of the questions' numbers."""
    return json.dumps([{"question_id": question, "answer": answer} for question, answer in sorted(rows)])


def answering(head: str) -> Use:
    """Makes what a model with that head can be used for."""

    def answer(predictor: Any, image: Any, question: Any, top_k: int = 1) -> list[Any]:
        """Gives the likeliest answers to a question about an image, best first; scores are independent of each other.

        Raises:
            VLMoError: also if the answers' texts are not known.
        """
        names = predictor.answers
        if not names:
            raise VLMoError(
                "the checkpoint does not hold its answers: give answers=FILE, the JSON list of answers beside the "
                "tables"
            )

        def logits(model: Any, batch: Any) -> Tensor:
            hidden = model.encode_pair(batch["text_ids"], batch["text_masks"], batch["image"])
            return getattr(model, head)(model.pooler(hidden))[:, : len(names)]

        scores = predictor.compute(logits, image=image, text=question).sigmoid()
        return [predictor.best(row, names, top_k) for row in scores]

    return Use("answer", answer, head, "answering", ("image", "question"), "answers", options={"top_k": 5})


class VQAOptions(LabelSmoothing):
    """Visual question answering"""

    vqav2_label_size: PositiveInt = option(3129, "number of answers")


@TASKS.register("vqa")
class VQA(Task):
    """Binary cross-entropy over the answers, times their number.

    Attributes:
        head: name of the classifier.
        label_size: the option that says how many answers there are.
    """

    name = "vqa"
    head: ClassVar[str] = "vqa_classifier"
    label_size: ClassVar[str] = "vqav2_label_size"
    datasets = frozenset({"vqa"})
    test_has_labels = False
    named_classes = True
    writes_predictions = True
    paths = ("pair", "pooler")
    head_group = True
    required_heads = (head,)
    sized_by = {f"{head}.3.": label_size}
    Options: ClassVar[type[LabelSmoothing]] = VQAOptions
    fields = {
        **{name: FIELDS[name] for name in ("image", "text_ids", "text_masks")},
        "vqa_labels": Field(("K",), padding=-1),
        "vqa_scores": Field(("K",), torch.float32, padding=0),
        "answered": FLAG,  # whether anything is known of the answers, which of test sets it is not
    }
    metrics = ("loss", "score")
    primary_metrics = ("score",)
    uses = (answering(head),)

    def heads(self, width: int) -> dict[str, nn.Module | nn.Parameter]:
        return {self.head: classifier(width, 2 * width, getattr(self.options, self.label_size))}

    def requests(self, step: Step) -> list[Encode]:
        ids = step.batch["text_ids"]
        return [Encode(step.batch["image"], ids, step.batch["text_masks"], first_positions(ids))]

    def loss(self, step: Step, encoded: Sequence[Hidden]) -> TaskOutput:
        batch: Any = step.batch
        logits = step.heads[self.head](step.heads["pooler"](encoded[0][0]))
        targets = dense_targets(batch["vqa_labels"], batch["vqa_scores"], logits.shape[1], logits.device)
        loss = answer_loss(logits, targets)
        if step.training and self.options.label_smoothing:
            share = self.options.label_smoothing
            loss = answer_loss(logits, (1 - share) * targets + share / targets.shape[1])
        output = TaskOutput(loss, {"logits": logits, "targets": targets})
        measured_loss = output.loss
        if "answered" in batch and not step.training and not batch["answered"].all():
            logits, targets = logits[batch["answered"]], targets[batch["answered"]]
            measured_loss = answer_loss(logits, targets)
        if len(logits):
            output.measured = {"loss": mean(measured_loss, len(logits)), "score": soft_accuracy(logits, targets)}
        return output

    def chance(self, batches: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The most frequent answer; each answer by its mean score."""
        number = self.options.vqav2_label_size
        rows = [dense_targets(b["vqa_labels"], b["vqa_scores"], number, torch.device("cpu")) for b in batches]
        shares = torch.cat(rows).double().mean(0)
        loss = torch.special.entr(shares) + torch.special.entr(1 - shares)
        return {"loss": float(loss.sum()), "score": float(shares.max())}

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        fits = settings.image_size == PUBLISHED_AT and settings.model_arch in PUBLISHED
        return {"vqa/test-dev/score": PUBLISHED[settings.model_arch]} if fits else {}

    def predictions(self, batch: Any, output: TaskOutput | None, label_names: Sequence[str] | None) -> list[Answered]:
        """Every question once, also those whose image cannot be decoded; none where the answers have no names."""
        if not label_names:
            return []
        rows = [Answered(targets["qid"], "") for targets in batch["skipped_targets"]]
        if output is not None:
            # a model may have room for more answers than there are
            best = output.outputs["logits"][:, : len(label_names)].argmax(-1).tolist()
            asked = batch["qid"].tolist() if isinstance(batch["qid"], Tensor) else batch["qid"]
            rows += [Answered(question, label_names[label]) for question, label in zip(asked, best, strict=True)]
        return rows

    def write_predictions(self, rows: list[Answered], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `vqa_submit_{checkpoint}.json`."""
        if not rows:  # the answers have no names
            return PredictionFiles()
        path = folder / f"vqa_submit_{checkpoint}.json"
        with atomic_write(path) as file:
            file.write(vqa_json(rows).encode())
        unread = sum(not row.answer for row in rows)
        warning = (
            f"{path}: {unread} of {len(rows)} answers are empty, as the images of these questions cannot be decoded; "
            "the server counts them as wrong"
        )
        return PredictionFiles([path], {}, [warning] if unread else [])
