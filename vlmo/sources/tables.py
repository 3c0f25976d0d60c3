"""Sources as tables: rows with an image and a list of captions, numbered through as those of Arrow files are."""

import logging
import resource
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from vlmo.errors import VLMoError
from vlmo.sources.index import Contents, map_arrays, read_header
from vlmo.sources.indexing import open_indices
from vlmo.sources.options import SourceOptions
from vlmo.sources.storage import is_remote

log = logging.getLogger(__name__)


class Reader(Protocol):
    """One file of samples, open. Where reading here and there is expensive, it is read by units: blocks, row groups."""

    def image(self, row: int) -> pa.Scalar:
        """The encoded image. Raises VLMoError if the file cannot be read."""

    def texts(self, row: int) -> list[str]:
        """The captions. Raises VLMoError if the file cannot be read."""

    def units(self, rows: np.ndarray) -> np.ndarray:
        """The numbers of the units that rows lie in, each once."""

    def fetch(self, unit: int) -> None:
        """Brings a unit into the cache; any thread may ask. Raises VLMoError if it cannot be read."""


class Format:
    """A kind of source, registered in `SOURCES`: which files it has, how one is indexed, and how it is read."""

    endings: tuple[str, ...] = ()

    def files(self, location: str, split: str, options: SourceOptions) -> list[str]:
        """The files of a split, in order. Raises VLMoError if there is none."""
        raise NotImplementedError

    def reads_on(self, files: Sequence[str]) -> bool:
        """Whether reading here and there in files costs much more than reading on."""
        return bool(files) and is_remote(files[0])

    def pieces(self, rows: int, arrays: Mapping[str, np.ndarray], size: int) -> np.ndarray:
        """Where to cut the first `rows` rows of a file into pieces of about `size`: the row each piece begins with."""
        return np.arange(0, rows, size)

    def index(self, path: str, identity: Mapping[str, Any], options: SourceOptions) -> Contents:
        """Goes through a file. Raises VLMoError if it is damaged, or has not the columns."""
        raise NotImplementedError

    def open(
        self, path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], options: SourceOptions
    ) -> Reader:
        """Opens a file. Raises VLMoError if it cannot be."""
        raise NotImplementedError


class SourceLocation(NamedTuple):
    """Where a sample is stored; compare `RowLocation`."""

    tables: "SourceTables"
    row: int  # in the file
    item: int  # among the row's captions
    table: int  # number of the file
    image: int  # row over all files

    @property
    def path(self) -> PurePosixPath:
        return self.tables.paths[self.table]

    def scalar(self, column: str) -> pa.Scalar:
        """The encoded image."""
        return self.tables.reader(self.table).image(self.row)

    def list_item(self, column: str) -> Any:
        """The sample's caption; None where the row has none."""
        texts = self.tables.reader(self.table).texts(self.row)
        return texts[self.item] if self.item < len(texts) else None


