"""A folder of images, at any depth -> images_{train,val}_{0..}.arrow: images without texts, for stage 1."""

import os
from collections.abc import Iterator
from functools import partial

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.files import walk
from vlmo.images import SUFFIXES
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.record_batches import Row
from vlmo.utils.write_conceptual_caption import SHARD_ROWS

LAYOUT = """
  any/folders/*.jpg    (also png, gif, bmp, webp, tif, ppm, avif; other files are passed over)
"""
SCHEMA = pa.schema({"image": pa.binary(), "image_id": pa.string(), "split": pa.string()})


def make_arrow(root: str, dataset_root: str, *, val_share: float = 0.01, num_workers: int = 1) -> Report:
    """Converts the images below `root`, in the order of their paths, into tables in `dataset_root`.

    Raises VLMoError when there are none.

    Args:
        val_share: this share of the images, evenly spaced, is for validation; 0: none.
    """
    if not os.path.isdir(root):
        raise VLMoError(f"{root} is not a folder. Expected there:{LAYOUT.rstrip()}")
    if not 0 <= val_share <= 0.5:
        raise VLMoError(f"val_share={val_share}: must be from 0 to 0.5")
    splits = ("train", "val") if val_share else ("train",)
    tables = {split: Table(f"images_{split}_{{shard}}", SCHEMA, SHARD_ROWS) for split in splits}
    with Conversion(dataset_root, "images", num_workers) as conversion:
        conversion.write(tables, partial(_rows, root, round(1 / val_share) if val_share else 0))
    return conversion.report


def _rows(root: str, every: int) -> Iterator[tuple[str, Row]]:
    """Every `every`-th image goes to val; a folder's names are all that is held in memory."""
    number = 0
    for folder, names in walk(root):
        for name in names:
            if not name.lower().endswith(SUFFIXES):
                continue
            number += 1
            split = "val" if every and number % every == 0 else "train"
            path = os.path.join(folder, name)
            yield split, Row({"image_id": os.path.relpath(path, root), "split": split}, {"image": path})
