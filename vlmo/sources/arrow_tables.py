"""Arrow tables as one sequence of samples, memory mapped: nothing of the length of the data is held in memory.

A row holds one image (or pair of images) and a list of texts; a sample is one text with its row. Where a sample lies is
found by two binary searches: over the starts of the record batches (small arrays, kept), then over the offsets that the
Arrow list column itself stores (in the mapped file). Values are sliced out of the map without copying.

Arrow follows the offsets of a damaged or hostile file wherever they lead. All of a file is too much to check when a run
starts (150 million texts), so the offsets of each row are checked when it is read.
"""

import errno
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from vlmo.errors import VLMoError


def open_table(path: str | Path) -> pa.RecordBatchFileReader:
    """Maps an Arrow file (IPC file format).

    Raises:
        VLMoError: if it is missing, truncated or no Arrow file, or the system does not open it.
    """
    try:
        # no threads: worker processes are forked, and one record batch is all that is read at a time. The map as a
        # buffer: it holds no file open, and of a file pyarrow has the system read ahead at each record batch, which
        # takes 0.1 ms a sample
        mapped = pa.memory_map(str(path)).read_buffer()
        return pa.ipc.open_file(mapped, options=pa.ipc.IpcReadOptions(use_threads=False))
    except FileNotFoundError:
        raise VLMoError(f"{path}: is missing") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise VLMoError(f"{path}: {_what_else(Path(path)) or _why_unreadable(error)}") from error


def _what_else(path: Path) -> str:
    """What a file is that is no Arrow file, and how it becomes one; "" if it can be a damaged one."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:
        return ""
    if start == b"\xff\xff\xff\xff":  # as Hugging Face's `datasets` writes
        return (
            "is an Arrow stream, not a file; rewrite it: t = pyarrow.ipc.open_stream(OLD).read_all(), then "
            "pyarrow.ipc.new_file(NEW, t.schema).write_table(t)"
        )
    others = {b"PAR1": "Parquet", b"FEA1": "Feather version 1"}
    return f"is {others[start]}, not Arrow; convert it (DATA.md)" if start in others else ""


def _why_unreadable(error: Exception, damage: str = "is not a complete Arrow file") -> str:
    """What is wrong, and the remedy: `damage` only where it is not the system that refuses to read the file."""
    number = getattr(error, "errno", None)
    if number in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"cannot be opened, no more than {limit} files may be open at once: raise that, such as ulimit -n 65536"
    if number:
        return f"cannot be read ({os.strerror(number)}); the file itself may be whole"
    return f"{damage} ({error}); make it again"


class RowLocation(NamedTuple):
    """Where a sample is stored."""

    record: pa.RecordBatch
    row: int  # in `record`
    item: int  # in the row's list
    table: int  # number of the file
    image: int  # row over all files

    path: Path  # of the file

    def scalar(self, column: str) -> pa.Scalar:
        """The row's value. Raises VLMoError if the file is damaged there."""
        array = self.record.column(column)
        try:
            check_range(array, self.row, self.row + 1)
        except pa.ArrowInvalid as error:
            raise VLMoError(f"{self.path}: is damaged ({column}, row {self.row}: {error}); make it again") from error
        return array[self.row]

    def list_item(self, column: str) -> Any:
        """The sample's own entry of a list column; None if the column is absent or the row's list is shorter.

        Raises:
            VLMoError: if the file is damaged there.
        """
        if self.record.schema.get_field_index(column) < 0:
            return None
        values = self.scalar(column)
        return self._decoded(column, values[self.item]) if values.is_valid and self.item < len(values) else None

    def text(self, column: str) -> str:
        """The row's string. Raises VLMoError if the file is damaged there."""
        return self._decoded(column, self.scalar(column))

    def _decoded(self, column: str, value: pa.Scalar) -> Any:
        try:
            return value.as_py()
        except UnicodeDecodeError as error:
            raise VLMoError(f"{self.path}: is damaged ({column}, row {self.row}: {error}); make it again") from error


class Tables(Protocol):
    """What data sets are made of: rows with an image and a list of texts."""

    @property
    def paths(self) -> Sequence[PurePath]: ...

    @property
    def num_rows(self) -> int: ...

    @property
    def num_texts(self) -> int: ...

    def text(self, index: int) -> Any:
        """Locates text number `index`, as a `RowLocation` or what can be asked the same."""

    def row(self, index: int) -> Any:
        """Locates row number `index`."""


