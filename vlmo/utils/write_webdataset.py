"""Webdataset tars, and whatever img2dataset makes (tars, files or parquet) -> tables with captions.

A sample is an image and its caption, in .txt or in .json: in a tar, files side by side that share a name up to the
first dot, in a folder up to the ending. Files that claim the same place in a sample are told apart by their whole
names; where that is no help the sample is left out.
"""

import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.files import walk
from vlmo.sources.columns import image_column, text_column
from vlmo.sources.grouping import (
    IMAGE_EXTENSIONS,
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    Member,
    Sample,
    captions,
    decode,
    extension,
    group_side_by_side,
    put_together,
    stem,
)
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.karpathy import caption_row
from vlmo.utils.own_data import caption_tables
from vlmo.utils.raw_images import FileSlice
from vlmo.utils.record_batches import Row, Skipped

PARQUET_ROWS = 64
LAYOUT = "*.tar (webdataset), or *.parquet with images, or folders of images with .txt or .json beside them"


def make_arrow(
    root: str,
    dataset_root: str,
    *,
    name: str = "gcc",
    caption_key: str | None = None,
    val_share: float = 0.01,
    num_workers: int = 1,
) -> Report:
    """Converts the samples below `root` into the tables of the data set `name` in `dataset_root`.

    Samples without an image or caption are left out. Raises VLMoError when there are none or a tar is damaged.

    Args:
        caption_key: the entry of the .json (or the column) that has the caption; None: the .txt, else "caption" or
            "text".
        val_share: every (1 / val_share)-th sample is for validation, beginning with the first.
    """
    if not 0 <= val_share < 1:
        raise VLMoError(f"val_share={val_share}: must be 0 or more and below 1")
    tables = caption_tables(name, ("train", "val") if val_share else ("train",))
    samples = _sample_reader(root, caption_key)

    def rows() -> Iterator[tuple[str, Row | Skipped]]:
        for number, sample in enumerate(samples()):
            is_val = math.ceil((number + 1) * val_share) > math.ceil(number * val_share)
            split = "val" if is_val else "train"
            found, entries = captions(sample.texts, caption_key)
            if sample.problem:
                yield split, Skipped(sample.name, sample.problem)
            elif sample.image is None:
                yield split, Skipped(sample.name, "no image")
            elif not found:
                yield split, Skipped(sample.name + entries, "no caption")
            else:
                yield split, caption_row(sample.image, found, os.path.basename(sample.name), split)

    with Conversion(dataset_root, f"{name}_webdataset", num_workers) as conversion:
        conversion.write(tables, rows)
    return conversion.report


def _sample_reader(root: str, caption_key: str | None) -> Callable[[], Iterator[Sample]]:
    """What iterates over the samples, according to the files that are there."""
    paths = [os.path.join(folder, name) for folder, names in walk(root) for name in names]
    paths.sort()
    tars = [path for path in paths if path.endswith(".tar")]
    tables = [path for path in paths if path.endswith(".parquet") and _image_column(path)]
    if tars:
        return lambda: (sample for path in tars for sample in _tar_samples(path))
    if tables:
        return lambda: (sample for path in tables for sample in _parquet_samples(path, caption_key))
    if not any(extension(path) in IMAGE_EXTENSIONS for path in paths):
        found = f"; there are {len(paths):,} other files, such as {paths[0]}" if paths else ""
        raise VLMoError(f"{root}: no samples{found}. Expected there: {LAYOUT}")
    return lambda: _file_samples(paths)


# --- where they lie ---------------------------------------------------------------------------------------------------


def _file_samples(paths: Iterable[str]) -> Iterator[Sample]:
    for name, files in groupby(sorted(paths, key=stem), stem):
        sample = put_together(name, map(_file_member, files))
        if sample.image is not None or "txt" in sample.texts:  # img2dataset also writes 00000_stats.json
            yield sample


def _file_member(path: str) -> Member:
    if extension(path) not in TEXT_EXTENSIONS:
        return Member(path, path)
    with open(path, encoding="utf-8", errors="replace") as file:
        return Member(path, path, file.read(MAX_TEXT_BYTES))


def _tar_samples(path: str) -> Iterator[Sample]:
    """Only headers and texts are read here; an image is where its bytes lie in the tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield from group_side_by_side(path, _tar_members(path, tar))
    except (tarfile.TarError, OSError) as error:
        raise VLMoError(f"{path}: not a complete, uncompressed tar ({error})") from error


def _tar_members(path: str, tar: tarfile.TarFile) -> Iterator[Member]:
    for member in tar:
        if member.isfile() and not os.path.basename(member.name).startswith("._"):  # (macOS writes those)
            content = b""
            if extension(member.name) in TEXT_EXTENSIONS:
                file = tar.extractfile(member)
                content = file.read(MAX_TEXT_BYTES) if file else b""
            source = FileSlice(path, member.offset_data, member.size)
            yield Member(member.name, source, decode(content))
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def _image_column(path: str) -> str | None:
    try:
        return image_column(pq.read_schema(path))
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: not a complete parquet file ({error})") from error


def _parquet_samples(path: str, caption_key: str | None) -> Iterator[Sample]:
    image = _image_column(path)
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        caption = text_column(file.schema_arrow, caption_key or "")
        if caption is None:
            what = repr(caption_key) if caption_key else "of captions"
            raise VLMoError(f"{path}: has no column {what} (it has {', '.join(names)}); name it with caption_key")
        columns = [name for name in (image, caption, "key") if name in names]
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
            for number, row in enumerate(batch.to_pylist()):
                data = row.pop(image)
                data = data.get("bytes") if isinstance(data, dict) else data
                texts = {"json": json.dumps(row, default=str)}
                yield Sample(f"{path}/{row.get('key', number)}", data if isinstance(data, bytes) else None, texts)
