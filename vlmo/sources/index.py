"""The index of a file of samples: flat arrays in one small file beside it, which all processes map.

A file begins with `MAGIC`, the length of the header and the header (JSON); then the arrays, each at a multiple of 64
bytes. The header says of which file the index is (size, and time or ETag) and what was counted when it was made. An
index that is not of the file as it is now, or of another version of this program, counts as none.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlmo.errors import VLMoError
from vlmo.files import atomic_write

MAGIC = b"VLMOIDX1"
VERSION = 1
ALIGNMENT = 64
SUFFIX = ".index"


@dataclass
class Contents:
    """What a file of samples holds. Rows with an image and captions come first, then those with an image alone.

    Attributes:
        images, rows, texts: rows, those of them with captions, captions.
        left_out: samples in no row, or without captions, by reason.
        notes: what else was met, with its number.
        example: one that was left out, such as "00012 (its .json has url, key): no caption".
        details: what else the reader of its kind needs to know.
        arrays: what the reader of its kind needs for each row. `text_starts` (rows + 1,), where the captions of each
            begin, is there if not every row has one.
    """

    images: int = 0
    rows: int = 0
    texts: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    example: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


NAMES = {"version", "of", "bytes", *Contents.__dataclass_fields__}


def number_texts(contents: Contents, counts: list[int]) -> None:
    """Enters how many captions each row has."""
    contents.rows, contents.texts = len(counts), sum(counts)
    if contents.texts != contents.rows:
        contents.arrays["text_starts"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.uint32)


def places(path: str, columns: tuple[str, str], is_local: bool, cache: Path) -> list[Path]:
    """Where the index of a file may be, the first choice first: beside a local one, and in the cache.

    Args:
        columns: the options image_column and text_column, on which an index depends.
    """
    chosen = "".join(f".{column or 'any'}" for column in columns if any(columns)).replace("/", "_")
    name = hashlib.sha256(path.encode()).hexdigest()[:32] + chosen + SUFFIX
    return [Path(path + chosen + SUFFIX)] * is_local + [cache / "index" / name]


def write_index(path: Path, of: Mapping[str, Any], contents: Contents) -> None:
    """Writes an index, which appears whole. Raises OSError if it cannot be written.

    Args:
        of: what tells the file from another of its name; see `Storage.identity`.
    """
    header: dict[str, Any] = {"version": VERSION, "of": dict(of)}
    header |= {name: value for name, value in vars(contents).items() if name != "arrays"}
    place, layout = 0, {}
    for name, array in contents.arrays.items():
        layout[name] = [array.dtype.str, place, len(array)]
        place += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    text = json.dumps(header | {"arrays": layout, "bytes": place}).encode()
    text += b" " * (-(len(MAGIC) + 8 + len(text)) % ALIGNMENT)
    with atomic_write(path, by_several=True) as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for array in contents.arrays.values():
            file.write(array.tobytes() + bytes(-array.nbytes % ALIGNMENT))


def read_header(path: Path) -> dict[str, Any] | None:
    """The header of an index; None if there is none that is whole and of this version."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 8)
            if start[: len(MAGIC)] != MAGIC:
                return None
            length = int.from_bytes(start[len(MAGIC) :], "little")
            size = os.fstat(file.fileno()).st_size
            header = json.loads(file.read(min(length, size)))
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or not header.keys() >= NAMES or header["version"] != VERSION:
        return None
    header["start"] = len(start) + length
    return header if size == header["start"] + header["bytes"] else None


def map_arrays(path: Path, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of an index, mapped. Raises VLMoError if it is damaged."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return {
            name: np.frombuffer(mapped, np.dtype(dtype), count, header["start"] + start)
            for name, (dtype, start, count) in header["arrays"].items()
        }
    except (OSError, ValueError, TypeError) as error:
        raise VLMoError(f"{path}: is damaged ({error}); remove it, and it is made anew") from error
