"""GQA -> gqa_{train,val,testdev}.arrow, gqa_answers.json (in label order), gqa_testdev_questions.json for its metrics.

Each answer of the balanced training questions is a label, in the order of first appearance. The questions of
testdev_all and submission_all, where those are, that the balanced testdev set lacks become gqa_test.arrow: a test run
answers them and does not measure them, as consistency and the challenge's server ask for their answers.
"""

import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.utils.annotations import field, inside, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.json_stream import stream_entries
from vlmo.utils.record_batches import Row

LAYOUT = """
  {train,val,testdev}_balanced_questions.json
  images/*.jpg
 and, where they are wanted,
  testdev_all_questions.json       (consistency)
  testdev_choices.json             (validity, plausibility)
  submission_all_questions.json    (the challenge's server)
"""
SPLITS = ("train", "val", "testdev")
MORE = ("testdev_all", "submission_all")  # whose questions are answered, and not measured
# of a question, what the metrics are computed from: see `score_gqa`
MEASURED_BY = {"answer": str, "types": dict, "groups": dict, "entailed": list, "isBalanced": bool}
SCHEMA = pa.schema(
    {
        "image": pa.binary(),
        "questions": pa.list_(pa.string()),
        "answers": pa.list_(pa.list_(pa.string())),
        "answer_labels": pa.list_(pa.list_(pa.int64())),
        "answer_scores": pa.list_(pa.list_(pa.float64())),
        "image_id": pa.string(),
        "question_id": pa.list_(pa.string()),
        "split": pa.string(),
    }
)


class Question(NamedTuple):
    """The answer is None where it is not told."""

    question_id: str
    text: str
    answer: str | None


Asked = dict[str, list[Question]]  # by image


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the GQA downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, [*(_file(f"{split}_balanced") for split in SPLITS), "images"], LAYOUT)
    measured: dict[str, Any] = {}  # what the metrics of testdev are computed from
    asked = {split: _read(root, f"{split}_balanced", measured if split == "testdev" else None) for split in SPLITS}
    known = {question.question_id for each in asked["testdev"].values() for question in each}
    with Conversion(dataset_root, "gqa", num_workers) as conversion:
        for name in MORE:
            if os.path.exists(os.path.join(root, _file(name))):
                more = _read(root, name, measured if name == "testdev_all" else None, known, labelled=False)
                for image, questions in more.items():
                    asked.setdefault("test", {}).setdefault(image, []).extend(questions)
            else:
                conversion.report.notes.append(f"no questions of {name}: {_file(name)} is not there")
        label_of = {answer: label for label, answer in enumerate(_answers(asked["train"]))}
        tables = {split: Table(f"gqa_{split}", SCHEMA) for split in asked}
        conversion.write(tables, lambda: _rows(root, asked, label_of))
        for split in ("val", "testdev"):
            unknown = sum(q.answer not in label_of for questions in asked[split].values() for q in questions)
            if unknown:
                conversion.report.notes.append(f"{split}: {unknown:,} questions have an answer that train has not")
        conversion.write_json("gqa_answers.json", list(label_of))
        conversion.write_json("gqa_testdev_questions.json", measured)
        choices = os.path.join(root, "testdev_choices.json")
        if os.path.exists(choices):
            own = {name: choice for name, choice in stream_entries(choices) if name in measured}
            conversion.write_json("gqa_testdev_choices.json", own)
        conversion.report.notes.append(f"{len(label_of):,} answers")
    return conversion.report


def _file(name: str) -> str:
    return f"{name}_questions.json"


def _answers(asked: Asked) -> Iterable[str]:
    return dict.fromkeys(q.answer for questions in asked.values() for q in questions if q.answer is not None)


def _read(
    root: str, name: str, measured: dict[str, Any] | None, known: set[str] | None = None, labelled: bool = True
) -> Asked:
    """The questions of a file by image, without those whose ids are `known`, which those that are read join.

    Args:
        measured: gets what the metrics need of each question.
        labelled: whether the answers are of interest.
    """
    path = os.path.join(root, _file(name))
    asked: Asked = {}
    for question_id, record in stream_entries(path):
        where = f"{path}: {question_id!r}"
        if measured is not None:
            measured[question_id] = {key: field(record, key, kind, where) for key, kind in MEASURED_BY.items()}
        if known is not None:
            if question_id in known:
                continue
            known.add(question_id)
        image = field(record, "imageId", str, where)
        inside(os.path.join(root, "images"), f"{image}.jpg", where)
        answer = field(record, "answer", str, where) if labelled else None
        asked.setdefault(image, []).append(Question(question_id, field(record, "question", str, where), answer))
    if not asked and labelled:
        raise VLMoError(f"{path}: has no questions")
    return asked


def _rows(root: str, asked: dict[str, Asked], label_of: dict[str, int]) -> Iterator[tuple[str, Row]]:
    for split, images in asked.items():
        for image, questions in images.items():
            known = [[q.answer] if q.answer in label_of else [] for q in questions if q.answer is not None]
            columns = {
                "questions": [question.text for question in questions],
                "answers": known,
                "answer_labels": [[label_of[answer] for answer in answers] for answers in known],
                "answer_scores": [[1.0] * len(answers) for answers in known],
                "image_id": image,
                "question_id": [question.question_id for question in questions],
                "split": split,
            }
            yield split, Row(columns, {"image": os.path.join(root, "images", f"{image}.jpg")})
