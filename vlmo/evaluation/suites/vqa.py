"""VQA v2: the score by type of answer and of question, on the part of validation that training leaves out.

An answer scores what its ten annotators give it (0, 0.3, 0.6, 0.9 or 1), which is the official accuracy. The types
are those of the official annotations where these lie beside the table; tables do not hold them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmo.datasets.vqa_dataset import VQADataset
from vlmo.errors import VLMoError
from vlmo.evaluation.chunks import Output, in_chunks
from vlmo.evaluation.measures import mean_of
from vlmo.evaluation.pair_scores import IMAGES_AT_ONCE
from vlmo.evaluation.pictures import Picture, of_table
from vlmo.evaluation.suites.base import Context, Need, Result, Suite, read_json, sha256, warn_of_unknown
from vlmo.evaluation.suites.decisions import Decisions, add_decisions, classify, require_head
from vlmo.registry import SUITES
from vlmo.sources.arrow_tables import ArrowTables

HEAD = "vqa_classifier"
TABLE = "vqav2_rest_val.arrow"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"


class Questions(NamedTuple):
    """The questions of a table, image by image.

    Attributes:
        starts: (images + 1,) where each image's questions begin.
        answers: of each question, the score of each label that somebody gave.
    """

    pictures: list[Picture]
    starts: np.ndarray
    texts: list[str]
    ids: list[int]
    answers: list[dict[int, float]]


def read_questions(path: Path) -> Questions:
    """Reads a table of questions (DATA.md). Raises VLMoError if its answers are not known."""
    tables = ArrowTables([path], VQADataset.text_column)
    places = [tables.text(number) for number in range(tables.num_texts)]
    labels = [place.list_item("answer_labels") for place in places]
    if None in labels:
        raise VLMoError(f"{path}: has no answers; it must be a validation table")
    scores = [place.list_item("answer_scores") for place in places]
    return Questions(
        [of_table(tables, row) for row in range(tables.num_rows)],
        np.searchsorted([place.image for place in places], np.arange(tables.num_rows + 1)),
        [str(place.list_item("questions")) for place in places],
        [int(place.list_item("question_id")) for place in places],
        [dict(zip(own, values, strict=True)) for own, values in zip(labels, scores, strict=True)],
    )


def answer(context: Context, data: Questions, classes: int, key: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gives (Q,) the chosen label and (Q,) its probability, nan where the image cannot be decoded; (I,) bool which can.

    Args:
        key: tells this table from others, in what is kept.
    """
    scorer = context.scorer

    def compute(start: int, stop: int, prepared: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        pixels, known = prepared
        own = slice(data.starts[start], data.starts[stop])
        rows = np.repeat(np.arange(stop - start), np.diff(data.starts[start : stop + 1])).tolist()
        best = classify(scorer, HEAD, [pixels], rows, data.texts[own])[:, :classes].max(1) if rows else None
        sure = torch.empty(0) if best is None else best.values.sigmoid().masked_fill(~known[rows], torch.nan)
        return {"label": torch.empty(0) if best is None else best.indices, "sure": sure, "known": known}

    outputs = {"label": Output((), data.starts), "sure": Output((), data.starts), "known": Output()}
    total, store = len(data.pictures), context.store("vqa", key, classes)

    def read(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return scorer.read(data.pictures[start:stop])

    found = in_chunks("answer questions", total, IMAGES_AT_ONCE, outputs, compute, read, store, torch.float64)
    return found["label"].long(), found["sure"], found["known"] > 0


def score_of(answers: Sequence[Mapping[int, float]], chosen: Tensor, sure: Tensor) -> Tensor:
    """Gives (Q,) the score of each choice; 0 where the image cannot be decoded."""
    scores = [own.get(label, 0.0) for own, label in zip(answers, chosen.tolist(), strict=True)]
    return torch.tensor(scores, dtype=torch.float64).masked_fill(sure.isnan(), 0)


def commonest(answers: Sequence[Mapping[int, float]]) -> float:
    """Gives the best score that one and the same answer to all of them reaches: what needs no image."""
    totals: dict[int, float] = {}
    for own in answers:
        for label, score in own.items():
            totals[label] = totals.get(label, 0.0) + score
    return max(totals.values(), default=0.0) / max(len(answers), 1)


def kind_of(text: str) -> str:
    """Gives the type of an answer by its own words."""
    return "yes/no" if text in ("yes", "no") else "number" if text.replace(".", "", 1).isdigit() else "other"


class VqaSuite(Suite):
    """The score over all, by type of answer and by type of question."""

    meaning = "VQA v2, validation: score by type of answer and of question, for checkpoints with answers"
    needs = (Need(TABLE, "the table that `python -m vlmo.utils.convert vqa` makes (DATA.md)"),)
    of_pairs = False

    def run(self, context: Context) -> Result:
        require_head(context.scorer, HEAD, "vqa")
        table = context.root / TABLE
        data, result = read_questions(table), Result([], {str(table): sha256(table)})
        names = answer_names(context, table)
        chosen, sure, known = answer(context, data, len(names), result.files[str(table)])
        warn_of_unknown(result, known, "the answers to their questions count as wrong")
        right = score_of(data.answers, chosen, sure)
        best = torch.tensor([max(own, key=own.__getitem__, default=0) for own in data.answers])
        result.measures.append(mean_of(right, "score", "", "all", commonest(data.answers)))
        for what, kinds in self.kinds(context.root, data, [names[label] for label in best.tolist()], result).items():
            for kind in sorted(set(kinds), key=kinds.count, reverse=True):
                own = [number for number, each in enumerate(kinds) if each == kind]
                chance = commonest([data.answers[number] for number in own])
                result.measures.append(mean_of(right[own], "score", "", f"{what}: {kind}", chance))

        image_of = np.repeat(np.arange(len(data.pictures)), np.diff(data.starts))

        def show(number: int) -> tuple[list[Picture], list[str]]:
            given = ", ".join(f"{names[label]} ({score:g})" for label, score in data.answers[number].items())
            said = f"answered {names[int(chosen[number])]} with {float(sure[number]):.2f}"
            return [data.pictures[image_of[number]]], [data.texts[number], said, f"people: {given}"]

        add_decisions(result, "answers", names, Decisions(best, chosen, sure, right), show)
        return result

    def kinds(self, root: Path, data: Questions, answers: Sequence[str], result: Result) -> dict[str, list[str]]:
        """Gives the type of each question: "answer" and, by the official annotations, "question"."""
        path = root / ANNOTATIONS
        if path.is_file():
            result.files[str(path)] = sha256(path)
            try:
                official = {each["question_id"]: each for each in read_json(path)["annotations"]}
                return {
                    what: [official[number][f"{what}_type"] for number in data.ids] for what in ("answer", "question")
                }
            except (KeyError, TypeError) as error:
                raise VLMoError(f"{path}: lacks {error} of a question of {TABLE}; are they of one release?") from error
        result.notes.append(
            f"types of answers are told by the words of the best answer: {root} lacks {ANNOTATIONS} (visualqa.org), "
            "which has the official ones and the types of questions"
        )
        return {"answer": [kind_of(text) for text in answers]}


def answer_names(context: Context, table: Path) -> list[str]:
    """Gives the names of the labels. Raises VLMoError if those of data and checkpoint contradict each other."""
    model = context.scorer.model
    names = VQADataset.label_names(context.root, [table]) or []
    for label, (known, name) in enumerate(zip(model.answers or [], names, strict=False)):
        if known and name and known != name:
            raise VLMoError(
                f"{table}: label {label} is {name!r}, the checkpoint was trained with {known!r}; use the tables and "
                "the file of answers of its training"
            )
    return names


SUITES.register("vqa")(VqaSuite())
