"""What all data sets share: from a sample's row in the tables to a dict with its text, masked text and images."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from vlmo.batch import Field
from vlmo.images import UndecodableImage, decode_image, image_key
from vlmo.sources.arrow_tables import RowLocation, Tables, open_tables
from vlmo.text import TokenMasker, tokenize
from vlmo.transforms.square import CropAtScale

Transform = Callable[[Image.Image], Tensor]

MLM_FIELDS = ("text_ids_mlm", "text_labels_mlm")


class Skipped(NamedTuple):
    """Stands for a sample whose image cannot be decoded; the batch goes on without it."""

    reason: str
    targets: dict[str, Any]  # what is known of the sample all the same: an answer is owed to each question


def read_images(
    tables: Tables,
    location: RowLocation,
    columns: Sequence[str],
    transform: Transform,
    seed: int,
    decoding: str = "correct",
    with_key: bool = False,
) -> dict[str, Any] | Skipped:
    """Decodes and transforms a row's images: (3, S, S) by column; `seed` determines the augmentation.

    Args:
        with_key: adds the `image_key` of the column "image", whose bytes are at hand here.
    """
    images: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        # the CPU's generator alone: torch.manual_seed would also reset the GPU's, and with it every dropout mask
        torch.default_generator.manual_seed(seed)
        for column in columns:
            try:
                data = location.scalar(column).as_buffer()
                if isinstance(transform, CropAtScale):
                    images[column] = transform.read(data, decoding)
                else:
                    images[column] = transform(decode_image(data, decoding))
                if with_key and column == "image":
                    images["image_key"] = image_key(data)
            except UndecodableImage as error:
                name = tables.paths[location.table].stem
                return Skipped(f"{name}: image row {location.image} of the data set ({column}): {error}", {})
    return images


class BaseDataset(Dataset):
    """Samples of Arrow tables: one text each, with the image or images of its row.

    `dataset[key]` takes a sample number, or `(number, seed)` with another seed in each epoch: number and seed alone
    determine the sample, whichever worker makes it. Subclasses name their columns and add what else a sample holds;
    a `DatasetSpec` names the files.
    """

    text_column: ClassVar[str | None] = "caption"  # None: rows without texts
    image_columns: ClassVar[tuple[str, ...]] = ("image",)
    counts_rows: ClassVar[bool] = False  # whether its samples are the rows of its tables, not the texts
    # what a table must have, by kind (see `checks.py`), and what it must have besides for training and validation
    columns: ClassVar[dict[str, str]] = {"image": "binary", "caption": "a list of texts"}
    target_columns: ClassVar[dict[str, str]] = {}
    # how what `targets` adds becomes part of a batch
    fields: ClassVar[Mapping[str, Field]] = {}

    def __init__(
        self,
        paths: Sequence[str | Path] | Tables,
        tokenizer: Any,
        max_text_len: int,
        masker: TokenMasker,
        transform: Transform,
        wanted: Collection[str],
        image_decoding: str = "correct",
    ):
        """
        Args:
            paths: Arrow files, in this order; or the tables of a source.
            tokenizer: BERT's, as `load_tokenizer` makes it.
            max_text_len: tokens, [CLS] and [SEP] included; longer texts are cut.
            masker: for masked language modelling.
            transform: RGB image to (3, S, S), pixels or, in training, bytes of them (uint8; `Batch`); draws from
                torch's global generator only.
            wanted: names of the fields that somebody reads: other images are not decoded, nor are tokens masked for
                nobody.
            image_decoding: as of `decode_image`.

        Raises:
            VLMoError: if a file cannot be read.
        """
        self.tables = open_tables(paths, self.text_column)
        self.tokenizer = tokenizer
        self.max_text_len = max_text_len
        self.masker = masker
        self.transform = transform
        self.wanted = frozenset(wanted)
        self.image_decoding = image_decoding

    def __len__(self) -> int:
        return self.tables.num_texts

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any] | Skipped:
        index, seed = key if isinstance(key, tuple) else (key, 0)
        location = self.tables.text(index)
        image_seed, masking_seed = np.random.SeedSequence([seed, index]).generate_state(2, np.uint64)
        sample = self.images(location, int(image_seed), with_key="image_key" in self.wanted)
        if isinstance(sample, Skipped):
            return sample._replace(targets=self.targets(location))
        text = self.text(location)
        ids = self.text_ids(text)
        sample |= {"text": text, "text_ids": ids}
        if not self.wanted.isdisjoint(MLM_FIELDS):
            sample |= zip(MLM_FIELDS, self.masker(ids, np.random.default_rng(masking_seed)), strict=True)
        sample |= {"raw_index": index, "img_index": location.image, "cap_index": location.item}
        return sample | self.targets(location)

    def targets(self, location: RowLocation) -> dict[str, Any]:
        """What else a sample holds, also one whose image cannot be decoded; see `fields`."""
        return {}

    @classmethod
    def image_targets(cls, location: RowLocation) -> dict[str, Any]:
        """What else the sample of an image holds where no task reads texts; see `fields`."""
        return {}

    def text(self, location: RowLocation) -> str:
        """The sample's text; "" where it has none."""
        return (location.list_item(self.text_column) if self.text_column else None) or ""

    def text_ids(self, text: str) -> list[int]:
        """Token ids, [CLS] and [SEP] included, at most `max_text_len`."""
        return tokenize(self.tokenizer, text, self.max_text_len)

    def images(self, location: RowLocation, seed: int, with_key: bool = False) -> dict[str, Any] | Skipped:
        """The row's transformed images (3, S, S) by column, see `read_images`."""
        columns = [column for column in self.image_columns if column in self.wanted]
        return read_images(self.tables, location, columns, self.transform, seed, self.image_decoding, with_key)

    # --- what a run asks before it begins ----------------------------------------------------------------------------

    @classmethod
    def label_names(cls, root: Path, paths: Sequence[Path]) -> list[str] | None:
        """Names of the classes that its labels number, in order; None if it has no labels, or nothing tells.

        Args:
            root: folder of the tables. paths: those of training and validation.

        Raises:
            VLMoError: if what should tell is damaged.
        """
        return None

    @classmethod
    def check_labels(cls, name: str, root: Path, paths: Sequence[Path], settings: Any) -> list[str]:
        """Problems of the labels in `paths` with the model of a run, one line each with its remedy.

        Args:
            name: of the data set, for messages.
        """
        return []

    @classmethod
    def test_warnings(cls, paths: Sequence[Path]) -> list[str]:
        """What is missing in the tables of a test split that its prediction files need, one line each."""
        return []


