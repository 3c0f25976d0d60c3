"""Encoded images as they lie on disk: read as bytes, and checked without decoding where that suffices."""

import os
import warnings
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

from vlmo.images import open_image

MAX_IMAGE_BYTES = 256 << 20  # keeps a batch far below Arrow's 2 GiB and the memory flat
JPEG_END = b"\xff\xd9"
TAIL = 64  # bytes in which a complete JPEG has its end marker; some cameras pad the file


class FileSlice(NamedTuple):
    """`size` bytes at `offset` of a file: a member of an uncompressed tar."""

    path: str
    offset: int
    size: int


ImageSource = str | FileSlice | bytes


class ImageProblem(Exception):
    """Why an image is left out; the text is one of few reasons, so that they can be counted."""


def read_image(source: ImageSource) -> bytes:
    """The encoded image; ImageProblem if it is missing, too large or cannot be decoded."""
    data = source if isinstance(source, bytes) else _read(source)
    if not data:
        raise ImageProblem("empty file")
    _check(data)
    return data


def describe(source: ImageSource) -> str:
    """What to call the image in a list of skipped ones."""
    if isinstance(source, FileSlice):
        return f"{source.path} at byte {source.offset}"
    return source if isinstance(source, str) else f"{len(source)} bytes"


def _read(source: str | FileSlice) -> bytes:
    try:
        with open(source if isinstance(source, str) else source.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size if isinstance(source, str) else source.size
            if size > MAX_IMAGE_BYTES:
                raise ImageProblem(f"larger than {MAX_IMAGE_BYTES >> 20} MB")
            if isinstance(source, FileSlice):
                file.seek(source.offset)
            return file.read(size)
    except FileNotFoundError:
        raise ImageProblem("file not found") from None
    except OSError as error:
        raise ImageProblem(f"cannot be read ({error.strerror})") from None


def _check(data: bytes) -> None:
    """A JPEG that has its end marker is judged by its header, a PNG by its check sums; only the others are decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            open_image(data, lambda image: _look(image, data))
    except UnidentifiedImageError:
        raise ImageProblem("not an image") from None
    except Image.DecompressionBombError:
        raise ImageProblem("too many pixels") from None
    except Exception:  # Pillow's readers raise whatever a damaged file leads them to
        raise ImageProblem("damaged or truncated") from None


def _look(image: Image.Image, data: bytes) -> None:
    if image.format == "PNG":
        image.verify()
    elif image.format not in ("JPEG", "MPO") or JPEG_END not in data[-TAIL:]:
        image.load()
