"""Your own images with captions, listed in JSONL, CSV or TSV -> tables that training reads like COCO's.

A record is {"image": path below root, "caption": text or list, "split": "train" | "val" | "test", "image_id": text},
the last two optional; records of the same image are put together.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from vlmo.errors import VLMoError
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.karpathy import caption_row
from vlmo.utils.own_data import annotation_file, caption_tables, image_file, parse_records, share_out, split_of, texts
from vlmo.utils.record_batches import Row


@dataclass
class _Image:
    image_id: str
    split: str | None
    captions: list[str] = field(default_factory=list)


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    annotations: str | None = None,
    name: str = "coco",
    image_key: str = "image",
    caption_key: str = "caption",
    val_share: float = 0.05,
    test_share: float = 0.05,
    seed: int = 0,
    skip_missing: bool = False,
    num_workers: int = 1,
) -> Report:
    """Converts images below `root` into the tables of the data set `name` in `dataset_root`.

    Raises VLMoError that lists the records that are not as they should be.

    Args:
        annotations: the list of records; captions.jsonl, .csv or .tsv in `root` if None.
        image_key, caption_key: what the two columns are called.
        val_share, test_share: shares of the images without a split that are held out.
        skip_missing: leave out images that do not exist, instead of refusing the list.
    """
    path = annotation_file(root, annotations, "captions")
    images: dict[str, _Image] = {}
    parse_records(path, partial(_add, images, root, image_key, caption_key, skip_missing))
    splits = share_out({key: image.split for key, image in images.items()}, val_share, test_share, seed, path)
    tables = caption_tables(name, splits.values())

    def rows() -> Iterator[tuple[str, Row]]:
        for key, image in images.items():
            yield splits[key], caption_row(key, image.captions, image.image_id, splits[key])

    with Conversion(dataset_root, f"{name}_captions", num_workers) as conversion:
        conversion.write(tables, rows)
    return conversion.report


def _add(
    images: dict[str, _Image],
    root: str,
    image_key: str,
    caption_key: str,
    skip_missing: bool,
    where: str,
    record: dict[str, Any],
) -> None:
    key = image_file(root, record, image_key, where, skip_missing)
    split = split_of(record, where)
    image = images.setdefault(key, _Image(str(record.get("image_id", os.path.basename(key))), split))
    if image.split != split:
        raise VLMoError(f"{where}: {key} is in the splits {image.split!r} and {split!r}")
    image.captions += texts(record, caption_key, where)
