"""Captions in Karpathy's JSON, under any name -> `{name}_caption_karpathy_{train,restval,val,test}.arrow`."""

import os

from vlmo.utils.annotations import require_files
from vlmo.utils.arrow_writer import Report
from vlmo.utils.karpathy import write_karpathy
from vlmo.utils.own_data import check_name

LAYOUT = """
  <annotations>    {"images": [{"filename": "1.jpg", "split": "train", "sentences": [{"raw": "a caption"}]}, ...]}
  <images>/*       (an image may also have its folder below <images> as "filepath")
"""


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    annotations: str = "dataset.json",
    images: str = "",
    name: str = "coco",
    num_workers: int = 1,
) -> Report:
    """Converts images below `root`/`images`, listed in `root`/`annotations`, into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    check_name(name)
    require_files(root, (annotations, images), LAYOUT)
    splits = ("train", "restval", "val", "test")
    return write_karpathy(
        os.path.join(root, annotations), os.path.join(root, images), dataset_root, name, splits, num_workers
    )