def open_tables(data: "Sequence[str | Path] | Tables", text_column: str | None) -> Any:
    """The tables of Arrow files; those of a source are open. Raises VLMoError if a file cannot be read."""
    return ArrowTables(data, text_column) if isinstance(data, Sequence) else data


class ArrowTables:
    """Rows and texts of several Arrow files, numbered through.

    Safe to send to worker processes: only paths and the starts of the record batches travel, files are mapped again
    when first read.
    """

    def __init__(self, paths: Sequence[str | Path], text_column: str | None):
        """
        Args:
            paths: files, in this order.
            text_column: list column whose entries are counted as samples; None: each row is one.

        Raises:
            VLMoError: if a file cannot be read or lacks the column.
        """
        self.paths = [Path(path) for path in paths]
        self.text_column = text_column
        counts = [entry for table in range(len(paths)) for entry in self._count(table)]
        table, number, rows, texts = np.array(counts, np.int64).reshape(-1, 4).T
        self._table, self._number = table.copy(), number.copy()  # of each record batch: its file, its number in it
        self._row_starts = np.concatenate([[0], np.cumsum(rows)])
        self._text_starts = np.concatenate([[0], np.cumsum(texts)])
        self._readers: dict[int, pa.RecordBatchFileReader] = {}

    def _count(self, table: int) -> list[tuple[int, int, int, int]]:
        """(file, number in it, rows, texts) of each record batch that has rows; the map is given back afterwards."""
        path = self.paths[table]
        reader = open_table(path)
        if self.text_column is not None and self.text_column not in reader.schema.names:
            raise VLMoError(f"{path}: has no column {self.text_column!r}")
        counts = []
        try:
            for number in range(reader.num_record_batches):
                record = reader.get_batch(number)
                record.validate()  # (cheap: sizes and ends of the offsets)
                if record.num_rows:  # (an empty table written by pandas has columns of type null)
                    texts = record.num_rows
                    if self.text_column is not None:
                        offsets = _offsets(record, self.text_column)
                        texts = int(offsets[-1]) - int(offsets[0])
                    counts.append((table, number, record.num_rows, texts))
        except (pa.ArrowInvalid, OSError) as error:
            raise VLMoError(f"{path}: {_why_unreadable(error, 'is damaged')}") from error
        return counts

    @property
    def num_rows(self) -> int:
        return int(self._row_starts[-1])

    @property
    def num_texts(self) -> int:
        return int(self._text_starts[-1])

    def text(self, index: int) -> RowLocation:
        """Locates text number `index`.

        Raises:
            IndexError: outside [0, num_texts).
            VLMoError: if the file is damaged there.
        """
        if self.text_column is None:
            return self.row(index)
        batch, local = _find(self._text_starts, index)
        record = self._record(batch)
        offsets = _offsets(record, self.text_column)
        # a key of the offsets' own type: another would make numpy convert (copy) all of them
        position = offsets.dtype.type(local + int(offsets[0]))
        row = int(np.searchsorted(offsets, position, side="right")) - 1  # rows without texts are passed over
        item = int(position - offsets[row])
        table = int(self._table[batch])
        if not 0 <= row < record.num_rows or item < 0:
            raise VLMoError(f"{self.paths[table]}: is damaged (the offsets of its texts); make it again")
        return RowLocation(record, row, item, table, int(self._row_starts[batch]) + row, self.paths[table])

    def text_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Bytes of the texts number `indices` (N,), int64 (N,): read from the offsets of the texts, not the texts."""
        assert self.text_column is not None
        sizes = np.zeros(len(indices), np.int64)
        for batch, chosen in _groups(np.searchsorted(self._text_starts, indices, side="right") - 1):
            record = self._record(batch)
            texts = record.column(self.text_column).values
            if len(texts) and is_text(texts.type):
                positions = indices[chosen] - self._text_starts[batch] + int(_offsets(record, self.text_column)[0])
                starts = _byte_offsets(texts)
                sizes[chosen] = starts[positions + 1] - starts[positions]
        return sizes

    def row(self, index: int) -> RowLocation:
        """Locates row number `index`, at its first text.

        Raises:
            IndexError: outside [0, num_rows).
        """
        batch, row = _find(self._row_starts, index)
        table = int(self._table[batch])
        return RowLocation(self._record(batch), row, 0, table, index, self.paths[table])

    def _record(self, batch: int) -> pa.RecordBatch:
        # nothing is cached: a record batch is a view into the map that takes some microseconds to make
        table = int(self._table[batch])
        if table not in self._readers:
            self._readers[table] = open_table(self.paths[table])
        return self._readers[table].get_batch(int(self._number[batch]))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}}


def _offsets(record: pa.RecordBatch, column: str) -> np.ndarray:
    """(rows + 1,) where each row's list begins among the values: a view into the mapped file."""
    return record.column(column).offsets.to_numpy()


