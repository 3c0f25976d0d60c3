"""Sentences about pairs of images that are true or false."""

from typing import Any, ClassVar

from vlmo.datasets.arrow_tables import Place
from vlmo.datasets.base_dataset import BaseDataset


class NLVR2Dataset(BaseDataset):
    """A sample is one sentence with both images; the file's name tells dev from test."""

    text_column: ClassVar[str] = "questions"
    image_columns: ClassVar[tuple[str, ...]] = ("image_0", "image_1")
    columns: ClassVar[dict[str, str]] = {
        "image_0": "binary",
        "image_1": "binary",
        "questions": "a list",
        "answers": "a list",
        "identifier": "anything",
    }

    def targets(self, place: Place) -> dict[str, Any]:
        return {
            "answers": place.list_item("answers") == "True",
            "table_name": self.tables.paths[place.table].stem,
            "identifier": place.scalar("identifier").as_py(),
        }
