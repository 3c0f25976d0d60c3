"""Prediction files as the official scripts read them, and NLVR2's consistency."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple


class Statement(NamedTuple):
    """What was predicted of one sentence about one pair of images."""

    table: str  # such as nlvr2_dev
    identifier: str  # {split}-{set}-{pair}-{sentence}
    sentence: str
    label: bool
    prediction: bool | None  # None where an image cannot be decoded


def vqa_json(answers: Iterable[tuple[int, str]]) -> str:
    """The VQA server's format, in the order of the questions' numbers."""
    rows = [{"question_id": question, "answer": answer} for question, answer in sorted(answers)]
    return json.dumps(rows)


def nlvr2_csv(statements: Iterable[Statement]) -> str:
    """Lines `identifier,prediction` with true or false, no heading, as NLVR2's metrics.py reads them.

    What could not be predicted stays empty, which the script takes for wrong.
    """
    words = {True: "true", False: "false", None: ""}
    return "".join(f"{s.identifier},{words[s.prediction]}\n" for s in sorted(statements, key=_order))


def _order(statement: Statement) -> list[Any]:
    """By the numbers within the identifier."""
    parts = re.split(r"(\d+)", statement.identifier)  # text and numbers in turn
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


def consistency(statements: Sequence[Statement]) -> float | None:
    """Share of the sentences that were judged right about every pair they are used with.

    A sentence is used with several pairs of one set (the second part of the identifier). Pairs that cannot be decoded
    are left out. None if there is nothing predicted, or identifiers are of another form.
    """
    right: dict[tuple[str, str], bool] = {}
    for statement in statements:
        match = re.fullmatch(r"(.+-\d+)-\d+-\d+", statement.identifier)
        if not match:
            return None
        if statement.prediction is not None:
            key = (match[1], statement.sentence)
            right[key] = right.get(key, True) and statement.prediction == statement.label
    return sum(right.values()) / len(right) if right else None
