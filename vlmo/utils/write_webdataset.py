"""Webdataset tars, and whatever img2dataset makes (tars, files or parquet) -> tables with captions.

A sample is the files that share a name up to the first dot: an image, and its caption in .txt or in .json.
"""

import json
import math
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.karpathy import caption_row
from vlmo.utils.own_data import caption_tables
from vlmo.utils.raw_images import FileSlice, ImageSource
from vlmo.utils.record_batches import Row, Skipped

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"}
MAX_TEXT_BYTES = 1 << 20
PARQUET_ROWS = 64
LAYOUT = "*.tar (webdataset), or *.parquet with images, or folders of images with .txt or .json beside them"


@dataclass
class _Sample:
    name: str
    image: ImageSource | None = None
    texts: dict[str, str] = field(default_factory=dict)  # by extension: txt, json


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
        caption_key: the entry of the .json (or the column) that has the caption; None: the .txt, else "caption".
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
            captions = _captions(sample, caption_key)
            if sample.image is None:
                yield split, Skipped(sample.name, "no image")
            elif not captions:
                yield split, Skipped(sample.name, "no caption")
            else:
                yield split, caption_row(sample.image, captions, os.path.basename(sample.name), split)

    with Conversion(dataset_root, f"{name}_webdataset", num_workers) as conversion:
        conversion.write(tables, rows)
    return conversion.report


def _captions(sample: _Sample, caption_key: str | None) -> list[str]:
    value: Any = sample.texts.get("txt")
    if "json" in sample.texts and (value is None or caption_key is not None):
        try:
            record = json.loads(sample.texts["json"])
        except (ValueError, RecursionError):
            return []
        value = record.get(caption_key or "caption") if isinstance(record, dict) else None
    values = value if isinstance(value, list) else [value]
    return [each.strip() for each in values if isinstance(each, str) and each.strip()]


def _sample_reader(root: str, caption_key: str | None) -> Callable[[], Iterator[_Sample]]:
    """What iterates over the samples, according to the files that are there."""
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    paths.sort()
    tars = [path for path in paths if path.endswith(".tar")]
    tables = [path for path in paths if path.endswith(".parquet") and _image_column(path)]
    if tars:
        return lambda: (sample for path in tars for sample in _tar_samples(path))
    if tables:
        return lambda: (sample for path in tables for sample in _parquet_samples(path, caption_key))
    if not any(_extension(path) in IMAGE_EXTENSIONS for path in paths):
        raise VLMoError(f"{root}: no samples. Expected there: {LAYOUT}")
    return lambda: _file_samples(paths)


def _extension(path: str) -> str:
    return os.path.basename(path).partition(".")[2].rpartition(".")[2].lower()


def _stem(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(".")[0])


def _file_samples(paths: Iterable[str]) -> Iterator[_Sample]:
    for stem, files in groupby(paths, _stem):
        sample = _Sample(stem)
        for path in files:
            if _extension(path) in IMAGE_EXTENSIONS:
                sample.image = path
            elif _extension(path) in ("txt", "json"):
                with open(path, encoding="utf-8", errors="replace") as file:
                    sample.texts[_extension(path)] = file.read(MAX_TEXT_BYTES)
        if sample.image is not None or "txt" in sample.texts:  # img2dataset also writes 00000_stats.json
            yield sample


def _tar_samples(path: str) -> Iterator[_Sample]:
    """Only headers and texts are read here; an image is where its bytes lie in the tar."""
    try:
        with tarfile.open(path, "r:") as tar:
            members = (member for member in tar if member.isfile())
            for stem, group in groupby(members, lambda member: _stem(member.name)):
                sample = _Sample(f"{path}/{stem}")
                for member in group:
                    extension = _extension(member.name)
                    if extension in IMAGE_EXTENSIONS:
                        sample.image = FileSlice(path, member.offset_data, member.size)
                    elif extension in ("txt", "json"):
                        file = tar.extractfile(member)
                        content = file.read(MAX_TEXT_BYTES) if file else b""
                        sample.texts[extension] = content.decode("utf-8", "replace")
                yield sample
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except (tarfile.TarError, OSError) as error:
        raise VLMoError(f"{path}: not a complete, uncompressed tar ({error})") from error


def _image_column(path: str) -> str | None:
    try:
        names = pq.read_schema(path).names
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: not a complete parquet file ({error})") from error
    return next((name for name in names if name in IMAGE_EXTENSIONS), None)


def _parquet_samples(path: str, caption_key: str | None) -> Iterator[_Sample]:
    image_column = _image_column(path)
    with pq.ParquetFile(path) as file:
        columns = [name for name in (image_column, caption_key or "caption", "key") if name in file.schema_arrow.names]
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
            for number, row in enumerate(batch.to_pylist()):
                image = row.pop(image_column)
                texts = {"json": json.dumps(row, default=str)}
                yield _Sample(f"{path}/{row.get('key', number)}", image if isinstance(image, bytes) else None, texts)
