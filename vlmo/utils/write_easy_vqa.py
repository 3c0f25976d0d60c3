"""The PyPI package easy-vqa (5,000 small pictures, 48,248 questions, 13 answers) as an example of your own VQA data.

Copies the pictures and writes `questions.jsonl` below a folder, as `write_own_vqa` reads them: train for training, its
test split for validation and evaluation.
"""

import json
import os
import shutil

from vlmo.errors import VLMoError
from vlmo.utils import write_own_vqa
from vlmo.utils.arrow_writer import Report


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Exports the package's data to `root` (created if need be) and converts it into tables in `dataset_root`.

    Raises VLMoError when the package is not installed.
    """
    export(root)
    return write_own_vqa.make_arrow(root, dataset_root, num_workers=num_workers)


def export(root: str) -> None:
    """Writes `images/{train,val}/*.png` and `questions.jsonl` to `root`."""
    try:
        import easy_vqa
    except ImportError as error:
        raise VLMoError("the data come with a package: pip install easy-vqa") from error
    sources = {
        "train": (easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        "val": (easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    }
    with open(_created(root, "questions.jsonl"), "w", encoding="utf-8") as file:
        for split, (questions, image_paths) in sources.items():
            for number, path in image_paths.items():
                shutil.copyfile(path, _created(root, f"images/{split}/{number}.png"))
            for question, answer, number in zip(*questions, strict=True):
                record = {"image": f"images/{split}/{number}.png", "question": question, "answers": answer}
                file.write(json.dumps(record | {"split": split}) + "\n")


def _created(root: str, name: str) -> str:
    path = os.path.join(root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path
