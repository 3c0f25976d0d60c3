"""Plain text, for stage 2: Wikipedia and BookCorpus."""

from typing import ClassVar

from vlmo.datasets.base_dataset import BaseDataset


class TextDataset(BaseDataset):
    """A sample is one text, without an image; column `caption`."""

    image_columns: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[dict[str, str]] = {"caption": "a list"}
