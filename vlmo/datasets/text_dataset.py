"""Plain text, for stage 2: Wikipedia and BookCorpus."""

from typing import ClassVar

from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.registry import DATASETS


class TextDataset(BaseDataset):
    """A sample is one text, without an image; column `caption`."""

    image_columns: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[dict[str, str]] = {"caption": "a list of texts"}


DATASETS.register("wikibk")(
    DatasetSpec(
        TextDataset,
        make_arrow="wikibk",
        train=("wikibk_train_*",),
        val=("wikibk_val_*",),
        test=("wikibk_val_*",),
        optional=frozenset({"wikibk_val_*"}),  # the published converter never wrote it
    )
)
