"""Your own questions about images, in JSONL, CSV or TSV -> vqav2_* tables and vqav2_answers.json.

A record is {"image": path below root, "question": text, "answers": answer or list of answers, one a person, "split":
"train" | "val" | "test", "question_id": int, "image_id": int}, the last three optional. Training reads vqav2_train,
validation vqav2_rest_val, `test_only=True` vqav2_test (val again where there is no test split).
"""

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from vlmo.errors import VLMoError
from vlmo.utils.annotations import field, integer
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.own_data import annotation_file, image_file, parse_records, read_list, share_out, single_text, split_of
from vlmo.utils.vqa_answers import build_vocabulary, normalise_answer
from vlmo.utils.write_vqa import Question, Split, write_splits


class _Record(NamedTuple):
    where: str
    image: str
    image_id: int | None
    split: str | None
    question_id: int | None
    text: str
    answers: tuple[str, ...]


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    annotations: str | None = None,
    val_share: float = 0.1,
    seed: int = 0,
    min_occurrences: int = 1,
    normalise: bool = False,
    skip_missing: bool = False,
    num_workers: int = 1,
) -> Report:
    """Converts questions about images below `root` into VQA's tables in `dataset_root`.

    An answer scores as in the VQA challenge by how many of ten people gave it; the answer of a single annotator scores
    1. Raises VLMoError that lists the records that are not as they should be.

    Args:
        annotations: the list of records; questions.jsonl, .csv or .tsv in `root` if None.
        val_share: share of the images without a split that is held out.
        min_occurrences: how often an answer must be the (most frequent) answer to a question to become a label.
        normalise: compare answers as the VQA challenge does ("Two dogs." is "2 dogs"; an answer "A" would vanish).
        skip_missing: leave out questions about images that do not exist, instead of refusing the list.
    """
    path = annotation_file(root, annotations, "questions")
    split_by_image: dict[str, str | None] = {}
    records = parse_records(path, partial(_parse, split_by_image, root, normalise, skip_missing))
    drawn = share_out(split_by_image, val_share, 0.0, seed, path)
    image_ids = _image_ids(records)
    splits = {
        name: Split(name, {}, str, image_ids.__getitem__) for name in ("train", "val", "test") if name in drawn.values()
    }
    majority = []
    places: dict[int, str] = {}  # of the questions by their numbers
    for number, record in enumerate(records):
        split = drawn[record.image]
        if split != "test":
            if not record.answers:
                raise VLMoError(
                    f"{record.where}: 'answers' is missing, which only questions of the split 'test' may lack"
                )
            majority.append(Counter(record.answers).most_common(1)[0][0])
        question_id = number if record.question_id is None else record.question_id
        if places.setdefault(question_id, record.where) != record.where:
            raise VLMoError(f"{record.where}: question_id {question_id} is that of {places[question_id]} too")
        questions = splits[split].questions.setdefault(record.image, [])
        questions.append(Question(question_id, record.text, record.answers))
    splits.setdefault("val", Split("val", {}, str))
    splits.setdefault("test", replace(splits["val"], name="test"))
    with Conversion(dataset_root, "vqa", num_workers) as conversion:
        write_splits(conversion, splits, build_vocabulary(majority, min_occurrences), seed, rest_val_images=None)
    return conversion.report


def _parse(
    split_by_image: dict[str, str | None],
    root: str,
    normalise: bool,
    skip_missing: bool,
    where: str,
    record: dict[str, Any],
) -> _Record:
    image, split = image_file(root, record, "image", where, skip_missing), split_of(record, where)
    if split_by_image.setdefault(image, split) != split:
        raise VLMoError(f"{where}: {image} is in the splits {split_by_image[image]!r} and {split!r}")
    return _Record(
        where,
        image,
        _number(record, "image_id", where),
        split,
        _number(record, "question_id", where),
        single_text(record, "question", where),
        tuple(normalise_answer(answer) if normalise else answer.strip() for answer in _answers(record, where)),
    )


def _number(record: dict[str, Any], key: str, where: str) -> int | None:
    if key not in record:
        return None
    if isinstance(record[key], str) and record[key].isdecimal():  # from CSV
        return integer({key: int(record[key])}, key, where)
    return integer(record, key, where)


def _answers(record: dict[str, Any], where: str) -> list[str]:
    key = "answer" if "answer" in record and "answers" not in record else "answers"
    if key not in record and record.get("split") is not None:
        return []  # allowed in the test split only, which is known later
    value = field(record, key, (str, int, list), where)
    values = (
        read_list(value, key, where, numbers=True)
        if isinstance(value, str)
        else value
        if isinstance(value, list)
        else [value]
    )
    if not all(isinstance(each, (str, int)) and not isinstance(each, bool) for each in values):
        raise VLMoError(f"{where}: {key!r} must be an answer or a list of answers")
    return [str(each) for each in values]


def _image_ids(records: list[_Record]) -> dict[str, int]:
    """A number for each image: its own, or where the first record has none, how many images were before it."""
    numbers: dict[str, int] = {}
    for record in records:
        numbers.setdefault(record.image, len(numbers) if record.image_id is None else record.image_id)
    return numbers
