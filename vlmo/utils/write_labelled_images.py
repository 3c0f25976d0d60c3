"""Folders of classes, as ImageNet has them -> labelled_images_{train,val}_{0..}.arrow and their list of classes."""

import os
from collections.abc import Iterator, Sequence
from functools import partial

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.files import walk
from vlmo.images import SUFFIXES
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.record_batches import Row
from vlmo.utils.write_conceptual_caption import SHARD_ROWS

LAYOUT = """
  train/CLASS/*.jpg    (also png, gif, bmp, webp, tif, ppm, avif, and folders within)
  val/CLASS/*.jpg      may be missing
"""
SCHEMA = pa.schema({"image": pa.binary(), "label": pa.int64(), "image_id": pa.string(), "split": pa.string()})
CLASSES_FILE = "labelled_images_classes.json"


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the images below `root` into tables in `dataset_root`; labels number the class folders in their order.

    Raises VLMoError when there are no classes, or val has others than train.
    """
    classes = _classes(root, "train")
    if not classes:
        raise VLMoError(
            f"{os.path.join(root, 'train')}: has no folders of classes. Expected in {root}:{LAYOUT.rstrip()}"
        )
    splits = ["train"]
    if os.path.isdir(os.path.join(root, "val")):
        splits.append("val")
        own = _classes(root, "val")
        others = sorted(set(own) - set(classes))
        if others or not own:
            what = f"has the class {others[0]!r}, which train lacks" if others else "has no folders of classes"
            raise VLMoError(f"{os.path.join(root, 'val')}: {what}; give it a folder for each class of train")
    tables = {split: Table(f"labelled_images_{split}_{{shard}}", SCHEMA, SHARD_ROWS) for split in splits}
    with Conversion(dataset_root, "labelled_images", num_workers) as conversion:
        conversion.write(tables, partial(_rows, root, splits, classes))
        conversion.write_json(CLASSES_FILE, classes)
        conversion.report.notes.append(f"{len(classes):,} classes: train with num_classes={len(classes)}")
        if "val" not in splits:
            conversion.report.notes.append("there is no val: nothing will be measured")
    return conversion.report


def _classes(root: str, split: str) -> list[str]:
    folder = os.path.join(root, split)
    if not os.path.isdir(folder):
        return []
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _rows(root: str, splits: Sequence[str], classes: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Split by split, class by class; a folder's names are all that is held in memory."""
    for split in splits:
        for label, name in enumerate(classes):
            top = os.path.join(root, split, name)
            for folder, names in walk(top) if os.path.isdir(top) else ():
                for path in (os.path.join(folder, each) for each in names if each.lower().endswith(SUFFIXES)):
                    columns = {"label": label, "image_id": os.path.relpath(path, root), "split": split}
                    yield split, Row(columns, {"image": path})