def allow_open_files(number: int) -> int:
    """Raises the limit of open files, of this process and those it starts, as far as it may, to what `number` files
    of a source need, which stay open with their indices; so do those of other splits and sets.

    Returns:
        how many may be open at once.
    """
    needed = 4 * number + 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = max(soft, needed if hard == resource.RLIM_INFINITY else min(needed, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return number if soft == resource.RLIM_INFINITY or soft >= needed else max(soft // 8, 16)


class SourceTables:
    """Rows and captions of the files of a source; what `ArrowTables` are of Arrow files.

    Safe to send to worker processes: they open files and map indices themselves, when first read.
    """

    def __init__(self, format: Format, files: Sequence[str], options: SourceOptions, images_alone: bool = False):
        """
        Args:
            files: in this order.
            images_alone: each image is a row, also one without captions.

        Raises:
            VLMoError: if a file cannot be read or indexed.
        """
        self.format, self.files, self.options = format, list(files), options
        self.paths = [PurePosixPath(path) for path in files]
        self.images_alone, self.reads_on = images_alone, format.reads_on(self.files)
        found = open_indices(format.index, self.files, options)
        # (nothing of the headers is kept: whatever is, each worker copies)
        self.indices = [str(path) for path, _ in found]
        headers = [header for _, header in found]
        self._row_starts = _starts(header["images" if images_alone else "rows"] for header in headers)
        self._text_starts = _starts(header["texts"] for header in headers)
        self._summary = _summary(headers)
        self._readers: dict[int, Reader] = {}
        self._arrays: dict[int, dict[str, np.ndarray]] = {}
        self._max_open = allow_open_files(len(files))

    @property
    def num_rows(self) -> int:
        return int(self._row_starts[-1])

    @property
    def num_texts(self) -> int:
        return int(self._text_starts[-1])

    def text(self, index: int) -> SourceLocation:
        """Locates text number `index`. Raises IndexError outside [0, num_texts)."""
        table, text = _find(self._text_starts, index)
        starts = self.arrays(table).get("text_starts")
        row = text if starts is None else int(np.searchsorted(starts, starts.dtype.type(text), side="right")) - 1
        item = 0 if starts is None else text - int(starts[row])
        return SourceLocation(self, row, item, table, int(self._row_starts[table]) + row)

    def row(self, index: int) -> SourceLocation:
        """Locates row number `index`, at its first text. Raises IndexError outside [0, num_rows)."""
        table, row = _find(self._row_starts, index)
        return SourceLocation(self, row, 0, table, index)

    def arrays(self, table: int) -> dict[str, np.ndarray]:
        """The index of a file, mapped."""
        if table not in self._arrays:
            if len(self._arrays) >= self._max_open:
                del self._arrays[next(iter(self._arrays))]
            self._arrays[table] = map_arrays(Path(self.indices[table]), self._header(table))
        return self._arrays[table]

    def reader(self, table: int) -> Reader:
        """A file, open."""
        if table not in self._readers:
            if len(self._readers) >= self._max_open:
                del self._readers[next(iter(self._readers))]
            header, arrays = self._header(table), self.arrays(table)
            self._readers[table] = self.format.open(self.files[table], header, arrays, self.options)
        return self._readers[table]

    def pieces(self, size: int) -> np.ndarray:
        """Where pieces of about `size` samples begin, that are best read from one end to the other; and their end."""
        found = []
        for table in range(len(self.files)):
            rows = int(self._row_starts[table + 1] - self._row_starts[table])
            starts = self.format.pieces(rows, self.arrays(table), size)
            text_starts = self.arrays(table).get("text_starts")
            if not self.images_alone and text_starts is not None:
                starts = text_starts[starts].astype(np.int64)
            found.append(starts + (self._row_starts if self.images_alone else self._text_starts)[table])
        return np.concatenate([*found, [self.num_rows if self.images_alone else self.num_texts]])

    def units(self, indices: np.ndarray, are_rows: bool) -> list[tuple[int, int]]:
        """The files, and units of them, that the texts (or rows) number `indices` lie in."""
        starts = self._row_starts if are_rows else self._text_starts
        tables = np.searchsorted(starts, indices, side="right") - 1
        found = []
        for table in np.unique(tables).tolist():
            rows = indices[tables == table] - starts[table]
            text_starts = None if are_rows else self.arrays(table).get("text_starts")
            if text_starts is not None:
                rows = np.searchsorted(text_starts, rows.astype(text_starts.dtype), side="right") - 1
            found += [(table, unit) for unit in self.reader(table).units(rows).tolist()]
        return found

    def summary(self) -> list[str]:
        """What is not as it should be in the files, one line each kind: nothing is left out silently."""
        return self._summary

    def _header(self, table: int) -> dict[str, Any]:
        header = read_header(Path(self.indices[table]))
        if header is None:
            raise VLMoError(f"{self.indices[table]}: the index was removed or changed during the run; start it again")
        return header

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_readers": {}, "_arrays": {}}


def _find(starts: np.ndarray, index: int) -> tuple[int, int]:
    """The part that `index` falls in, and the index within it."""
    if not 0 <= index < starts[-1]:
        raise IndexError(f"{index} is outside the {starts[-1]} entries")
    part = int(np.searchsorted(starts, index, side="right")) - 1
    return part, int(index - starts[part])


def _starts(counts: Iterable[int]) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(list(counts), dtype=np.int64)])


def _summary(headers: Sequence[Mapping[str, Any]]) -> list[str]:
    left_out: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for header in headers:
        left_out.update(header["left_out"])
        notes.update(header["notes"])
    lines = []
    if left_out:
        count = left_out.total()
        reasons = ", ".join(f"{number:,} {reason}" for reason, number in left_out.items())
        example = next((header["example"] for header in headers if header["example"]), "")
        total = count + sum(header["rows"] for header in headers)
        lines.append(f"{count:,} of {total:,} samples are left out ({reasons}), such as {example}")
    return lines + [f"{number:,} {note}" for note, number in notes.items()]
