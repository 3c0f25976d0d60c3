"""Conceptual Captions (GCC) -> conceptual_caption_{train,val}_{0..}.arrow, 100,000 rows a file.

The annotations are lists of [image path below root, caption]; sbu has the same layout.
"""

import os
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from typing import Any

from vlmo.errors import VLMoError
from vlmo.utils.annotations import inside, require_files
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.json_stream import stream_list
from vlmo.utils.karpathy import CAPTION_SCHEMA, caption_row
from vlmo.utils.record_batches import Row

SHARD_ROWS = 100_000
LAYOUT = """
  train_annot.json    [["images_train/0000/0000000", "a caption"], ...]
  val_annot.json      [["images_val/0000/0000000", "a caption"], ...]
  images_train/*/*
  images_val/*/*
"""


def make_arrow(root: str, dataset_root: str, *, num_workers: int = 1) -> Report:
    """Converts the Conceptual Captions downloads below `root` into tables in `dataset_root`.

    Raises VLMoError when files are missing or the annotations are not as they should be.
    """
    require_files(root, ("train_annot.json", "val_annot.json", "images_train", "images_val"), LAYOUT)
    tables = {
        split: Table(f"conceptual_caption_{split}_{{shard}}", CAPTION_SCHEMA, SHARD_ROWS) for split in ("train", "val")
    }

    def rows() -> Iterator[tuple[str, Row]]:
        for split in tables:
            yield from annotated_rows(root, f"{split}_annot.json", split)

    with Conversion(dataset_root, "conceptual_caption", num_workers) as conversion:
        conversion.write(tables, rows)
    return conversion.report


def annotated_rows(root: str, annotation_file: str, split: str) -> Iterator[tuple[str, Row]]:
    """The rows of a list of [image path, caption]; captions of the same image that follow each other share a row."""
    json_path = os.path.join(root, annotation_file)
    entries = (_checked(entry, f"{json_path}: [{number}]") for number, entry in enumerate(stream_list(json_path)))
    for path, group in groupby(entries, itemgetter(0)):
        full_path = inside(root, path, json_path)
        yield split, caption_row(full_path, [caption for _, caption in group], os.path.basename(path), split)


def _checked(entry: Any, where: str) -> list[str]:
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry
    raise VLMoError(f"{where}: expected [image path, caption]")
