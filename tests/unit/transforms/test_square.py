import io
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vlmo import images
from vlmo.errors import VLMoError
from vlmo.images import decode_at_scale, decode_image
from vlmo.transforms import TRANSFORMS, keys_to_transforms, square
from vlmo.transforms.square import CropAtScale, RandomSquare


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize("key", TRANSFORMS)
@pytest.mark.parametrize("autocontrast", ["correct", "original"])
def test_shape_type_and_range(key, autocontrast, picture):
    [transform] = keys_to_transforms([key], 48, autocontrast)
    for _ in range(20):
        image = transform(picture)
        assert type(image) is torch.Tensor  # no subclass that would spread through the model
        assert image.shape == (3, 48, 48) and image.dtype == torch.float32 and image.is_contiguous()
        if key != "classification_randaug":  # (which fills what it erases with noise of deviation 1)
            assert -1 <= image.min() < image.max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_any_mode(mode):
    for transform in keys_to_transforms(TRANSFORMS, 16):
        assert transform(Image.new(mode, (20, 10))).shape == (3, 16, 16)


def test_white_and_black_are_plus_and_minus_one():
    [transform] = keys_to_transforms(["square_transform"], 8)
    assert (transform(Image.new("RGB", (9, 5), "white")) == 1).all()
    assert (transform(Image.new("RGB", (9, 5), "black")) == -1).all()


def test_training_transform_is_fixed_by_torchs_generator(picture):
    [transform] = keys_to_transforms(["square_transform_randaug"], 32)

    def draw(seed):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return [transform(picture) for _ in range(5)]

    np.random.seed(1)
    first = draw(7)
    np.random.seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, draw(7), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, draw(8), strict=True))


def test_evaluation_transform_draws_nothing(picture):
    [transform] = keys_to_transforms(["square_transform"], 32)
    before = torch.get_rng_state()
    assert torch.equal(transform(picture), transform(picture))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("size", [(640, 480), (90, 120), (20, 31), (48, 48), (3, 2), (1, 1)])
def test_evaluation_transform_is_torchvisions_to_the_last_bit(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    resized = v2.Resize((48, 48), v2.InterpolationMode.BICUBIC)(picture)
    published = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5)
    [transform] = keys_to_transforms(["square_transform"], 48)
    assert torch.equal(transform(picture), published)


def test_evaluation_imports_nothing_heavy():
    code = "import sys; from vlmo.transforms import square_transform; import vlmo.text, vlmo.images; "
    code += "square_transform(32); print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torchvision", "timm", "transformers", "torchmetrics", "pytorch_lightning"} & set(loaded)


