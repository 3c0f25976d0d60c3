"""Images where they lie (a file, a table, a tar), each read when it is its turn."""

import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlmo.errors import VLMoError
from vlmo.images import SUFFIXES, UndecodableImage, decode_image
from vlmo.sources.arrow_tables import ArrowTables


class Picture(NamedTuple):
    """One image.

    Attributes:
        name: for people.
        read: gives the bytes of the encoded image.
        box: x, y, width, height in pixels of the part that is meant; None: all of it.
    """

    name: str
    read: Callable[[], bytes]
    box: tuple[int, int, int, int] | None = None

    def load(self, decoding: str = "correct") -> Image.Image | None:
        """Decodes it, by the rules of `decode_image`; None if it cannot be decoded."""
        try:
            image = decode_image(self.read(), decoding)
        except UndecodableImage:
            return None
        if self.box is None:
            return image
        x, y, width, height = self.box
        return image.crop((x, y, x + width, y + height))


def of_file(path: Path, box: tuple[int, int, int, int] | None = None) -> Picture:
    """Gives the image in a file."""
    return Picture(str(path), partial(_read, path), box)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise VLMoError(f"{path}: cannot be read ({error.strerror or error})") from error


def of_table(tables: ArrowTables, row: int, column: str = "image") -> Picture:
    """Gives the image of a row of Arrow tables."""
    return Picture(f"row {row} of {tables.paths[0].name}", partial(_read_row, tables, row, column))


def _read_row(tables: ArrowTables, row: int, column: str) -> bytes:
    value = tables.row(row).scalar(column)
    return value.as_buffer().to_pybytes() if value.is_valid else b""


def require_files(paths: Sequence[Path], hint: str) -> None:
    """Raises VLMoError if files are missing, naming one and saying how to get them."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise VLMoError(f"{len(missing):,} of {len(paths):,} images are missing, such as {missing[0]}. {hint}")


class TarSample(NamedTuple):
    """The files of one sample of a WebDataset tar, by their extension."""

    key: str
    files: dict[str, Picture]

    @property
    def image(self) -> Picture | None:
        return next((self.files[each] for each in self.files if f".{each}" in SUFFIXES), None)

    def text(self, extension: str) -> str | None:
        """Gives the text of the file with that extension; None if there is none."""
        return self.files[extension].read().decode("utf-8") if extension in self.files else None


def tar_samples(paths: Sequence[Path]) -> Iterator[TarSample]:
    """Gives the samples of WebDataset tars in their order: files that are alike up to the first dot of their name."""
    for path in paths:
        key: str = ""
        files: dict[str, Picture] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, _, name = member.name.rpartition("/")
                    stem, _, extension = name.partition(".")
                    if f"{folder}/{stem}" != key and files:
                        yield TarSample(key, files)
                        files = {}
                    key = f"{folder}/{stem}"
                    read = partial(_read_part, path, member.offset_data, member.size)
                    files[extension.lower()] = Picture(f"{path}:{member.name}", read)
        except (tarfile.TarError, OSError) as error:
            raise VLMoError(f"{path}: cannot be read as a tar file ({error}); copy or download it again") from error
        if files:
            yield TarSample(key, files)


def _read_part(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)
