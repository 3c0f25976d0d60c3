"""COCO captions in Karpathy's split -> coco_caption_karpathy_{train,restval,val,test}.arrow."""

import os

from vlmo.utils.annotations import require_files
from vlmo.utils.arrow_writer import Report
from vlmo.utils.karpathy import write_karpathy

LAYOUT = """
  karpathy/dataset_coco.json
  train2014/COCO_train2014_*.jpg
  val2014/COCO_val2014_*.jpg
"""


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the COCO downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, ("karpathy/dataset_coco.json", "train2014", "val2014"), LAYOUT)
    json_path = os.path.join(root, "karpathy", "dataset_coco.json")
    return write_karpathy(json_path, root, dataset_root, "coco", ("train", "restval", "val", "test"), num_workers)