def test_crop_keeps_at_least_half():
    """Red tells the column and green the row, so a crop shows where it was taken."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(100), np.arange(100)[:, None]
    crop = keys_to_transforms(["square_transform_randaug"], 32)[0].transforms[1]
    areas = []
    for _ in range(300):
        cropped = np.asarray(crop(Image.fromarray(pixels))).astype(int)
        areas.append(np.ptp(cropped[..., 0]) * np.ptp(cropped[..., 1]) / 100**2)
    assert 0.44 < min(areas) < 0.55 and max(areas) > 0.85  # a span ends at pixel centres, so it falls short


@pytest.mark.parametrize("size", [(640, 480), (90, 120), (20, 31), (3, 2), (1, 1)])
def test_crop_is_pillows_but_for_single_grey_levels(size):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
    ours, pillows = RandomSquare(48), v2.RandomResizedCrop(48, scale=(0.5, 1.0), interpolation=3)
    for seed in range(5):
        torch.manual_seed(seed)
        square = np.asarray(ours(picture)).astype(int)
        torch.manual_seed(seed)
        difference = np.abs(square - np.asarray(pillows(picture)))
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02


def test_transforms_travel_to_worker_processes(picture):
    for transform in keys_to_transforms(TRANSFORMS, 16):
        pickle.loads(pickle.dumps(transform))(picture)


def test_unknown_keys_are_all_named():
    with pytest.raises(VLMoError) as error:
        keys_to_transforms(["square_transfrom", "pixelbert_randaug", "square_transform"], 32)
    unknown, dropped = str(error.value).splitlines()
    assert "square_transfrom" in unknown and all(key in unknown for key in TRANSFORMS)
    assert "dropped" in dropped and "square" in dropped


def test_unknown_autocontrast():
    with pytest.raises(VLMoError, match="correct, original"):
        keys_to_transforms(["square_transform_randaug"], 32, "pillow")


def photo(width, height, **saved):
    """A smooth picture as the bytes of a JPEG."""
    small = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95, **saved)
    return file.getvalue()


def both(data, size=32, seed=0, decoding="correct"):
    """What the transform of training makes of an image decoded first, and decoded at scale."""
    [transform] = keys_to_transforms(["square_transform_randaug"], size)
    torch.manual_seed(seed)
    first = transform(decode_image(data, decoding))
    torch.manual_seed(seed)
    at_scale = CropAtScale(transform).read(data, decoding)
    return first, at_scale, torch.rand(1)


def test_a_crop_that_is_hardly_scaled_down_is_decoded_whole():
    for seed in range(5):
        first, at_scale, _ = both(photo(60, 50), seed=seed)
        assert torch.equal(first, at_scale)


def test_other_formats_are_decoded_whole(picture):
    file = io.BytesIO()
    picture.resize((400, 300)).save(file, "PNG")
    first, at_scale, _ = both(file.getvalue())
    assert torch.equal(first, at_scale)


@pytest.mark.parametrize("decoding", ["correct", "original"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_large_jpeg_is_decoded_at_the_scale_of_its_crop(orientation, decoding, monkeypatch):
    sizes = []
    decode = square.decode_at_scale
    monkeypatch.setattr(square, "decode_at_scale", lambda *given: sizes.append(decode(*given)) or sizes[-1])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = photo(333, 250, exif=exif)
    for seed in range(8):
        first, at_scale, after = both(data, 32, seed, decoding)
        assert (first - at_scale).abs().mean() * 127.5 < 10  # grey levels: the same crop, flip and augmentations
        torch.manual_seed(seed)
        keys_to_transforms(["square_transform_randaug"], 32)[0](decode_image(data, decoding))
        assert torch.equal(torch.rand(1), after)  # no other number was drawn
    height, width = (333, 250) if orientation == 6 and decoding == "correct" else (250, 333)
    assert {pixels.shape for pixels in sizes} <= {(-(-height // k), -(-width // k), 3) for k in (4, 8)}


def test_what_crops_nothing_is_not_decoded_at_scale():
    with pytest.raises(VLMoError, match="decode_at_scale"):
        CropAtScale(keys_to_transforms(["square_transform"], 32)[0])


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("saved", [{}, {"quality": 60}, {"subsampling": 0}, {"progressive": True}])
def test_pixels_are_the_same_with_and_without_simplejpeg(saved, orientation, monkeypatch):
    simplejpeg = pytest.importorskip("simplejpeg", reason="it is not installed (vlmo[fast])")
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (150, 203, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", exif=exif, **saved)
    data = pa.py_buffer(file.getvalue())  # (as tables give it)

    def decoded():
        return [decode_at_scale(data, "correct", lambda size, k=k: k) for k in (1, 2, 4, 8)]

    used = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *given, **sizes: used.append(1) or decode(*given, **sizes))
    fast = decoded()
    assert len(used) == (4 if orientation == 1 else 0)
    with pytest.raises(images.UndecodableImage):
        decode_at_scale(file.getvalue()[:-200], "correct", lambda size: 2)
    monkeypatch.setattr(images, "_simplejpeg", lambda: None)
    for with_it, without in zip(fast, decoded(), strict=True):
        np.testing.assert_array_equal(with_it, without)
    np.testing.assert_array_equal(fast[0], np.asarray(decode_image(data)))
