"""Rows with images -> Arrow record batches of bounded size."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pyarrow as pa

from vlmo.utils.raw_images import ImageProblem, ImageSource, describe, read_image

BATCH_BYTES = 32 << 20  # image bytes after which a record batch is closed


class Row(NamedTuple):
    """One row: its columns without images, and for each image column where the encoded image lies."""

    columns: dict[str, Any]
    images: dict[str, ImageSource]


class Skipped(NamedTuple):
    """What is left out, and why (one of few reasons: they are counted)."""

    name: str
    reason: str


def make_batch(columns: Mapping[str, Any], schema: pa.Schema) -> pa.RecordBatch:
    """Of lists or Arrow arrays; what UTF-8 cannot hold (half surrogates from JSON escapes) becomes "?"."""
    return pa.record_batch([_array(columns[column.name], column.type) for column in schema], schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    try:
        return pa.array(values, kind)
    except UnicodeEncodeError:
        return pa.array(_encodable(values), kind)


def _encodable(value: Any) -> Any:
    if isinstance(value, list):
        return [_encodable(each) for each in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def read_batches(rows: list[Row], schema: pa.Schema, skipped: list[Skipped]) -> Iterator[pa.RecordBatch]:
    """Reads the images of a chunk of rows; a row with an unreadable image goes to `skipped` instead."""
    for kept, images in read_images([row.images for row in rows], skipped):
        yield make_batch(columns_of(rows, kept) | images, schema)


def columns_of(rows: list[Row], kept: list[int]) -> dict[str, Any]:
    """The columns without images of the rows number `kept`."""
    return {name: [rows[number].columns[name] for number in kept] for name in rows[0].columns}


def read_images(
    sources: list[dict[str, ImageSource]], skipped: list[Skipped]
) -> Iterator[tuple[list[int], dict[str, list[bytes]]]]:
    """For groups of bounded size: the numbers of the rows whose images can be read, and the images by column."""
    kept: list[int] = []
    images: dict[str, list[bytes]] = {name: [] for name in sources[0]}
    size = 0
    for number, columns in enumerate(sources):
        found = {}
        try:
            for name, source in columns.items():
                found[name] = read_image(source)
        except ImageProblem as problem:
            skipped.append(Skipped(describe(source), str(problem)))
            continue
        kept.append(number)
        for name, image in found.items():
            images[name].append(image)
            size += len(image)
        if size >= BATCH_BYTES:
            yield kept, images
            kept, images, size = [], {name: [] for name in sources[0]}, 0
    if kept:
        yield kept, images


def write_images(
    sources: list[dict[str, ImageSource]], schema: pa.Schema, path: str
) -> tuple[list[list[int]], list[Skipped]]:
    """In a worker: writes the groups of `read_images` as record batches of a stream, and returns their row numbers.

    Only what the images need travels to the worker, and they come back through a file in the scratch folder: both
    because a pipe is slow.
    """
    groups: list[list[int]] = []
    skipped: list[Skipped] = []
    with pa.ipc.new_stream(path, schema) as writer:
        for kept, images in read_images(sources, skipped):
            writer.write_batch(make_batch(images, schema))
            groups.append(kept)
    return groups, skipped
