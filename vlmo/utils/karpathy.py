"""Captions in Karpathy's JSON: {"images": [{"filename", "filepath"?, "split", "sentences": [{"raw"}]}]}."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.utils.annotations import column, field, inside
from vlmo.utils.arrow_writer import Conversion, Report, Table
from vlmo.utils.json_stream import stream_list
from vlmo.utils.record_batches import Row, Skipped

CAPTION_SCHEMA = pa.schema(
    {"image": pa.binary(), "caption": pa.list_(pa.string()), "image_id": pa.string(), "split": pa.string()}
)


def caption_row(image: Any, captions: list[str], image_id: str, split: str) -> Row:
    return Row({"caption": captions, "image_id": image_id, "split": split}, {"image": image})


def write_karpathy(
    json_path: str, image_root: str, out: str, name: str, splits: tuple[str, ...], num_workers: int
) -> Report:
    """Writes `{name}_caption_karpathy_{split}` for each of `splits`; the rows are in the order of the JSON file.

    Raises VLMoError for entries that lack something, have another split, or lead out of `image_root`.
    """
    tables = {split: Table(f"{name}_caption_karpathy_{split}", CAPTION_SCHEMA) for split in splits}
    with Conversion(out, f"{name}_karpathy", num_workers) as conversion:
        split_of: dict[str, str] = {}
        several: dict[str, None] = {}  # images in several splits: those that are tested on may have been trained on
        conversion.write(tables, partial(_rows, json_path, image_root, splits, split_of, several))
        if several:
            some = next(iter(several))
            note = f"{len(several):,} images are in several splits, such as {some}: tested on what is trained on"
            conversion.report.notes.append(note)
    return conversion.report


def _rows(
    json_path: str, image_root: str, splits: tuple[str, ...], split_of: dict[str, str], several: dict[str, None]
) -> Iterator[tuple[str, Row | Skipped]]:
    for number, image in enumerate(stream_list(json_path, "images")):
        where = f"{json_path}: images[{number}]"
        split = field(image, "split", str, where)
        if split not in splits:
            raise VLMoError(f"{where}: unknown split {split!r}; known: {', '.join(splits)}")
        file_name = field(image, "filename", str, where)
        folder = field(image, "filepath", str, where) if "filepath" in image else ""
        path = inside(image_root, os.path.join(folder, file_name), where)
        if split_of.setdefault(path, split) != split:
            several[path] = None
        captions = column(field(image, "sentences", list, where), "raw", str, f"{where}: sentences")
        yield split, caption_row(path, captions, file_name, split) if captions else Skipped(path, "no caption")
