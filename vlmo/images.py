"""Encoded images: which formats are read, and how their bytes become RGB, by one set of rules."""

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import xxhash
from PIL import Image, ImageOps

try:
    from PIL import AvifImagePlugin

    AVIF = AvifImagePlugin.SUPPORTED
except ImportError:  # (Pillow before 11.3)
    AVIF = False

# None whose reading starts another program, as EPS does.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM") + (("AVIF",) if AVIF else ())
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm") + ((".avif",) if AVIF else ())

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # of a PNG; the others are about it

ORIENTATION = 0x0112  # EXIF tag
SMALLEST_SIDE = 64  # pixels, of what simplejpeg decodes
LYING = range(5, 9)  # its values of images whose width is their height when upright

ChooseScale = Callable[[tuple[int, int]], int]


class UndecodableImage(Exception):
    """The bytes are no image that can be read; the message says why."""


def image_key(data: Any) -> int:
    """Gives a signed 64-bit number by which equal encoded images are known, in whatever file and data set they lie.

    (Two different images of a batch of 1,024 meet once in 10^13 batches.)

    Args:
        data: encoded image: bytes, memoryview or `pyarrow.Buffer`.
    """
    return int.from_bytes(xxhash.xxh3_64_digest(data), "little", signed=True)


def decode_image(data: Any, decoding: str = "correct") -> Image.Image:
    """Decodes an image to mode RGB.

    - RGB, grey, black-and-white, CMYK, YCbCr and palette images: Pillow's plain conversion, as published.
    - Transparency (alpha channel or transparent colour) is laid over white.
    - More than 8 bits of grey: the high byte of 16 bits; values that never exceed 255 are taken as they are; floats
      within [0, 1] are scaled to 255.
    - An EXIF orientation is applied, so that the image is upright as people see it; damaged EXIF is ignored.
    - Of several frames the first is taken.
    - Truncated images, unknown formats and images beyond Pillow's limit (twice `PIL.Image.MAX_IMAGE_PIXELS`, 179
      million pixels) are refused.

    Args:
        data: encoded image: bytes, memoryview or `pyarrow.Buffer`; None is refused.
        decoding: "original" is Pillow's plain conversion for all images, whose EXIF orientation and transparency are
            passed over and whose 16-bit grey is clipped: what the released weights were trained on.

    Raises:
        UndecodableImage: with the reason.
    """
    return _decode(data, decoding)


def decode_at_scale(data: Any, decoding: str, choose_scale: ChooseScale) -> np.ndarray | Image.Image:
    """Decodes a JPEG at 1/k of its size to pixels (H, W, 3); an image of another format as `decode_image` does.

    The pixels are those of the lower frequencies of each block of 8 x 8 alone.

    Args:
        choose_scale: called with the (width, height) of a JPEG, as it will be upright, before it is decoded; gives k of
            1, 2, 4 and 8. The sides are rounded up.

    Raises:
        UndecodableImage: with the reason.
    """
    opened = _open_jpeg(data)
    if opened is None:
        return decode_image(data, decoding)
    turned = 1 if decoding == "original" else _orientation(opened)
    scale = choose_scale(opened.size[::-1] if turned in LYING else opened.size)
    pixels = _by_turbojpeg(data, opened, scale) if turned == 1 else None
    return np.asarray(_decode(data, decoding, scale)) if pixels is None else pixels


def _decode(data: Any, decoding: str, scale: int = 1) -> Image.Image:
    with warnings.catch_warnings():
        # large but within the limit, odd EXIF, palette with transparency: the rules above cover them
        warnings.simplefilter("ignore")
        image = _load(data, scale)
        try:
            return to_rgb(image, decoding)
        except (ValueError, OSError, MemoryError) as error:  # not every error: a mistake in here is no broken image
            raise UndecodableImage(f"{type(error).__name__}: {error}") from error


def _load(data: Any, scale: int) -> Image.Image:
    if data is None:
        raise UndecodableImage("there is no image")
    try:
        return _open(data, scale)
    except Exception as error:  # Pillow's plugins raise almost anything on damaged bytes (struct.error, KeyError, ...)
        with suppress(Exception):
            if pixels := without_metadata(data):
                return _open(pixels)
        text = "unknown or damaged format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise UndecodableImage(f"{type(error).__name__}: {text}") from error


def _open(data: Any, scale: int = 1) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if scale > 1:
        image.draft(image.mode, (image.width // scale, image.height // scale))
    image.load()
    return image


def _open_jpeg(data: Any) -> Image.Image | None:
    """Reads the header of a JPEG; None for another format, and for what cannot be opened."""
    with warnings.catch_warnings(), suppress(Exception):  # (Pillow's plugins: see `_load`, which says what is wrong)
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        return image if image.format in ("JPEG", "MPO") else None
    return None


def _by_turbojpeg(data: Any, opened: Image.Image, scale: int) -> np.ndarray | None:
    """The pixels that Pillow decodes, sooner, if simplejpeg is installed; None: Pillow shall decode."""
    simplejpeg = _simplejpeg()
    # (a side of few pixels has the same length at several of its scales)
    if simplejpeg is None or opened.mode != "RGB" or min(opened.size) < SMALLEST_SIDE:
        return None
    width, height = (-(-side // scale) for side in opened.size)
    try:
        # (pyarrow calls its bytes signed, which simplejpeg refuses)
        return simplejpeg.decode_jpeg(memoryview(data).cast("B"), min_height=height, min_width=width)
    except ValueError:  # damaged: Pillow judges
        return None


@cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def to_rgb(image: Image.Image, decoding: str = "correct") -> Image.Image:
    """A decoded image of any mode by the rules above."""
    return image.convert("RGB") if decoding == "original" else _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image
    except Exception:  # as above; without its EXIF data the image is still an image
        return image


def _orientation(image: Image.Image) -> int:
    with suppress(Exception):  # as above
        return image.getexif().get(ORIENTATION, 1)
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_grey(np.asarray(image))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(values: np.ndarray) -> Image.Image:
    """(H, W) integers of more than 8 bits, or floats, to 8 bits."""
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values)
        values = values * 255 if values.max() <= 1 else values
    elif values.max() > 255:
        values = values >> 8
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def without_metadata(data: Any) -> bytes:
    """A PNG's chunks that make its pixels; nothing if it has no others, or is no PNG.

    For those that Pillow refuses because of what is said about them: texts or a colour profile above 1 MB.
    """
    data = memoryview(data)
    kept, start = [data[: len(PNG_SIGNATURE)]], len(PNG_SIGNATURE)
    if kept[0] != PNG_SIGNATURE:
        return b""
    size = start
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, kind, content, check sum
        if data[start + 4 : start + 8] in PIXEL_CHUNKS:
            kept.append(data[start:end])
            size += len(kept[-1])
        start = end
    return b"".join(kept) if size < len(data) else b""
