"""The data sets: their files, their class, and what makes the files.

To add one: a class, unless one that is here does, and a line in the table. Files are named without `.arrow`; `*` stands
for the number of a shard (0, 1, ...; any number of shards).
"""

from dataclasses import dataclass

from vlmo.datasets.base_dataset import BaseDataset, ImageView, Skipped, TextView
from vlmo.datasets.caption_dataset import CaptionDataset
from vlmo.datasets.masked_images import ImageDataset, MaskedImages
from vlmo.datasets.nlvr2_dataset import NLVR2Dataset
from vlmo.datasets.text_dataset import TextDataset
from vlmo.datasets.vqa_dataset import VQADataset

__all__ = ["DATASETS", "BaseDataset", "DatasetSpec", "ImageView", "MaskedImages", "Skipped", "TextView"]


@dataclass(frozen=True)
class DatasetSpec:
    """One data set: a split without files (`()`) is a split it does not have."""

    dataset: type[BaseDataset]
    make_arrow: str  # vlmo.utils.write_<make_arrow> makes the files
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()  # files whose absence is a warning: own data often has no such part
    retrieval: bool = False  # each image has its own captions: recall can be measured

    def files(self, split: str) -> tuple[str, ...]:
        """Names of the files of "train", "val" or "test"."""
        return {"train": self.train, "val": self.val, "test": self.test}[split]


DATASETS: dict[str, DatasetSpec] = {
    "images": DatasetSpec(
        ImageDataset,
        "images",
        train=("images_train_*",),
        val=("images_val_*",),
        test=("images_val_*",),
        optional=frozenset({"images_val_*"}),
    ),
    "coco": DatasetSpec(
        CaptionDataset,
        "coco_karpathy",
        train=("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
        val=("coco_caption_karpathy_val",),
        test=("coco_caption_karpathy_test",),
        optional=frozenset({"coco_caption_karpathy_restval"}),
        retrieval=True,
    ),
    "f30k": DatasetSpec(
        CaptionDataset,
        "f30k_karpathy",
        train=("f30k_caption_karpathy_train",),
        val=("f30k_caption_karpathy_val",),
        test=("f30k_caption_karpathy_test",),
        retrieval=True,
    ),
    "gcc": DatasetSpec(
        CaptionDataset,
        "conceptual_caption",
        train=("conceptual_caption_train_*",),
        val=("conceptual_caption_val_*",),
        test=("conceptual_caption_val_*",),
    ),
    "sbu": DatasetSpec(CaptionDataset, "sbu", train=("sbu_*",)),
    "vg": DatasetSpec(CaptionDataset, "vg", train=("vg",)),
    "wikibk": DatasetSpec(
        TextDataset,
        "wikibk",
        train=("wikibk_train_*",),
        val=("wikibk_val_*",),
        test=("wikibk_val_*",),
        optional=frozenset({"wikibk_val_*"}),  # the published converter never wrote it
    ),
    "vqa": DatasetSpec(
        VQADataset,
        "vqa",
        train=("vqav2_train", "vqav2_trainable_val"),
        val=("vqav2_rest_val",),
        test=("vqav2_test",),
        optional=frozenset({"vqav2_trainable_val"}),
    ),
    "nlvr2": DatasetSpec(
        NLVR2Dataset,
        "nlvr2",
        train=("nlvr2_train",),
        val=("nlvr2_dev", "nlvr2_test1"),
        test=("nlvr2_dev", "nlvr2_test1"),
        optional=frozenset({"nlvr2_test1"}),
    ),
}
