"""Questions about images, with the answers people gave."""

from typing import Any, ClassVar

from vlmo.datasets.arrow_tables import Place
from vlmo.datasets.base_dataset import BaseDataset

ANSWERS_FILE = "vqav2_answers.json"  # beside the tables: list of the answers, in the order of their labels


class VQADataset(BaseDataset):
    """A sample is one question with its image.

    `answered` tells a question of a test table, of whose answers nothing is known, from one whose answers are all
    outside the vocabulary.
    """

    text_column: ClassVar[str] = "questions"
    columns: ClassVar[dict[str, str]] = {"image": "binary", "questions": "a list", "question_id": "a list"}
    target_columns: ClassVar[dict[str, str]] = dict.fromkeys(
        ("answers", "answer_labels", "answer_scores"), "a list of lists"
    )

    def targets(self, place: Place) -> dict[str, Any]:
        labels = place.list_item("answer_labels")
        return {
            "qid": place.list_item("question_id"),
            "answered": labels is not None,
            "vqa_answer": place.list_item("answers") or [],
            "vqa_labels": labels or [],
            "vqa_scores": place.list_item("answer_scores") or [],
        }
