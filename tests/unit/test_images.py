"""The rules by which encoded images become RGB."""

import io

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tables import encoded, picture
from vlmo.images import ORIENTATION, UndecodableImage, decode_image


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(0), "JPEG"),
        encoded(picture(1).convert("L"), "JPEG"),
        encoded(picture(2).convert("CMYK"), "JPEG"),
        encoded(picture(3).convert("P")),
        encoded(picture(4).convert("1")),
        encoded(picture(5), "BMP"),
        encoded(picture(6), "GIF"),
        encoded(picture(7), "WEBP"),
        encoded(picture(8).convert("RGBA")),  # opaque
        encoded(picture(9, size=(1, 1))),
    ],
    ids=["jpeg", "grey", "cmyk", "palette", "bitmap", "bmp", "gif", "webp", "opaque", "one-pixel"],
)
def test_ordinary_images_are_converted_plainly(data):
    image = decode_image(data)
    assert image.mode == "RGB"
    assert np.array_equal(image, Image.open(io.BytesIO(data)).convert("RGB"))


def test_transparency_is_laid_over_white():
    image = picture(0).convert("RGBA")
    image.putalpha(0)
    assert np.all(np.asarray(decode_image(encoded(image))) == 255)
    half = Image.new("LA", (2, 2), (0, 128))
    assert np.all(np.asarray(decode_image(encoded(half))) == 127)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([10] * 768)
    assert np.all(np.asarray(decode_image(encoded(palette, transparency=3))) == 255)
    colour = Image.new("RGB", (2, 2), (1, 2, 3))
    assert np.all(np.asarray(decode_image(encoded(colour, transparency=(1, 2, 3)))) == 255)


def test_deep_grey_keeps_its_high_byte():
    deep = Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    assert np.asarray(decode_image(encoded(deep)))[0, :, 0].tolist() == [0, 1, 255]
    shallow = Image.fromarray(np.array([[0, 200]], np.uint16))
    assert np.asarray(decode_image(encoded(shallow)))[0, :, 0].tolist() == [0, 200]
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32))
    assert np.asarray(decode_image(encoded(floats, "TIFF")))[0, :, 0].tolist() == [0, 127, 255, 0]


def test_orientation_is_applied():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # seen upright after a quarter turn clockwise
    data = encoded(picture(0, size=(40, 30)), exif=exif)
    assert np.array_equal(decode_image(data), picture(0, size=(40, 30)).transpose(Image.Transpose.ROTATE_270))
    assert decode_image(encoded(picture(0), "JPEG", exif=b"Exif\0\0damaged")).size == (40, 30)


def test_original_decoding_is_pillows_plain_conversion():
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = picture(0, size=(40, 30))
    assert np.array_equal(decode_image(encoded(turned, exif=exif), "original"), turned)
    clear = picture(0).convert("RGBA")
    clear.putalpha(0)
    deep = Image.fromarray(np.array([[0, 256, 65535]], np.uint16))
    for image in (clear, deep):
        plain = Image.open(io.BytesIO(encoded(image))).convert("RGB")
        assert np.array_equal(decode_image(encoded(image), "original"), plain)
        assert not np.array_equal(decode_image(encoded(image)), plain)


def test_what_cannot_be_decoded_is_refused(monkeypatch):
    jpeg = encoded(picture(0), "JPEG")
    for data in (None, b"", b"None", jpeg[:200], jpeg[: len(jpeg) * 2 // 3], encoded(picture(0))[:-40]):
        with pytest.raises(UndecodableImage):
            decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(UndecodableImage, match="DecompressionBombError"):
        decode_image(encoded(picture(0)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # above the limit, below twice the limit
    assert decode_image(encoded(picture(0))).size == (40, 30)


def test_arrow_buffers_are_taken():
    assert decode_image(pa.py_buffer(encoded(picture(0)))).size == (40, 30)


@given(st.binary(max_size=60), st.integers(0, 400), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"]))
def test_damaged_images_never_raise_anything_else(noise, position, form):
    data = encoded(picture(0), form)
    try:
        image = decode_image(data[:position] + noise + data[position + len(noise) :])
    except UndecodableImage:
        return
    assert image.mode == "RGB"
