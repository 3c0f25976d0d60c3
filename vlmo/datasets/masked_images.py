"""Images alone, for tasks that read no text: each with the patches that are hidden from the model."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch.utils.data import Dataset

from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec, Skipped, Transform, read_images
from vlmo.registry import DATASETS
from vlmo.sources.arrow_tables import RowLocation, Tables, open_tables

SMALLEST_BLOCK = 16  # patches, of a window of 14 x 14; in proportion in a smaller one, where 16 are most of the image
ASPECT = 0.3  # of the flattest block; the steepest has 1 / 0.3


class ImageDataset(BaseDataset):
    """Rows with an image and no text; column `image`."""

    text_column: ClassVar[str | None] = None
    columns: ClassVar[dict[str, str]] = {"image": "binary"}


class PatchMasker:
    """Hides blocks of patches (BEiT, algorithm 1) until exactly `count` are hidden; the last block is cut to fit.

    A block has at least 16 patches (fewer in a window below 14 x 14, or where fewer are left to hide) and an aspect
    ratio from 0.3 to 1 / 0.3.
    """

    def __init__(self, window: int, ratio: float) -> None:
        """
        Args:
            window: patches a side.
            ratio: share of the patches to hide; at least one is hidden and one is not, where there are two.
        """
        self.window = window
        self.smallest = min(SMALLEST_BLOCK, SMALLEST_BLOCK * (window / 14) ** 2)
        self.count = min(max(round(ratio * window**2), 1), max(window**2 - 1, 1))

    @classmethod
    def from_settings(cls, window: int, settings: Any) -> "PatchMasker":
        """Hides the share of the patches that the option `mim_mask_ratio` says."""
        return cls(window, settings.mim_mask_ratio)

    def __call__(self, generator: np.random.Generator) -> np.ndarray:
        """(window^2,) bool, True where a patch is hidden."""
        mask = np.zeros((self.window, self.window), bool)
        while (missing := self.count - int(mask.sum())) > 0:
            area = generator.uniform(min(self.smallest, missing), missing)
            aspect = math.exp(generator.uniform(math.log(ASPECT), -math.log(ASPECT)))
            height = min(max(round(math.sqrt(area * aspect)), 1), self.window)
            width = min(max(round(math.sqrt(area / aspect)), 1), self.window)
            top = generator.integers(self.window - height + 1)
            left = generator.integers(self.window - width + 1)
            block = np.zeros_like(mask)
            block[top : top + height, left : left + width] = True
            new = np.flatnonzero(block & ~mask)
            mask.flat[new[:missing]] = True
        return mask.ravel()


class MaskedImages(Dataset):
    """The images of the tables of any set, each once: of a row with two, both. Texts are not read.

    As in `BaseDataset`, a key is a sample number or `(number, seed)`, and determines the sample: its augmentation and
    which of its patches are hidden.
    """

    counts_rows = True

    def __init__(
        self,
        paths: Sequence[str | Path] | Tables,
        image_columns: Sequence[str],
        masker: PatchMasker | None,
        transform: Transform,
        image_decoding: str = "correct",
        targets: Callable[[RowLocation], dict[str, Any]] = lambda location: {},
        wanted: Collection[str] = (),
    ):
        """
        Args:
            paths: Arrow files, in this order; or the tables of a source.
            image_columns: columns with encoded images.
            masker: draws the patches to hide; None: none are.
            transform: as of `BaseDataset`.
            image_decoding: as of `decode_image`.
            targets: what else a sample holds, also one whose image cannot be decoded (`BaseDataset.image_targets`).
            wanted: names of the fields that somebody reads. With "sample_key", a sample of a key with a seed, which is
                one of training, holds a number that follows from both.

        Raises:
            VLMoError: if a file cannot be read.
        """
        self.tables = open_tables(paths, None)
        self.image_columns = image_columns
        self.masker = masker
        self.transform = transform
        self.image_decoding = image_decoding
        self.targets = targets
        self.keyed = "sample_key" in wanted

    def __len__(self) -> int:
        return self.tables.num_rows * len(self.image_columns)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | Skipped:
        trained_on = isinstance(key, tuple)
        index, seed = key if isinstance(key, tuple) else (key, 0)
        row, number = divmod(index, len(self.image_columns))
        location, column = self.tables.row(row), self.image_columns[number]
        image_seed, masking_seed, sample_key = np.random.SeedSequence([seed, index]).generate_state(3, np.uint64)
        seed = int(image_seed)
        images = read_images(self.tables, location, [column], self.transform, seed, self.image_decoding)
        if isinstance(images, Skipped):
            return images._replace(targets=self.targets(location))
        sample = {"image": images[column], "raw_index": index, "img_index": row} | self.targets(location)
        if self.keyed and trained_on:
            sample["sample_key"] = int(sample_key >> np.uint64(1))
        if self.masker:
            sample["patch_mask"] = self.masker(np.random.default_rng(masking_seed))
        return sample


DATASETS.register("images")(
    DatasetSpec(
        ImageDataset,
        make_arrow="images",
        train=("images_train_*",),
        val=("images_val_*",),
        test=("images_val_*",),
        optional=frozenset({"images_val_*"}),
    )
)
