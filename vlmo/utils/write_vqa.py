"""VQAv2 -> vqav2_{train,val,trainable_val,rest_val,test,test-dev}.arrow, vqav2_answers.json (in label order).

Trained on are train and trainable_val; rest_val, the last images of a seeded shuffle of val, is for validation.
"""

import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.utils.annotations import column, field, integer, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.json_stream import stream_list
from vlmo.utils.record_batches import Row
from vlmo.utils.vqa_answers import build_vocabulary, label_answers, normalise_answer

YEARS = {"train": "2014", "val": "2014", "test": "2015", "test-dev": "2015"}
LAYOUT = """
  v2_OpenEnded_mscoco_{train2014,val2014}_questions.json
  v2_mscoco_{train2014,val2014}_annotations.json
  train2014/COCO_train2014_*.jpg
  val2014/COCO_val2014_*.jpg
 and, where there is to be a test table,
  v2_OpenEnded_mscoco_{test2015,test-dev2015}_questions.json
  test2015/COCO_test2015_*.jpg
"""
_COMMON = {
    "image": pa.binary(),
    "questions": pa.list_(pa.string()),
    "image_id": pa.int64(),
    "question_id": pa.list_(pa.int64()),
    "split": pa.string(),
}
_ORDER = ("image", "questions", "answers", "answer_labels", "answer_scores", "image_id", "question_id", "split")


def _schema(text: pa.DataType, label: pa.DataType, score: pa.DataType) -> pa.Schema:
    columns = _COMMON | {"answers": text, "answer_labels": label, "answer_scores": score}
    return pa.schema({name: columns[name] for name in _ORDER})


def _nested(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.list_(kind))


SCHEMA = _schema(_nested(pa.string()), _nested(pa.int64()), _nested(pa.float64()))
TEST_SCHEMA = _schema(pa.list_(pa.null()), pa.list_(pa.null()), pa.list_(pa.null()))  # as published: nothing known

Key = TypeVar("Key", int, str)


class Question(NamedTuple):
    question_id: int
    text: str
    answers: tuple[str, ...] = ()  # one a person; none where they are not known


@dataclass(frozen=True)
class Split:
    """The questions of a split by image; `path_of` and `id_of` turn the key of an image into its file and number."""

    name: str
    questions: dict[Any, list[Question]]
    path_of: Callable[[Any], str]
    id_of: Callable[[Any], int] = int


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    num_workers: int = 1,
    seed: int = 0,
    rest_val_images: int = 1000,
    min_occurrences: int = 9,
) -> Report:
    """Converts the VQAv2 downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.

    Args:
        seed: shuffles the images of val before they are split.
        rest_val_images: how many images of val are kept for validation; the others are trained on.
        min_occurrences: a majority answer that occurs as often in train and val becomes a label.
    """
    needed = [
        path
        for split in ("train2014", "val2014")
        for path in (_questions_file(split), f"v2_mscoco_{split}_annotations.json", split)
    ]
    require_files(root, needed, LAYOUT)
    majority: list[str] = []
    splits = {name: _read_split(root, name, majority) for name in ("train", "val")}
    vocabulary = build_vocabulary(map(normalise_answer, majority), min_occurrences)
    with Conversion(dataset_root, "vqa", num_workers) as conversion:
        for name in ("test", "test-dev"):
            if os.path.exists(os.path.join(root, _questions_file(f"{name}2015"))):
                splits[name] = _read_split(root, name, None)
            else:
                conversion.report.notes.append(f"no vqav2_{name}: {_questions_file(f'{name}2015')} is not there")
        write_splits(conversion, splits, vocabulary, seed, rest_val_images)
    return conversion.report


