"""What is taken for a readable image."""

import io

import pytest
from PIL import Image, PngImagePlugin

from tests.unit.utils.raw import image_bytes
from vlmo.images import AVIF, decode_image
from vlmo.utils import raw_images
from vlmo.utils.raw_images import FileSlice, ImageProblem, describe, read_image


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"])
def test_formats(image_format):
    data = image_bytes(3, image_format)
    assert read_image(data) == data
    with pytest.raises(ImageProblem, match="not an image|damaged or truncated"):
        read_image(data[: len(data) * 2 // 3])


def test_modes():
    for mode in ("L", "P", "CMYK", "1", "LA", "RGBA", "I;16"):
        buffer = io.BytesIO()
        Image.new(mode, (8, 8)).save(buffer, "TIFF" if mode == "CMYK" else "PNG")
        assert read_image(buffer.getvalue())


def test_a_jpeg_with_something_after_its_end_is_kept():
    assert read_image(image_bytes() + b"\0" * 1000)


def test_programs_are_not_images():
    with pytest.raises(ImageProblem, match="not an image"):
        read_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EOF\n")


def test_huge_images_and_files(monkeypatch, tmp_path):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ImageProblem, match="too many pixels"):
        read_image(image_bytes())
    monkeypatch.setattr(raw_images, "MAX_IMAGE_BYTES", 10)
    (tmp_path / "a.jpg").write_bytes(image_bytes())
    with pytest.raises(ImageProblem, match="larger than"):
        read_image(str(tmp_path / "a.jpg"))


def test_a_part_of_a_file(tmp_path):
    data = image_bytes(5)
    (tmp_path / "a.bin").write_bytes(b"123" + data + b"456")
    part = FileSlice(str(tmp_path / "a.bin"), 3, len(data))
    assert read_image(part) == data
    assert "at byte 3" in describe(part)


def test_a_folder_is_no_image(tmp_path):
    with pytest.raises(ImageProblem, match="cannot be read"):
        read_image(str(tmp_path))


@pytest.mark.parametrize("broken", [False, True])
def test_metadata_do_not_decide_about_the_pixels(broken):
    about = PngImagePlugin.PngInfo()
    about.add_itxt("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (1, 2, 3)).save(buffer, "PNG", pnginfo=about, icc_profile=bytes(1_500_000))
    data = buffer.getvalue()
    if broken:
        at = data.index(b"iTXt") + 40
        data = data[:at] + b"?" + data[at + 1 :]
    assert read_image(data) == data
    assert decode_image(data).getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(ImageProblem):
        read_image(data[:-30])


def test_avif_where_pillow_reads_it():
    if not AVIF:
        pytest.skip("this Pillow has no AVIF")
    assert read_image(image_bytes(3, "AVIF"))
