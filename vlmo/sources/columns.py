"""Parquet files, and what Hugging Face's `datasets` saves: columns of images and captions, read in place."""

import io
import json
import mmap
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlmo.errors import VLMoError
from vlmo.registry import SOURCES
from vlmo.sources.arrow_tables import is_list, is_text
from vlmo.sources.cache import DiskCache
from vlmo.sources.chunks import Chunks, ParquetChunks, StreamChunks
from vlmo.sources.grouping import CAPTION_NAMES, IMAGE_EXTENSIONS, clean, decode
from vlmo.sources.index import Contents, number_texts
from vlmo.sources.options import SourceOptions
from vlmo.sources.storage import find, open_file
from vlmo.sources.tables import Format

OPEN_CHUNKS = 64  # that a process keeps mapped
SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "dev"), "test": ("test",)}


def image_column(schema: pa.Schema, chosen: str = "") -> str | None:
    """The column of encoded images: bytes, or as Hugging Face's data sets have them, a struct with `bytes`."""
    for column in schema:
        if _has_bytes(column.type) and (column.name == chosen if chosen else pa.types.is_struct(column.type)):
            return column.name
        if not chosen and column.name in IMAGE_EXTENSIONS | {"image"} and _has_bytes(column.type):
            return column.name
    return None


def _has_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _has_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def text_column(schema: pa.Schema, chosen: str = "") -> str | None:
    """The column of captions: texts, or lists of texts."""
    for name in [chosen] if chosen else CAPTION_NAMES:
        index = schema.get_field_index(name)
        if index >= 0 and _has_texts(schema.field(index).type):
            return name
    return None


def _has_texts(kind: pa.DataType) -> bool:
    return is_text(kind) or (is_list(kind) and is_text(kind.value_type))


def _texts(value: pa.Scalar) -> tuple[list[str], bool]:
    """The captions of a value, and whether all are UTF-8."""
    try:
        return clean(value.as_py()), True
    except UnicodeDecodeError:
        values = value.values if is_list(value.type) else [value]
        return clean([decode(each.as_buffer().to_pybytes()) for each in values if each.is_valid]), False


class Columns(Format):
    """A kind of source whose files have columns."""

    def chunks(self, path: str, identity: Mapping[str, Any], options: SourceOptions) -> Chunks:
        """Opens a file. Raises VLMoError if it is damaged."""
        raise NotImplementedError

    def reads_on(self, files: Sequence[str]) -> bool:
        """A row group of Parquet is read as a whole."""
        return any(path.endswith(".parquet") for path in files)

    def pieces(self, rows: int, arrays: Mapping[str, np.ndarray], size: int) -> np.ndarray:
        """Whole chunks. (Rows without captions stand behind the others: their last piece is of many chunks.)"""
        with_texts = len(arrays["text_starts"]) - 1 if "text_starts" in arrays else rows
        starts = np.unique(np.searchsorted(arrays["row"][:with_texts], arrays["chunk_starts"][:-1]))
        kept = [0]
        for start in starts[starts < rows].tolist():
            if start - kept[-1] >= size:
                kept.append(start)
        return np.array(kept[: rows and None], np.int64)

    def index(self, path: str, identity: Mapping[str, Any], options: SourceOptions) -> Contents:
        chunks = self.chunks(path, identity, options)
        image, text = _columns(path, chunks.schema, options)
        columns = [image, text] if text else [image]
        rows: list[int] = []
        alone: list[int] = []
        counts: list[int] = []
        left_out: Counter[str] = Counter()
        notes: Counter[str] = Counter()
        example = "" if text else f"{path.rpartition('/')[2]}: {_has(chunks.schema)}"
        number = 0
        for chunk in range(len(chunks.rows)):
            table = chunks.read(chunk, columns)
            captions = table.column(text) if text else [None] * table.num_rows
            for there, value in zip(_there(table.column(image)), captions, strict=True):
                texts, is_utf8 = _texts(value) if value is not None else ([], True)
                reason = "no image" if not there else "no caption" if not texts else ""
                left_out[reason] += bool(reason)
                example = example or (f"row {number} of {path.rpartition('/')[2]}: {reason}" if reason else "")
                if there:
                    (rows if texts else alone).append(number)
                    counts += [len(texts)] if texts else []
                    notes["captions are no UTF-8: what cannot be read in them is read as \ufffd"] += not is_utf8
                number += 1
        arrays = {"row": np.array(rows + alone, np.uint32)}
        arrays["chunk_starts"] = np.concatenate([[0], np.cumsum(chunks.rows)]).astype(np.int64)
        details = {"image": image, "text": text}
        contents = Contents(len(rows) + len(alone), example=example, details=details, arrays=arrays)
        contents.left_out, contents.notes = dict(+left_out), dict(+notes)
        number_texts(contents, counts)
        return contents


