"""Flickr30k captions in Karpathy's split -> f30k_caption_karpathy_{train,val,test}.arrow."""

import os

from vlmo.utils.annotations import require_files
from vlmo.utils.arrow_writer import Report
from vlmo.utils.karpathy import write_karpathy

LAYOUT = """
  karpathy/dataset_flickr30k.json
  flickr30k-images/*.jpg
"""


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the Flickr30k downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, ("karpathy/dataset_flickr30k.json", "flickr30k-images"), LAYOUT)
    json_path = os.path.join(root, "karpathy", "dataset_flickr30k.json")
    images = os.path.join(root, "flickr30k-images")
    return write_karpathy(json_path, images, dataset_root, "f30k", ("train", "val", "test"), num_workers)
