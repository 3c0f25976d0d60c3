"""Rows with images -> Arrow record batches of bounded size."""

import pickle
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
    kept: dict[str, list[Any]] = {column.name: [] for column in schema}
    size = 0
    for row in rows:
        found = {}
        try:
            for name, source in row.images.items():
                found[name] = read_image(source)
        except ImageProblem as problem:
            skipped.append(Skipped(describe(source), str(problem)))
            continue
        for name, values in kept.items():
            values.append(found[name] if name in found else row.columns[name])
        size += sum(map(len, found.values()))
        if size >= BATCH_BYTES:
            yield make_batch(kept, schema)
            kept, size = {name: [] for name in kept}, 0
    if kept[schema.names[0]]:
        yield make_batch(kept, schema)


def convert_chunk(rows_path: str, schema: pa.Schema, path: str) -> list[Skipped]:
    """In a worker: the rows that lie in a file of the scratch folder -> record batches of a stream, in another one.

    Through files, because a pipe is slow; can be called again with the same result. Returns what was left out.
    """
    with open(rows_path, "rb") as file:
        rows = pickle.load(file)  # written by the process that started this one, where nobody else writes
    skipped: list[Skipped] = []
    with pa.ipc.new_stream(path, schema) as writer:
        for batch in read_batches(rows, schema, skipped):
            writer.write_batch(batch)
    return skipped
