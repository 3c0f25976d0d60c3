"""A data set of your own, from outside the package: tables of images with captions under your own file names.

    python run.py with plugins='["examples.plugins.my_captions"]' task_mlm_itm_itc_base datasets='["my_captions"]'
        data_root=<ARROW_ROOT> ...

The tables my_captions_{train_0,train_1,...,val}.arrow have the columns `image` (bytes of the file) and `caption` (list
of strings), as `vlmo.utils.write_own_captions` writes them. A data set whose samples hold more than that has a class of
its own: see `memes.py`.
"""

from vlmo.datasets.base_dataset import DatasetSpec
from vlmo.datasets.caption_dataset import CaptionDataset
from vlmo.registry import DATASETS

DATASETS.register("my_captions")(
    DatasetSpec(
        CaptionDataset,
        make_arrow="",
        train=("my_captions_train_*",),
        val=("my_captions_val",),
        test=("my_captions_val",),
        optional=frozenset({"my_captions_val"}),
        retrieval=True,  # each image has its own captions: recall can be measured
    )
)
