"""What all data sets share: from a sample's place in the tables to a dict with its text, masked text and images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmo.datasets.arrow_tables import ArrowTables, Place
from vlmo.datasets.image import UndecodableImage, decode_image
from vlmo.datasets.text import TokenMasker, tokenize

Transform = Callable[[Image.Image], Tensor]


class Skipped(NamedTuple):
    """Stands for a sample whose image cannot be decoded; the batch goes on without it."""

    reason: str
    targets: dict[str, Any]  # what is known of the sample all the same: an answer is owed to each question


def read_images(
    tables: ArrowTables, place: Place, columns: Sequence[str], transform: Transform, seed: int
) -> dict[str, Any] | Skipped:
    """A row's transformed images (3, S, S) by column; `seed` determines the augmentation."""
    images: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: torch.manual_seed would also reset the GPU's, and with it every dropout mask
        torch.default_generator.manual_seed(seed)
        for column in columns:
            try:
                image = decode_image(place.scalar(column).as_buffer())
            except UndecodableImage as error:
                name = tables.paths[place.table].stem
                return Skipped(f"{name}: image row {place.image} of the data set ({column}): {error}", {})
            images[column] = transform(image)
    return images


class BaseDataset(Dataset):
    """Samples of Arrow tables: one text each, with the image or images of its row.

    `dataset[key]` takes a sample number, or `(number, seed)` with another seed in each epoch: number and seed alone
    determine the sample, whichever worker makes it. Subclasses name their columns and add what else a sample holds.
    """

    text_column: ClassVar[str | None] = "caption"  # None: rows without texts
    image_columns: ClassVar[tuple[str, ...]] = ("image",)
    # what a table must have, by kind (see `checks.py`), and what it must have besides for training and validation
    columns: ClassVar[dict[str, str]] = {"image": "binary", "caption": "a list"}
    target_columns: ClassVar[dict[str, str]] = {}

    def __init__(
        self, paths: Sequence[str | Path], tokenizer: Any, max_text_len: int, masker: TokenMasker, transform: Transform
    ):
        """
        Args:
            paths: Arrow files, in this order.
            tokenizer: BERT's, as `load_tokenizer` makes it.
            max_text_len: tokens, [CLS] and [SEP] included; longer texts are cut.
            masker: for masked language modelling.
            transform: RGB image to (3, S, S); draws from torch's global generator only.

        Raises:
            VLMoError: if a file cannot be read.
        """
        self.tables = ArrowTables(paths, self.text_column)
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        self.masker = masker
        self.transform = transform

    def __len__(self) -> int:
        return self.tables.num_texts

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | Skipped:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        place = self.tables.text(index)
        image_seed, masking_seed = np.random.SeedSequence([seed, index]).generate_state(2, np.uint64)
        images = self.images(place, int(image_seed))
        if isinstance(images, Skipped):
            return images._replace(targets=self.targets(place))
        text = self.text(place)
        ids = self.text_ids(text)
        ids_mlm, labels = self.masker(ids, np.random.default_rng(masking_seed))
        numbers = {"raw_index": index, "img_index": place.image, "cap_index": place.item}
        words = {"text": text, "text_ids": ids, "text_ids_mlm": ids_mlm, "text_labels_mlm": labels}
        return images | words | numbers | self.targets(place)

    def targets(self, place: Place) -> dict[str, Any]:
        """What else a sample holds."""
        return {}

    def text(self, place: Place) -> str:
        """The sample's text; "" where it has none."""
        return (place.list_item(self.text_column) if self.text_column else None) or ""

    def text_ids(self, text: str) -> list[int]:
        """Token ids, [CLS] and [SEP] included, at most `max_text_len`."""
        return tokenize(self.tokenizer, text, self.max_text_len)

    def images(self, place: Place, seed: int) -> dict[str, Any] | Skipped:
        """The row's transformed images (3, S, S) by column; `seed` determines the augmentation."""
        return read_images(self.tables, place, self.image_columns, self.transform, seed)


class ImageView(Dataset):
    """The images of a data set, each once, without texts: for retrieval."""

    def __init__(self, dataset: BaseDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.tables.num_rows

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        images = self.dataset.images(self.dataset.tables.row(index), seed=0)
        return images if isinstance(images, Skipped) else images | {"raw_index": index, "img_index": index}


class TextView(Dataset):
    """The texts of a data set, with the number of the image each belongs to; no image is decoded: for retrieval."""

    def __init__(self, dataset: BaseDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.tables.num_texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.dataset.tables.text(index)
        text = self.dataset.text(place)
        return {"text_ids": self.dataset.text_ids(text), "raw_index": index, "img_index": place.image}