@dataclass(frozen=True)
class DatasetSpec:
    """One data set, registered in `DATASETS` under its name.

    Files are named without `.arrow`; `*` stands for the number of a shard (0, 1, ...; any number of shards). A split
    without files (`()`) is a split it does not have.
    """

    dataset: type[BaseDataset]
    make_arrow: str = ""  # vlmo.utils.write_<make_arrow> makes the files; "": something else does
    train: tuple[str, ...] = ()
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()  # files whose absence is a warning: own data often has no such part
    retrieval: bool = False  # each image has its own captions: recall can be measured

    def files(self, split: str) -> tuple[str, ...]:
        """Names of the files of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]

    @property
    def provides(self) -> frozenset[str]:
        """What it has, of "image" and "text"; compare `Task.reads`."""
        has = {"image": bool(self.dataset.image_columns), "text": self.dataset.text_column is not None}
        return frozenset(kind for kind, there in has.items() if there)


class ImageView(Dataset):
    """The images of a data set, each once, without texts: for retrieval."""

    counts_rows = True

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.tables = dataset, dataset.tables

    def __len__(self) -> int:
        return self.tables.num_rows

    def __getitem__(self, index: int) -> dict[str, Any] | Skipped:
        images = self.dataset.images(self.tables.row(index), seed=0)
        return images if isinstance(images, Skipped) else images | {"raw_index": index, "img_index": index}


class TextView(Dataset):
    """The texts of a data set, with the number of the image each belongs to; no image is decoded: for retrieval."""

    counts_rows = False

    def __init__(self, dataset: BaseDataset):
        self.dataset, self.tables = dataset, dataset.tables

    def __len__(self) -> int:
        return self.tables.num_texts

    def __getitem__(self, index: int) -> dict[str, Any]:
        location = self.tables.text(index)
        text = self.dataset.text(location)
        return {"text_ids": self.dataset.text_ids(text), "raw_index": index, "img_index": location.image}


class ConcatDataset(Dataset):
    """Data sets (or views, or `MaskedImages`) one after the other, samples and images numbered through.

    (torch's own takes no (number, seed) keys and knows nothing of images.)
    """

    def __init__(self, datasets: Sequence[Any]):
        self.datasets = datasets
        self._starts = np.cumsum([0] + [len(dataset) for dataset in datasets])
        self._image_starts = np.cumsum([0] + [dataset.tables.num_rows for dataset in datasets])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, key: Any) -> dict[str, Any] | Skipped:
        index, *seed = key if isinstance(key, tuple) else (key,)
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        local = int(index - self._starts[part])
        sample = self.datasets[part][(local, *seed) if seed else local]
        if isinstance(sample, Skipped):
            return sample
        numbers = {"raw_index": index, "img_index": sample["img_index"] + int(self._image_starts[part])}
        return sample | {name: number for name, number in numbers.items() if name in sample}

    @property
    def reads_on(self) -> bool:
        """Whether some of it should be read ahead; see `SourceTables`."""
        return any(getattr(dataset.tables, "reads_on", False) for dataset in self.datasets)

    def units(self, indices: np.ndarray) -> list[tuple[int, int, int]]:
        """What is to be fetched for the samples number `indices`: part, file, and block or row group, each once."""
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        return [
            (part, *unit)
            for part, dataset in enumerate(self.datasets)
            if getattr(dataset.tables, "reads_on", False)
            for unit in dataset.tables.units(indices[parts == part] - self._starts[part], dataset.counts_rows)
        ]

    def text_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Bytes of the texts of the samples number `indices` (N,), int64 (N,)."""
        sizes = np.zeros(len(indices), np.int64)
        parts = np.searchsorted(self._starts, indices, side="right") - 1
        for part, dataset in enumerate(self.datasets):
            mine = parts == part
            sizes[mine] = dataset.tables.text_sizes(indices[mine] - self._starts[part])
        return sizes


class Beside(ConcatDataset):
    """A `ConcatDataset` whose samples each come with one of every other set, for the losses with data of their own.

    The fields of those have the loss's name and a dot in front. With the next sample comes the next of each, begun
    anywhere in each epoch: so all are drawn equally often, and number and seed still determine everything.
    """

    def __init__(self, datasets: Sequence[Any], others: Mapping[str, ConcatDataset]):
        """
        Args:
            others: by the loss that they are for.
        """
        super().__init__(datasets)
        self.others = others

    def __getitem__(self, key: Any) -> dict[str, Any] | Skipped:
        sample = super().__getitem__(key)
        index, *seed = key if isinstance(key, tuple) else (key,)
        for name, dataset in self.others.items():
            if isinstance(sample, Skipped):
                break
            number = (index + sum(seed)) % len(dataset)
            other = dataset[(number, *seed) if seed else number]
            if isinstance(other, Skipped):
                return other
            sample |= {f"{name}.{field}": value for field, value in other.items()}
        return sample


class PairView(Dataset):
    """Samples of an image and a text each; the last image is kept, for the pairs after it that have the same."""

    def __init__(self, image_view: ConcatDataset, text_view: ConcatDataset, images: np.ndarray, texts: np.ndarray):
        """
        Args:
            image_view, text_view: images and texts, each once.
            images, texts: (pairs,) their numbers in those; of images that can be decoded.
        """
        assert len(images) == len(texts)
        self.image_view, self.text_view = image_view, text_view
        self.images, self.texts = images, texts
        self._last: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = int(self.images[index])
        if self._last[0] != number:
            sample = self.image_view[number]
            assert isinstance(sample, dict), "an image that could be read before"
            self._last = (number, sample["image"])
        text = self.text_view[int(self.texts[index])]
        assert isinstance(text, dict)
        return {"image": self._last[1], "text_ids": text["text_ids"], "raw_index": index}
