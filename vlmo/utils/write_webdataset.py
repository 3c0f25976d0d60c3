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
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.files import walk
from vlmo.images import SUFFIXES
from vlmo.utils.arrow_writer import Conversion, Report
from vlmo.utils.karpathy import caption_row
from vlmo.utils.own_data import caption_tables
from vlmo.utils.raw_images import FileSlice, ImageSource
from vlmo.utils.record_batches import Row, Skipped

IMAGE_EXTENSIONS = {suffix.removeprefix(".") for suffix in SUFFIXES}
TEXT_EXTENSIONS = {"txt", "json"}
MAX_TEXT_BYTES = 1 << 20
PARQUET_ROWS = 64
LAYOUT = "*.tar (webdataset), or *.parquet with images, or folders of images with .txt or .json beside them"


class _Member(NamedTuple):
    """A file: its name with folders, where it lies, and its content if it is a text."""

    name: str
    source: ImageSource
    text: str = ""


@dataclass
class _Sample:
    name: str
    image: ImageSource | None = None
    texts: dict[str, str] = field(default_factory=dict)  # by extension: txt, json
    problem: str = ""  # why nobody can say what belongs together


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
            captions, entries = _captions(sample, caption_key)
            if sample.problem:
                yield split, Skipped(sample.name, sample.problem)
            elif sample.image is None:
                yield split, Skipped(sample.name, "no image")
            elif not captions:
                yield split, Skipped(sample.name + entries, "no caption")
            else:
                yield split, caption_row(sample.image, captions, os.path.basename(sample.name), split)

    with Conversion(dataset_root, f"{name}_webdataset", num_workers) as conversion:
        conversion.write(tables, rows)
    return conversion.report


def _captions(sample: _Sample, caption_key: str | None) -> tuple[list[str], str]:
    """The captions; and what there is to choose from, where they are looked for in a .json."""
    value: Any = sample.texts.get("txt")
    entries = ""
    if "json" in sample.texts and (value is None or caption_key is not None):
        try:
            record = json.loads(sample.texts["json"])
        except (ValueError, RecursionError):
            return [], " (its .json is damaged)"
        value = record.get(caption_key or "caption") if isinstance(record, dict) else None
        entries = f" (its .json has {', '.join(record)[:200]})" if isinstance(record, dict) else ""
    values = value if isinstance(value, list) else [value]
    return [each.strip() for each in values if isinstance(each, str) and each.strip()], entries


def _sample_reader(root: str, caption_key: str | None) -> Callable[[], Iterator[_Sample]]:
    """What iterates over the samples, according to the files that are there."""
    paths = [os.path.join(folder, name) for folder, names in walk(root) for name in names]
    paths.sort()
    tars = [path for path in paths if path.endswith(".tar")]
    tables = [path for path in paths if path.endswith(".parquet") and _image_column(path)]
    if tars:
        return lambda: (sample for path in tars for sample in _tar_samples(path))
    if tables:
        return lambda: (sample for path in tables for sample in _parquet_samples(path, caption_key))
    if not any(_extension(path) in IMAGE_EXTENSIONS for path in paths):
        found = f"; there are {len(paths):,} other files, such as {paths[0]}" if paths else ""
        raise VLMoError(f"{root}: no samples{found}. Expected there: {LAYOUT}")
    return lambda: _file_samples(paths)


# --- which files are a sample -----------------------------------------------------------------------------------------


def _extension(path: str) -> str:
    return os.path.basename(path).partition(".")[2].rpartition(".")[2].lower()


