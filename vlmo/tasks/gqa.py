"""GQA (arXiv 1902.09506): visual question answering with one answer to each question, and metrics of its own."""

import json
from pathlib import Path
from typing import Any

from vlmo.errors import VLMoError
from vlmo.files import atomic_write
from vlmo.registry import TASKS
from vlmo.settings.groups import PositiveInt
from vlmo.settings.option import option
from vlmo.tasks.base import LabelSmoothing, PredictionFiles
from vlmo.tasks.vqa import VQA, Answered, answering
from vlmo.utils.score_gqa import read_questions, score

# beside the tables: what the official metrics of the test split are computed from, where the converter found it
QUESTIONS, CHOICES = "gqa_testdev_questions.json", "gqa_testdev_choices.json"


class GQAOptions(LabelSmoothing):
    """Compositional question answering"""

    gqa_label_size: PositiveInt = option(1878, "number of answers, or more: those of all of GQA's questions")


@TASKS.register("gqa")
class GQA(VQA):
    """As VQA, with targets of one answer: its score is the accuracy."""

    name = "gqa"
    head = "gqa_classifier"
    label_size = "gqa_label_size"
    datasets = frozenset({"gqa"})
    test_has_labels = True
    required_heads = (head,)
    sized_by = {f"{head}.3.": label_size}
    Options = GQAOptions
    uses = (answering(head),)

    @classmethod
    def published(cls, settings: Any) -> dict[str, float]:
        return {}  # the paper has none

    def write_predictions(self, rows: list[Answered], folder: Path, checkpoint: str) -> PredictionFiles:
        """Writes `gqa_submit_{checkpoint}.json`, and measures the official metrics where their files are."""
        if not rows:  # the answers have no names
            return PredictionFiles()
        path = folder / f"gqa_submit_{checkpoint}.json"
        answers = dict(sorted(rows))
        with atomic_write(path) as file:
            file.write(json.dumps([{"questionId": q, "prediction": a} for q, a in answers.items()]).encode())
        files = PredictionFiles([path], {}, [])
        unread = sum(not answer for answer in answers.values())
        if unread:
            files.warnings.append(
                f"{path}: {unread} of {len(answers)} answers are empty, as the images of these questions cannot be "
                "decoded; they count as wrong"
            )
        questions, choices = (Path(getattr(self.options, "data_root", "")) / name for name in (QUESTIONS, CHOICES))
        if questions.is_file():
            try:
                scores = score(read_questions(questions), answers, choices if choices.is_file() else None)
            except VLMoError as error:  # (other tables than were made with it)
                files.warnings.append(f"{questions}: the official metrics are not computed ({error})")
            else:
                files.metrics.update({f"gqa/test/{name}": value / 100 for name, value in scores.figures.items()})
        return files
