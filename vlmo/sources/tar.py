"""Tars of images with captions, as webdataset and img2dataset write them, read in place."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from vlmo.registry import SOURCES
from vlmo.sources.grouping import (
    MAX_TEXT_BYTES,
    TEXT_EXTENSIONS,
    Member,
    Sample,
    captions,
    decode,
    extension,
    group_side_by_side,
    text_file,
)
from vlmo.sources.index import Contents, number_texts
from vlmo.sources.options import SourceOptions
from vlmo.sources.remote import BLOCK_BYTES, RemoteFile
from vlmo.sources.storage import ReadableFile, find, open_file
from vlmo.sources.tables import Format
from vlmo.sources.tar_members import BLOCK, TarMember, TarWalk

KINDS = ("", "txt", "json")  # of files with captions, by their number in an index
LARGEST = 2**32 - 1  # bytes of an image


class Tars(Format):
    """`tar:/data/cc3m/{00000..00331}.tar`"""

    endings = (".tar",)

    def files(self, location: str, split: str, options: SourceOptions) -> list[str]:
        return find(location, self.endings, options)

    def index(self, path: str, identity: Mapping[str, Any], options: SourceOptions) -> Contents:
        return _Indexing(path, open_file(path, identity, options), options.text_column or None).contents()

    def open(
        self, path: str, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], options: SourceOptions
    ) -> "TarReader":
        return TarReader(open_file(path, header["of"], options), arrays, options.text_column or None)


class TarReader:
    """A tar with its index: for each row, where its image and its text lie, in blocks of 512 bytes and in bytes."""

    def __init__(self, file: ReadableFile, arrays: Mapping[str, np.ndarray], text_column: str | None) -> None:
        self.file, self.arrays, self.text_column = file, arrays, text_column

    def image(self, row: int) -> pa.Scalar:
        return pa.scalar(self.file.read(*self._place("image", row)), pa.large_binary())

    def texts(self, row: int) -> list[str]:
        kind = KINDS[self.arrays["text_kind"][row]]
        content = self.file.read(*self._place("text", row)) if kind else b""
        return captions({kind: decode(content)}, self.text_column)[0]

    def units(self, rows: np.ndarray) -> np.ndarray:
        """Of a remote tar: the blocks that are fetched."""
        places = []
        for what in ("image", "text"):
            start = self.arrays[f"{what}_block"][rows].astype(np.int64) * BLOCK
            last = start + np.maximum(self.arrays[f"{what}_size"][rows].astype(np.int64), 1) - 1
            places += [start // BLOCK_BYTES, last // BLOCK_BYTES]
        return np.unique(np.concatenate(places))

    def fetch(self, unit: int) -> None:
        if isinstance(self.file, RemoteFile):
            self.file.fetch(unit)

    def _place(self, what: str, row: int) -> tuple[int, int]:
        return int(self.arrays[f"{what}_block"][row]) * BLOCK, int(self.arrays[f"{what}_size"][row])


class _Indexing:
    """One pass over the headers and texts of a tar."""

    def __init__(self, path: str, file: ReadableFile, text_column: str | None) -> None:
        self.file, self.text_column = file, text_column
        self.walk = TarWalk(path, file.read, file.size)
        self.name = path.rpartition("/")[2]
        self.left_out: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.example = ""

    def contents(self) -> Contents:
        """Raises VLMoError if the tar is damaged."""
        rows: list[tuple[int, ...]] = []  # image, text (each offset and size), kind of text
        alone: list[tuple[int, ...]] = []
        counts: list[int] = []
        names: set[str] = set()
        for sample in group_side_by_side(self.name, self._members()):
            found = self._captions(sample)
            if sample.image is None or sample.problem:
                continue
            kind = text_file(sample.texts, self.text_column) if found else ""
            text = sample.places[kind] if found else TarMember("", 0, 0)
            (rows if found else alone).append((*sample.image[1:], *text[1:], KINDS.index(kind)))
            counts += [len(found)] if found else []
            self.notes["samples have the name of another in their tar; both are taken"] += sample.name in names
            names.add(sample.name)
        if not self.walk.has_end:
            self.notes["tars have no end mark: they may be cut off between two samples"] += 1
        every = np.array(rows + alone, np.int64).reshape(-1, 5)
        arrays: dict[str, np.ndarray] = {
            "image_block": (every[:, 0] // BLOCK).astype(np.uint32),
            "image_size": every[:, 1].astype(np.uint32),
            "text_block": (every[:, 2] // BLOCK).astype(np.uint32),
            "text_size": every[:, 3].astype(np.uint32),
            "text_kind": every[:, 4].astype(np.uint8),
        }
        contents = Contents(len(every), example=self.example, arrays=arrays)
        contents.left_out, contents.notes = dict(self.left_out), dict(+self.notes)
        number_texts(contents, counts)
        return contents

    def _members(self) -> Iterator[Member]:
        for member in self.walk:
            name = member.name.rpartition("/")[2]
            if name.startswith("._"):  # (macOS writes those)
                continue
            text = ""
            if extension(name) in TEXT_EXTENSIONS:
                member = member._replace(size=min(member.size, MAX_TEXT_BYTES))
                text = decode(self.file.read(*member[1:]))
            yield Member(member.name, member, text)

    def _captions(self, sample: Sample) -> list[str]:
        """The captions of a sample; counts it where it has none, or no image."""
        found, entries = captions(sample.texts, self.text_column)
        reason = sample.problem
        if not reason and (sample.image is None or not 0 < sample.image.size <= LARGEST):
            reason = "no image" if sample.image is None else "empty or too large image"
            sample.image = None
        if not reason and not found:
            reason = "no caption"
        if reason:
            self.left_out[reason] += 1
            self.example = self.example or f"{sample.name}{entries if not found else ''}: {reason}"
        elif "\ufffd" in "".join(found):
            self.notes["captions are no UTF-8: what cannot be read in them is read as \ufffd"] += 1
        return found


SOURCES.register("tar")(Tars())