def _key(path: str) -> str:
    """The name up to the first dot, as webdataset has it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.partition(".")[0])


def _stem(path: str) -> str:
    """The name without the endings that are known: a dot before them belongs to the name, as in 1.2.840.jpg."""
    folder, name = os.path.split(path)
    while _extension(name) in IMAGE_EXTENSIONS | TEXT_EXTENSIONS:
        name = name.rpartition(".")[0]
    return os.path.join(folder, name)


def _samples(folder: str, key: str, members: list[_Member]) -> list[_Sample]:
    """One sample; if two files claim the same place in it, those of the whole names, if these make any."""
    sample = _put_together(f"{folder}/{key}", members)
    if not sample.problem:
        return [sample]
    named = groupby(sorted(members, key=lambda member: _stem(member.name)), lambda member: _stem(member.name))
    apart = [_put_together(f"{folder}/{stem}", group) for stem, group in named]
    return apart if any(each.image is not None and each.texts and not each.problem for each in apart) else [sample]


def _put_together(name: str, members: Iterable[_Member]) -> _Sample:
    sample = _Sample(name)
    for member in members:
        extension = _extension(member.name)
        if extension in IMAGE_EXTENSIONS:
            sample.problem = "several images in one sample" if sample.image is not None else sample.problem
            sample.image = member.source
        elif extension in TEXT_EXTENSIONS:
            sample.problem = "several texts in one sample" if extension in sample.texts else sample.problem
            sample.texts[extension] = member.text
    return sample


# --- where they lie ---------------------------------------------------------------------------------------------------


def _file_samples(paths: Iterable[str]) -> Iterator[_Sample]:
    for stem, files in groupby(sorted(paths, key=_stem), _stem):
        sample = _put_together(stem, map(_file_member, files))
        if sample.image is not None or "txt" in sample.texts:  # img2dataset also writes 00000_stats.json
            yield sample


def _file_member(path: str) -> _Member:
    if _extension(path) not in TEXT_EXTENSIONS:
        return _Member(path, path)
    with open(path, encoding="utf-8", errors="replace") as file:
        return _Member(path, path, file.read(MAX_TEXT_BYTES))


def _tar_samples(path: str) -> Iterator[_Sample]:
    """Only headers and texts are read here; an image is where its bytes lie in the tar."""
    incomplete: set[str] = set()
    try:
        with tarfile.open(path, "r:") as tar:
            for key, group in groupby(_tar_members(path, tar), lambda member: _key(member.name)):
                for sample in _samples(path, key, list(group)):
                    if sample.image is None or not sample.texts:
                        if sample.name in incomplete and not sample.problem:
                            sample.problem = "files of a sample not side by side (tar --sort=name puts them so)"
                        incomplete.add(sample.name)
                    yield sample
    except (tarfile.TarError, OSError) as error:
        raise VLMoError(f"{path}: not a complete, uncompressed tar ({error})") from error


def _tar_members(path: str, tar: tarfile.TarFile) -> Iterator[_Member]:
    for member in tar:
        if member.isfile() and not os.path.basename(member.name).startswith("._"):  # (macOS writes those)
            content = b""
            if _extension(member.name) in TEXT_EXTENSIONS:
                file = tar.extractfile(member)
                content = file.read(MAX_TEXT_BYTES) if file else b""
            source = FileSlice(path, member.offset_data, member.size)
            yield _Member(member.name, source, content.decode("utf-8", "replace"))
        tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise


def _image_column(path: str) -> str | None:
    """The column of encoded images: bytes, or as Hugging Face's data sets have them, a struct with `bytes`."""
    try:
        schema = pq.read_schema(path)
    except (OSError, ValueError) as error:
        raise VLMoError(f"{path}: not a complete parquet file ({error})") from error
    for column in schema:
        kind = column.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return column.name
        if column.name in IMAGE_EXTENSIONS | {"image"} and (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            return column.name
    return None


def _parquet_samples(path: str, caption_key: str | None) -> Iterator[_Sample]:
    image_column, caption = _image_column(path), caption_key or "caption"
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if caption not in names:
            raise VLMoError(f"{path}: has no column {caption!r} (it has {', '.join(names)}); name it with caption_key")
        columns = [name for name in (image_column, caption, "key") if name in names]
        for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
            for number, row in enumerate(batch.to_pylist()):
                image = row.pop(image_column)
                image = image.get("bytes") if isinstance(image, dict) else image
                texts = {"json": json.dumps(row, default=str)}
                yield _Sample(f"{path}/{row.get('key', number)}", image if isinstance(image, bytes) else None, texts)
