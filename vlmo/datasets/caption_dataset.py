"""Images with captions: COCO, Flickr30k, Conceptual Captions, SBU, Visual Genome."""

from vlmo.datasets.base_dataset import BaseDataset, DatasetSpec
from vlmo.registry import DATASETS


class CaptionDataset(BaseDataset):
    """A sample is one caption with its image; columns `image` and `caption`."""


DATASETS.register("coco")(
    DatasetSpec(
        CaptionDataset,
        make_arrow="coco_karpathy",
        train=("coco_caption_karpathy_train", "coco_caption_karpathy_restval"),
        val=("coco_caption_karpathy_val",),
        test=("coco_caption_karpathy_test",),
        optional=frozenset({"coco_caption_karpathy_restval"}),
        retrieval=True,
    )
)
DATASETS.register("f30k")(
    DatasetSpec(
        CaptionDataset,
        make_arrow="f30k_karpathy",
        train=("f30k_caption_karpathy_train",),
        val=("f30k_caption_karpathy_val",),
        test=("f30k_caption_karpathy_test",),
        retrieval=True,
    )
)
DATASETS.register("gcc")(
    DatasetSpec(
        CaptionDataset,
        make_arrow="conceptual_caption",
        train=("conceptual_caption_train_*",),
        val=("conceptual_caption_val_*",),
        test=("conceptual_caption_val_*",),
    )
)
DATASETS.register("sbu")(DatasetSpec(CaptionDataset, make_arrow="sbu", train=("sbu_*",)))
DATASETS.register("vg")(DatasetSpec(CaptionDataset, make_arrow="vg", train=("vg",)))