def _columns(path: str, schema: pa.Schema, options: SourceOptions) -> tuple[str, str | None]:
    """The columns of images, and of captions if there is one. Raises VLMoError if one that is named is not there."""
    image = image_column(schema, options.image_column)
    text = text_column(schema, options.text_column)
    if image is None:
        what = f"no column {options.image_column!r} of images" if options.image_column else "no column of images"
        raise VLMoError(
            f"{path}: has {what} (bytes, or a struct with bytes); {_has(schema)}; image_column=NAME names it"
        )
    if text is None and options.text_column:
        raise VLMoError(f"{path}: has no column {options.text_column!r} of texts; {_has(schema)}")
    return image, text


def _has(schema: pa.Schema) -> str:
    return f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"


def _there(images: pa.ChunkedArray) -> list[bool]:
    """Where there are bytes."""
    there: list[bool] = []
    for array in images.chunks:
        if pa.types.is_struct(array.type):
            array = array.flatten()[array.type.get_field_index("bytes")]
        there += [bool(size) for size in pc.binary_length(array).to_pylist()]
    return there


class ColumnReader:
    """A file of columns with its index: for each row, its number in the file."""

    def __init__(self, chunks: Chunks | None, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        self.chunks, self.arrays = chunks, arrays
        self.image_column, self.text_column = header["details"]["image"], header["details"]["text"]
        self.columns = [column for column in (self.image_column, self.text_column) if column]

    def image(self, row: int) -> pa.Scalar:
        value = self._value(self.image_column, row)
        return value["bytes"] if isinstance(value, pa.StructScalar) else value

    def texts(self, row: int) -> list[str]:
        return _texts(self._value(self.text_column, row))[0] if self.text_column else []

    def units(self, rows: np.ndarray) -> np.ndarray:
        """The chunks."""
        numbers = self.arrays["row"][rows].astype(np.int64)
        return np.unique(np.searchsorted(self.arrays["chunk_starts"], numbers, side="right") - 1)

    def fetch(self, unit: int) -> None:
        """Nothing: what is mapped is there."""

    def _value(self, column: str, row: int) -> pa.Scalar:
        number, starts = int(self.arrays["row"][row]), self.arrays["chunk_starts"]
        chunk = int(np.searchsorted(starts, number, side="right")) - 1
        return self.chunk(chunk).column(column)[number - int(starts[chunk])]

    def chunk(self, chunk: int) -> pa.Table:
        """The images and captions of a chunk."""
        assert self.chunks
        return self.chunks.read(chunk, self.columns)


class ParquetReader(ColumnReader):
    """Row groups are unpacked once for all processes of the node, into the cache, and mapped."""

    mapped: dict[tuple[str, int], pa.Table] = {}  # of all files of a process

    def __init__(
        self,
        open_chunks: Callable[..., ParquetChunks],
        key: str,
        cache: DiskCache,
        header: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
    ) -> None:
        """
        Args:
            open_chunks: opens the file, anew for each row group, so that several threads can read; takes its
                metadata, if they are known.
            key: tells the file from others in the cache.
        """
        super().__init__(None, header, arrays)
        self.open_chunks, self.key, self.cache = open_chunks, key, cache
        self._metadata: pq.FileMetaData | None = None

    def chunk(self, chunk: int) -> pa.Table:
        known = ParquetReader.mapped
        key = (self.key, chunk)
        table = known.pop(key, None)
        if table is None:
            if len(known) >= OPEN_CHUNKS:
                del known[next(iter(known))]
            table = self._map(chunk)
        known[key] = table  # (the last used is the last to go)
        return table

    def fetch(self, unit: int) -> None:
        self._unpack(unit).close()

    def _unpack(self, chunk: int) -> BinaryIO:
        def make() -> bytes:
            self._metadata = self._metadata or self.open_chunks().metadata
            table = self.open_chunks(self._metadata).read(chunk, self.columns)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            return sink.getvalue()

        return self.cache.open(f"{self.key} {chunk}", make)

    def _map(self, chunk: int) -> pa.Table:
        with self._unpack(chunk) as file:
            if isinstance(file, io.BytesIO):
                content = pa.py_buffer(file.getvalue())
            else:
                content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        return pa.ipc.open_file(content).read_all()


class Parquet(Columns):
    """`parquet:/data/cc12m/*.parquet`"""

    endings = (".parquet",)

    def files(self, location: str, split: str, options: SourceOptions) -> list[str]:
        return find(location, self.endings, options)

    def chunks(
        self,
        path: str,
        identity: Mapping[str, Any],
        options: SourceOptions,
        metadata: pq.FileMetaData | None = None,
    ) -> ParquetChunks:
        return ParquetChunks(path, open_file(path, identity, options), metadata)

    def open(
        self, path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], options: SourceOptions
    ) -> ColumnReader:
        cache = DiskCache(options.cache, options.cache_bytes)
        key = json.dumps([path, header["of"], header["details"]])
        return ParquetReader(partial(self.chunks, path, header["of"], options), key, cache, header, arrays)