def write_splits(
    conversion: Conversion, splits: Mapping[str, Split], vocabulary: list[str], seed: int, rest_val_images: int | None
) -> None:
    """Writes every split's table, val's two parts and the vocabulary.

    Questions without an answer of the vocabulary are left out (not in the test splits), and images without questions.
    With `rest_val_images` None all of val is for validation. Raises VLMoError for an empty vocabulary.
    """
    if not vocabulary:
        raise VLMoError("no answer occurs often enough to become a label: lower min_occurrences")
    if rest_val_images is not None and rest_val_images < 1:
        raise VLMoError(f"rest_val_images={rest_val_images}: validation needs at least one image")
    label_of = {answer: label for label, answer in enumerate(vocabulary)}
    kept: dict[str, dict[Any, list[Question]]] = {}
    for name, split in splits.items():
        kept[name] = split.questions
        if name in ("train", "val"):
            kept[name], unlabelled = _labelled(split.questions, label_of)
            if unlabelled:
                conversion.report.notes.append(f"{name}: left out {unlabelled:,} questions without a known answer")
    kept["val"] = _shuffled(kept["val"], seed)
    answered = {name: any(question.answers for asked in kept[name].values() for question in asked) for name in splits}
    tables = {
        name: Table(f"vqav2_{name}", SCHEMA if answered[name] or name in ("train", "val") else TEST_SCHEMA)
        for name in splits
    }

    def rows() -> Iterator[tuple[str, Row]]:
        for name, split in splits.items():
            for image, asked in kept[name].items():
                yield name, _row(split, image, asked, label_of if answered[name] else None)

    conversion.write(tables, rows)
    num_val = conversion.report.rows["vqav2_val.arrow"]
    first_rest = 0 if rest_val_images is None else max(num_val - rest_val_images, 0)
    conversion.copy_rows("vqav2_val", "vqav2_trainable_val", 0, first_rest)
    conversion.copy_rows("vqav2_val", "vqav2_rest_val", first_rest, num_val)
    if rest_val_images is not None and first_rest == 0:
        conversion.report.notes.append(
            f"all {num_val:,} images of val are for validation (rest_val): a smaller rest_val_images trains on others"
        )
    conversion.write_json("vqav2_answers.json", vocabulary)
    conversion.report.notes.append(f"{len(vocabulary):,} answers: train with vqav2_label_size={len(vocabulary)}")


def _labelled(questions: Mapping[Key, list[Question]], label_of: Mapping[str, int]) -> tuple[dict[Key, list], int]:
    """What remains without the questions none of whose answers has a label; and how many those are."""
    known: dict[Key, list[Question]] = {}
    unlabelled = 0
    for image, asked in questions.items():
        kept = [question for question in asked if any(answer in label_of for answer in question.answers)]
        unlabelled += len(asked) - len(kept)
        if kept:
            known[image] = kept
    return known, unlabelled


def _shuffled(questions: Mapping[Key, list[Question]], seed: int) -> dict[Key, list[Question]]:
    images = list(questions)
    random.Random(seed).shuffle(images)
    return {image: questions[image] for image in images}


def _row(split: Split, image: Any, asked: list[Question], label_of: Mapping[str, int] | None) -> Row:
    """The row of an image; without `label_of` nothing is known of the answers, and null stands for those of one."""
    labelled: list[tuple[list | None, list | None, list | None]] = []
    if label_of is not None:
        labelled = [label_answers(q.answers, label_of) if q.answers else (None, None, None) for q in asked]
    columns = {
        "questions": [question.text for question in asked],
        "answers": [answers for answers, _, _ in labelled],
        "answer_labels": [labels for _, labels, _ in labelled],
        "answer_scores": [scores for _, _, scores in labelled],
        "image_id": split.id_of(image),
        "question_id": [question.question_id for question in asked],
        "split": split.name,
    }
    return Row(columns, {"image": split.path_of(image)})


def _questions_file(split: str) -> str:
    return f"v2_OpenEnded_mscoco_{split}_questions.json"


def _read_split(root: str, name: str, majority: list[str] | None) -> Split:
    """The questions with their answers; the majority answers are appended to `majority` (None: answers unknown)."""
    year = YEARS[name]
    answers_of: dict[int, tuple[str, ...]] = {}
    if majority is not None:
        answers_of = _read_answers(os.path.join(root, f"v2_mscoco_{name}{year}_annotations.json"), majority)
    path = os.path.join(root, _questions_file(f"{name}{year}"))
    questions: dict[int, list[Question]] = {}
    for number, entry in enumerate(stream_list(path, "questions")):
        where = f"{path}: questions[{number}]"
        question_id = integer(entry, "question_id", where)
        if majority is not None and question_id not in answers_of:
            raise VLMoError(f"{where}: question {question_id} has no entry in the annotations")
        question = Question(question_id, field(entry, "question", str, where), answers_of.get(question_id, ()))
        questions.setdefault(integer(entry, "image_id", where), []).append(question)
    folder = "test2015" if name == "test-dev" else f"{name}{year}"
    images = os.path.join(root, folder)
    return Split(name, questions, lambda image: os.path.join(images, f"COCO_{folder}_{image:012d}.jpg"))


def _read_answers(path: str, majority: list[str]) -> dict[int, tuple[str, ...]]:
    answers_of: dict[int, tuple[str, ...]] = {}
    for number, entry in enumerate(stream_list(path, "annotations")):
        where = f"{path}: annotations[{number}]"
        majority.append(sys.intern(field(entry, "multiple_choice_answer", str, where)))
        answers = column(field(entry, "answers", list, where), "answer", str, f"{where}: answers")
        if not answers:
            raise VLMoError(f"{where}: 'answers' is empty")
        question_id = integer(entry, "question_id", where)
        if question_id in answers_of:
            raise VLMoError(f"{where}: question {question_id} is annotated twice")
        answers_of[question_id] = tuple(map(sys.intern, answers))  # few different ones
    return answers_of
