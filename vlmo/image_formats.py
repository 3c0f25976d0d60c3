"""Formats of encoded images that are read, and how one is opened; apart, so that converters need not load torch."""

import io
from collections.abc import Callable
from typing import Any

from PIL import Image

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


def open_image(data: Any, use: Callable[[Image.Image], object]) -> Image.Image:
    """Opens an encoded image and calls `use` with it, which loads or verifies it.

    A PNG whose metadata Pillow refuses (texts or a colour profile above 1 MB, a damaged one) is opened without them.
    Raises whatever Pillow's readers raise.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        use(image)
    except Exception:
        pixels = _without_metadata(memoryview(data))
        if not pixels:
            raise
        image = Image.open(io.BytesIO(pixels), formats=("PNG",))
        use(image)
    return image


def _without_metadata(data: memoryview) -> bytes:
    """A PNG's chunks that make its pixels; nothing if it has no others, or is no PNG."""
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
