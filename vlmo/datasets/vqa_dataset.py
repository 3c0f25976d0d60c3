"""Questions about images, with the answers people gave."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from vlmo.batch import FLAG, NUMBER, VALUES, Field
from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.errors import VLMoError
from vlmo.label_names import read_label_names
from vlmo.registry import DATASETS
from vlmo.sources.arrow_tables import RowLocation, flat_columns

REMEDY = "these were not made together; put back the file and the tables of one conversion, or convert anew"


class VQADataset(BaseDataset):
    """A sample is one question with its image.

    `answered` tells a question of a test table, of whose answers nothing is known, from one whose answers are all
    outside the vocabulary.

    Attributes:
        answers_file: beside the tables, list of the answers in the order of their labels.
        label_size: the option that says how many answers a model has.
    """

    answers_file: ClassVar[str] = "vqav2_answers.json"
    label_size: ClassVar[str] = "vqav2_label_size"
    text_column: ClassVar[str] = "questions"
    columns: ClassVar[dict[str, str]] = {
        "image": "binary",
        "questions": "a list of texts",
        "question_id": "a list of whole numbers",
    }
    target_columns: ClassVar[dict[str, str]] = {
        "answers": "a list of lists of texts",
        "answer_labels": "a list of lists of whole numbers",
        "answer_scores": "a list of lists of numbers",
    }
    fields: ClassVar[Mapping[str, Field]] = {
        "qid": NUMBER,
        "answered": FLAG,
        "vqa_answer": VALUES,  # a list of strings each
        "vqa_labels": Field(("K",), padding=-1),
        "vqa_scores": Field(("K",), torch.float32, padding=0),
    }

    def targets(self, location: RowLocation) -> dict[str, Any]:
        labels = location.list_item("answer_labels")
        return {
            "qid": location.list_item("question_id"),
            "answered": labels is not None,
            "vqa_answer": location.list_item("answers") or [],
            "vqa_labels": labels or [],
            "vqa_scores": location.list_item("answer_scores") or [],
        }

    @classmethod
    def label_names(cls, root: Path, paths: Sequence[Path]) -> list[str] | None:
        """The answers, from the file beside the tables, else as far as the tables show them."""
        answers = _read_answers(root / cls.answers_file)
        return answers if answers is not None else answers_in_tables(paths) or None

    @classmethod
    def check_labels(cls, name: str, root: Path, paths: Sequence[Path], settings: Any) -> list[str]:
        """Is there an output for every label that occurs in `paths`, and for every answer of the vocabulary?"""
        try:
            vocabulary = _read_answers(root / cls.answers_file) or []
            contradiction = _contradiction(root / cls.answers_file, vocabulary, paths)
            bounds = [pc.min_max(labels) for path in paths for (labels,) in flat_columns(path, "answer_labels")]
        except VLMoError as error:
            return [str(error)]
        known = [bound for bound in bounds if bound["max"].is_valid]
        lowest = min((bound["min"].as_py() for bound in known), default=0)
        number = max([len(vocabulary), *(bound["max"].as_py() + 1 for bound in known)])
        if lowest < 0:
            return [f"{name}: the data has the label {lowest}; labels count from 0"]
        if number > getattr(settings, cls.label_size):
            return [f"{name}: the data has {number} answers: pass {cls.label_size}={number}"]
        return [contradiction] if contradiction else []


def _read_answers(path: Path) -> list[str] | None:
    """Those of the file beside the tables; None if there is none."""
    return read_label_names(path) if path.is_file() else None


def _contradiction(answers_file: Path, vocabulary: Sequence[str], paths: Sequence[Path]) -> str:
    """Where the file of answers and the tables, or two tables, name a label differently; "" if nowhere."""
    source = {label: answers_file for label in range(len(vocabulary))}
    names = dict(enumerate(vocabulary))
    for path in paths:
        for label, answer in enumerate(answers_in_tables([path])):
            if answer and vocabulary and label >= len(vocabulary):
                return f"{answers_file}: has {len(vocabulary)} answers, {path} has number {label}: {REMEDY}"
            if answer and names.setdefault(label, answer) != answer:
                return f"{source[label]}: answer {label} is {names[label]!r}, in {path} {answer!r}: {REMEDY}"
            source.setdefault(label, path)
    return ""


def answers_in_tables(paths: Iterable[Path]) -> list[str]:
    """The answer of each label, as far as the tables show it ("" for labels that do not occur)."""
    vocabulary: dict[int, Any] = {}
    for path in paths:
        for answers, labels in flat_columns(path, "answers", "answer_labels"):
            numbers, first = np.unique(labels.to_numpy(zero_copy_only=False), return_index=True)
            vocabulary |= dict(zip(numbers.tolist(), answers.take(pa.array(first)).to_pylist(), strict=True))
    return [vocabulary.get(label, "") for label in range(max(vocabulary, default=-1) + 1)]


DATASETS.register("vqa")(
    DatasetSpec(
        VQADataset,
        make_arrow="vqa",
        train=("vqav2_train", "vqav2_trainable_val"),
        val=("vqav2_rest_val",),
        test=("vqav2_test",),
        optional=frozenset({"vqav2_trainable_val"}),
    )
)
