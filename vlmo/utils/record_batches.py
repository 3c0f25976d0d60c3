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


def make_batch(columns: Mapping[str, list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    """A record batch; what UTF-8 cannot hold (half surrogates from JSON escapes) becomes "?"."""
    return pa.record_batch([_array(columns[column.name], column.type) for column in schema], schema=schema)


def _array(values: list[Any], kind: pa.DataType) -> pa.Array:
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
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    size = 0
    for row in rows:
        values = dict(row.columns)
        try:
            for column, source in row.images.items():
                values[column] = read_image(source)
                size += len(values[column])
        except ImageProblem as problem:
            skipped.append(Skipped(describe(source), str(problem)))
            continue
        for column, value in values.items():
            columns[column].append(value)
        if size >= BATCH_BYTES:
            yield make_batch(columns, schema)
            columns, size = {name: [] for name in schema.names}, 0
    if columns[schema.names[0]]:
        yield make_batch(columns, schema)


def write_chunk(key: str, rows: list[Row], schema: pa.Schema, path: str) -> tuple[str, str, list[Skipped], int]:
    """In a worker: the batches go through a file in the scratch folder, which is faster than through a pipe."""
    skipped: list[Skipped] = []
    with pa.ipc.new_stream(path, schema) as writer:
        for batch in read_batches(rows, schema, skipped):
            writer.write_batch(batch)
    return key, path, skipped, len(rows)
