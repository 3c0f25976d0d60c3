"""Walks the headers of a tar: what lies in it, and where (POSIX ustar and pax, GNU, and the oldest form).

Python's `tarfile` reads them too, more slowly and only from a file object; what is found is the same
(`tests/unit/datasets/test_tar_sources.py`).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from vlmo.errors import VLMoError

BLOCK = 512
REGULAR = (b"0", b"\0", b"7")
WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")  # links, devices, folders
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
MAX_NAME_BYTES = 1 << 20  # of a long name or a pax header: nobody has more, but a damaged length may say so


class TarMember(NamedTuple):
    """A file in a tar: where its content begins, and how long it is."""

    name: str
    offset: int
    size: int


class TarWalk:
    """Iterates over the regular files.

    Attributes:
        has_end: whether the mark was found with which a complete tar ends; known afterwards.
    """

    def __init__(self, path: str, read: Callable[[int, int], bytes], size: int) -> None:
        """
        Args:
            path: for messages.
            read: (offset, number of bytes) -> those bytes, fewer at the end.
            size: of the tar.
        """
        self.path, self.read, self.size = path, read, size
        self.has_end = False

    def __iter__(self) -> Iterator[TarMember]:
        """Raises VLMoError if the tar is damaged, cut off, compressed, or none."""
        offset = 0
        long_name = ""
        pax: dict[str, str] = {}
        while offset < self.size:
            header = self.read(offset, BLOCK)
            if not header.strip(b"\0") and len(header) == BLOCK:
                self.has_end = True
                return
            self._check(header, offset)
            kind, start, size = header[156:157], offset + BLOCK, _number(header[124:136])
            size = int(pax.get("size", size)) if kind not in (b"x", b"g", b"L", b"K") else size
            offset = start if kind in WITHOUT_CONTENT else start + -(-size // BLOCK) * BLOCK
            if start + size > self.size and kind not in WITHOUT_CONTENT:
                raise VLMoError(
                    f"{self.path}: is cut off: it ends in {_name(header)}, at byte {self.size:,} of at least "
                    f"{start + size:,}; fetch it again, or leave it out"
                )
            if kind in (b"x", b"L"):
                content = self.read(start, min(size, MAX_NAME_BYTES))
                if kind == b"x":
                    pax = _pax_records(content)
                else:
                    long_name = _text(content.rstrip(b"\0"))
            elif kind not in (b"g", b"K"):
                name = pax.get("path") or long_name or _name(header)
                if kind in REGULAR and not name.endswith("/"):
                    yield TarMember(name, start, size)
                long_name, pax = "", {}

    def _check(self, header: bytes, offset: int) -> None:
        if len(header) < BLOCK:
            raise VLMoError(f"{self.path}: is cut off at byte {self.size:,}; fetch it again, or leave it out")
        claimed = _number(header[148:156], -1)
        if claimed != 256 + sum(header[:148]) + sum(header[156:]):
            how = next((name for start, name in COMPRESSED.items() if header.startswith(start)), "")
            if how:
                raise VLMoError(f"{self.path}: is compressed ({how}), so nothing can be read by its place; unpack it")
            what = "is no tar" if not offset else f"is damaged at byte {offset:,}"
            raise VLMoError(f"{self.path}: {what}; fetch it again, or leave it out")


def _number(field: bytes, otherwise: int = 0) -> int:
    """Octal, or as GNU writes numbers above 8 GiB."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") - (256 ** (len(field) - 1) if field[:1] == b"\xff" else 0)
    digits = field.partition(b"\0")[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return otherwise


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].partition(b"\0")[0]):
        name = prefix + b"/" + name
    return _text(name)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _pax_records(content: bytes) -> dict[str, str]:
    """Of lines "LENGTH KEY=VALUE"."""
    records = {}
    while (head := content.partition(b" "))[1] and head[0].isdigit():
        length = int(head[0])
        name, _, value = content[len(head[0]) + 1 : length - 1].partition(b"=")
        records[_text(name)] = _text(value)
        content = content[length:] if length else b""
    return records
