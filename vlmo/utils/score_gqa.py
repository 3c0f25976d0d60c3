"""GQA's metrics of a file of predictions: accuracy by type, consistency, validity, plausibility, distribution.

python -m vlmo.utils.score_gqa PREDICTIONS --questions val_all_questions.json [--choices val_choices.json]

PREDICTIONS: a JSON list of {"questionId": ..., "prediction": ...}. All is measured over the balanced questions;
consistency also needs the others, and answers to them.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmo.errors import VLMoError, print_anything, print_error
from vlmo.utils.json_stream import stream_entries, stream_list

CHOICES = {"validity": "valid", "plausibility": "plausible"}  # metric -> its list in the file of choices


class Question(NamedTuple):
    """What the metrics need to know of a question.

    Attributes:
        structural: query, verify, logical, choose or compare; all but query have two answers to choose from.
        semantic: object, attribute, category, relation or global.
        group: what its answers are of ("color"); None if they are of nothing in particular, as yes and no.
        entailed: ids of questions whose answers follow from its own.
        balanced: whether it is in the balanced set.
    """

    answer: str
    structural: str
    semantic: str
    group: str | None
    entailed: tuple[str, ...]
    balanced: bool


class Scores(NamedTuple):
    """Figures by name, in per cent, and what is to be said of those that are missing."""

    figures: dict[str, float]
    notes: list[str]


def score(questions: Mapping[str, Question], predictions: Mapping[str, str], choices: Path | None = None) -> Scores:
    """Computes every metric that its data are there for.

    Args:
        questions, predictions: by id.
        choices: file of the answers that are valid and those that are plausible, by question.

    Raises:
        VLMoError: if a balanced question has no prediction, or no entry in the choices.
    """
    balanced = {name: question for name, question in questions.items() if question.balanced}
    _require(balanced, predictions, "predictions")
    right = {name: predictions[name] == question.answer for name, question in balanced.items()}
    figures = {"accuracy": _share(right.values())} | _by_type(balanced, right)
    notes = []
    consistent = consistency(questions, predictions, right)
    if consistent is None:
        notes.append("no consistency: it needs answers to what right ones entail, which *_all_questions.json has")
    else:
        figures["consistency"] = consistent
    if choices is None:
        notes.append("no validity and plausibility: they need the file of choices")
    else:
        figures |= _by_choices(balanced, predictions, choices)
    figures["distribution"] = distribution(balanced, predictions)
    return Scores(figures, notes)


def _share(right: Any) -> float:
    values = [float(each) for each in right]
    return 100 * sum(values) / len(values) if values else float("nan")


def _require(questions: Mapping[str, Question], answered: Mapping[str, Any], what: str) -> None:
    missing = [name for name in questions if name not in answered]
    if missing:
        raise VLMoError(f"{what}: {len(missing):,} of {len(questions):,} questions are missing, such as {missing[0]}")


def _by_type(questions: Mapping[str, Question], right: Mapping[str, bool]) -> dict[str, float]:
    """Accuracy of binary and open questions, and by structural and semantic type."""
    kinds: tuple[Callable[[Question], str], ...] = (
        lambda q: "open" if q.structural == "query" else "binary",
        lambda q: f"structural_{q.structural}",
        lambda q: f"semantic_{q.semantic}",
    )
    figures: dict[str, float] = {}
    for kind in kinds:
        parts = defaultdict(list)
        for name, question in questions.items():
            parts[kind(question)].append(right[name])
        figures |= {part: _share(parts[part]) for part in sorted(parts)}
    return figures


def consistency(
    questions: Mapping[str, Question], predictions: Mapping[str, str], right: Mapping[str, bool]
) -> float | None:
    """Gives, over the balanced questions that are answered right, the mean accuracy of those that each entails.

    A question that entails none other of `questions` does not count. None if one that is entailed has no prediction,
    or no right one entails any.
    """
    shares = []
    for name, is_right in right.items():
        entailed = [each for each in questions[name].entailed if each != name and each in questions]
        if any(each not in predictions for each in entailed):
            return None
        if is_right and entailed:
            shares.append(_share(predictions[each] == questions[each].answer for each in entailed) / 100)
    return _share(shares) if shares else None


def _by_choices(questions: Mapping[str, Question], predictions: Mapping[str, str], path: Path) -> dict[str, float]:
    """Validity: is the prediction of the kind that is asked for? Plausibility: is it one that occurs in the world?"""
    held: dict[str, dict[str, bool]] = {}
    for name, choices in stream_entries(str(path)):
        if name in questions:
            try:
                held[name] = {metric: predictions[name] in choices[key] for metric, key in CHOICES.items()}
            except (TypeError, KeyError) as error:
                raise VLMoError(f"{path}: {name!r}: must have lists {' and '.join(CHOICES.values())}") from error
    _require(questions, held, str(path))
    return {metric: _share(each[metric] for each in held.values()) for metric in CHOICES}


def distribution(questions: Mapping[str, Question], predictions: Mapping[str, str]) -> float:
    """Gives the chi-square statistic of the predicted answers against the true ones; lower is better.

    It is computed in each global group over the answers that are right for one of its questions, as the sum of
    (predicted - true)^2 / true of their counts; groups weigh by their number of questions. In hundreds.
    """
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for name, question in questions.items():
        if question.group is not None:
            true[question.group][question.answer] += 1
            predicted[question.group][predictions[name]] += 1
    total = sum(counts.total() for counts in true.values())
    statistics = (
        counts.total() * sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        for group, counts in true.items()
    )
    return sum(statistics) / total / 100 if total else float("nan")


# --- files ------------------------------------------------------------------------------------------------------------


def read_questions(path: Path) -> dict[str, Question]:
    """Reads an official file of questions, or what the converter writes of one. Raises VLMoError if it is none."""
    questions = {}
    for name, record in stream_entries(str(path)):
        try:
            questions[name] = Question(
                record["answer"],
                record["types"]["structural"],
                record["types"]["semantic"],
                record["groups"]["global"],
                tuple(record["entailed"]),
                record["isBalanced"],
            )
        except (TypeError, KeyError) as error:
            raise VLMoError(f"{path}: {name!r}: is no question with its answer, types and groups ({error})") from error
    return questions


def read_predictions(path: Path) -> dict[str, str]:
    """Reads predictions by question. Raises VLMoError if the file is not as the challenge's server takes it."""
    try:
        return {row["questionId"]: row["prediction"] for row in stream_list(str(path))}
    except (TypeError, KeyError) as error:
        raise VLMoError(f'{path}: must be a list of {{"questionId": ..., "prediction": ...}}') from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 0, or 2 after a mistake of the user."""
    print_anything()
    parser = argparse.ArgumentParser(
        "python -m vlmo.utils.score_gqa", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="an official file of questions")
    parser.add_argument("--choices", type=Path, metavar="FILE", help="valid and plausible answers")
    options = parser.parse_args(arguments)
    try:
        questions, predictions = read_questions(options.questions), read_predictions(options.predictions)
        figures, notes = score(questions, predictions, options.choices)
    except VLMoError as error:
        return print_error(error)
    for name, value in figures.items():
        print(f"{name:<24}{value:>8.2f}" + ("" if name == "distribution" else " %"))
    for note in notes:
        print(note, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
