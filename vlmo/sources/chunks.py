"""Files of columns as chunks of rows: the row groups of Parquet, the record batches of an Arrow stream."""

import io
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.sources.storage import ReadableFile, is_remote


class Chunks(Protocol):
    """A file whose rows are stored in chunks, each read as a whole."""

    schema: pa.Schema
    rows: list[int]  # of each chunk

    def read(self, chunk: int, columns: Sequence[str]) -> pa.Table: ...


class ParquetChunks:
    """The row groups of a Parquet file.

    Attributes:
        metadata: of its footer.
    """

    def __init__(self, path: str, file: ReadableFile, metadata: pq.FileMetaData | None = None) -> None:
        """
        Args:
            metadata: if it is known. Then nothing that is read of a remote file is kept in the cache.
        """
        read = file.read if metadata is None else file.read_once
        try:
            source = pa.PythonFile(_Stream(read, file.size), "r") if is_remote(path) else path
            self.file = pq.ParquetFile(source, metadata=metadata)
        except (pa.ArrowInvalid, OSError) as error:
            raise VLMoError(f"{path}: is no complete Parquet file ({error})") from error
        self.path, self.schema = path, self.file.schema_arrow
        self.metadata = self.file.metadata
        self.rows = [self.metadata.row_group(group).num_rows for group in range(self.metadata.num_row_groups)]

    def read(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        try:
            return self.file.read_row_group(chunk, list(columns), use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise VLMoError(f"{self.path}: row group {chunk} cannot be read ({error}); fetch the file again") from error


class StreamChunks:
    """The record batches of an Arrow stream on a local disk, mapped."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            with pa.memory_map(path) as file:
                self.schema = pa.ipc.read_schema(file)
                self.starts, self.rows = [], []
                start = file.tell()
                while (message := _next_message(file)) is not None:
                    if message.type != "record batch":
                        raise VLMoError(f"{path}: has a dictionary; save the data set anew without categories")
                    self.starts.append(start)
                    self.rows.append(pa.ipc.read_record_batch(message, self.schema).num_rows)
                    start = file.tell()
            self.map = pa.memory_map(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise VLMoError(f"{path}: is no complete Arrow stream ({error})") from error

    def read(self, chunk: int, columns: Sequence[str]) -> pa.Table:
        self.map.seek(self.starts[chunk])
        batch = pa.ipc.read_record_batch(pa.ipc.read_message(self.map), self.schema)
        return pa.Table.from_batches([batch.select(list(columns))])


def _next_message(file: Any) -> Any:
    try:
        return pa.ipc.read_message(file)
    except EOFError:
        return None


class _Stream(io.RawIOBase):
    """A file that is read by place, as one that is read from a position."""

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self.read_at, self.size, self.position = read_at, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = self.size - self.position
        content = self.read_at(self.position, left if size < 0 else min(size, left))
        self.position += len(content)
        return content