class HuggingFace(Columns):
    """`hf:FOLDER`: what `datasets.save_to_disk` wrote, or a repository of Parquet files."""

    def files(self, location: str, split: str, options: SourceOptions) -> list[str]:
        folder = Path(location).expanduser()
        if (folder / "dataset_dict.json").is_file():
            folder = next((folder / name for name in SPLIT_NAMES[split] if (folder / name).is_dir()), folder)
        if (folder / "state.json").is_file():
            return _saved_files(folder)
        if (folder / "dataset_dict.json").is_file():
            raise VLMoError(f"{folder}: has no part {' or '.join(SPLIT_NAMES[split])}")
        found = sorted(str(path) for path in folder.rglob("*.parquet"))
        if not found:
            raise VLMoError(f"{folder}: is neither a folder of datasets.save_to_disk nor one with Parquet files")
        named = [path for path in found if os.path.basename(path).startswith(SPLIT_NAMES[split])]
        others = tuple(name for names in SPLIT_NAMES.values() for name in names)
        if not named and any(os.path.basename(path).startswith(others) for path in found):
            raise VLMoError(f"{folder}: has no files {' or '.join(f'{name}*' for name in SPLIT_NAMES[split])}")
        return named or found

    def chunks(self, path: str, identity: Mapping[str, Any], options: SourceOptions) -> Chunks:
        is_parquet = path.endswith(".parquet")
        return ParquetChunks(path, open_file(path, identity, options)) if is_parquet else StreamChunks(path)

    def open(
        self, path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], options: SourceOptions
    ) -> ColumnReader:
        if path.endswith(".parquet"):
            return SOURCES["parquet"].open(path, header, arrays, options)
        return ColumnReader(self.chunks(path, header["of"], options), header, arrays)


def _saved_files(folder: Path) -> list[str]:
    """The files of `datasets.save_to_disk`, in order."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return [str(folder / entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VLMoError(f"{folder / 'state.json'}: is damaged ({error}); save the data set anew") from error


SOURCES.register("parquet")(Parquet())
SOURCES.register("hf")(HuggingFace())