def _byte_offsets(texts: pa.Array) -> np.ndarray:
    """(texts + 1,) where each text begins among the bytes: a view into the mapped file (pyarrow has none to give)."""
    width = np.int64 if pa.types.is_large_string(texts.type) else np.int32
    return np.frombuffer(texts.buffers()[1], width)[texts.offset :]


def _groups(keys: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Each of the keys (N,), and where it stands; by one sort, however many there are."""
    order = np.argsort(keys, kind="stable")
    distinct, starts = np.unique(keys[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, starts[1:]), strict=False)  # (of no key numpy makes one part)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _find(starts: np.ndarray, index: int) -> tuple[int, int]:
    """The part that `index` falls in, and the index within it."""
    if not 0 <= index < starts[-1]:
        raise IndexError(f"{index} is outside the {starts[-1]} entries")
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, int(index - starts[part])


def flat_columns(path: Path, *columns: str) -> Iterator[list[pa.Array]]:
    """The innermost values of nested list columns of a file, a record batch at a time.

    Raises:
        VLMoError: if the file is damaged.
    """
    reader = open_table(path)
    for number in range(reader.num_record_batches):
        record = reader.get_batch(number)
        arrays = [record.column(column) for column in columns]
        try:
            for array in arrays:
                array.validate(full=True)  # all of it will be read
        except pa.ArrowInvalid as error:
            raise VLMoError(f"{path}: is damaged ({error}); make it again") from error
        while any(is_list(array.type) for array in arrays):
            arrays = [array.flatten() for array in arrays]
        if not any(pa.types.is_null(array.type) for array in arrays):  # (every list is empty)
            yield arrays


def is_list(kind: pa.DataType) -> bool:
    return kind.id in LISTS


# --- checks of offsets ------------------------------------------------------------------------------------------------

LISTS = (pa.list_(pa.null()).id, pa.large_list(pa.null()).id)
OFFSETS = {kind.id: np.dtype(np.int32) for kind in (pa.string(), pa.binary(), pa.list_(pa.null()))}
OFFSETS |= {kind.id: np.dtype(np.int64) for kind in (pa.large_string(), pa.large_binary(), pa.large_list(pa.null()))}


def check_range(array: pa.Array, start: int, stop: int) -> None:
    """Makes sure that the values in [start, stop) can be read, those of nested lists too.

    Raises:
        pa.ArrowInvalid: if they lie outside of what the array has.
    """
    kind = array.type
    if is_list(kind):
        first, last = _bounds(array, start, stop, len(array.values))
        check_range(array.values, first, last)
    elif kind.id in OFFSETS:
        _bounds(array, start, stop, _size(array))
    elif not pa.types.is_primitive(kind) and not pa.types.is_null(kind):
        array.slice(start, stop - start).validate(full=True)  # (kinds that no converter writes)


def _size(array: pa.Array) -> int:
    """Bytes of the values."""
    data = array.buffers()[2]
    return data.size if data is not None else 0


def _bounds(array: pa.Array, start: int, stop: int, size: int) -> tuple[int, int]:
    """Where the values of [start, stop) begin and end, if that is within `size` and none ends before it begins."""
    buffer = array.buffers()[1]
    if start == stop or buffer is None:
        return 0, 0
    width = OFFSETS[array.type.id]
    start_byte = (array.offset + start) * width.itemsize
    number = stop - start + 1
    if start_byte + number * width.itemsize > buffer.size:
        raise pa.ArrowInvalid("the offsets end before the rows do")
    offsets = np.frombuffer(buffer, width, number, start_byte)
    if offsets[0] < 0 or offsets[-1] > size or (offsets[1:] < offsets[:-1]).any():
        raise pa.ArrowInvalid("the offsets lead out of the data")
    return int(offsets[0]), int(offsets[-1])
