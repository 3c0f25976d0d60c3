"""The two published ways from an image to a square tensor (3, size, size) in [-1, 1], with the ten augmentations.

The augmentations are those of the published training, at magnitude 7 of 10. Each takes and returns an RGB image and
gives the published pixels exactly. Pillow does most of them; the warps follow OpenCV's rounding, which neither Pillow
nor torchvision offers.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache
from math import cos, radians, sin
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn import functional as F

from vlmo.errors import VLMoError
from vlmo.images import decode_at_scale
from vlmo.registry import TRANSFORMS

Transform = Callable[[Image.Image], torch.Tensor]

FILL = 128  # grey for what a warp brings in from outside

Row = tuple[float, float, float]
Box = tuple[int, int, int, int]  # left, top, right, bottom


def warp(image: Image.Image, x_from: Row, y_from: Row) -> Image.Image:
    """Warp affinely as OpenCV's `warpAffine` does (bilinear, pixel centres at integers, constant border).

    Output pixel (x, y) is read at (a x + b y + c, d x + e y + f) for `x_from` = (a, b, c) and `y_from` = (d, e, f).
    """
    width, height = image.size
    places, weights = _neighbours(width, height, x_from, y_from)
    framed = torch.full((height + 4, width + 4, 3), float(FILL))
    framed[2:-2, 2:-2] = torch.from_numpy(np.array(image))
    # four rows of a table, weighted and added: floats hold these sums exactly
    warped = F.embedding_bag(places, framed.view(-1, 3), per_sample_weights=weights, mode="sum")
    return Image.fromarray(warped.add_(0.5).byte().view(height, width, 3).numpy())


@lru_cache(maxsize=4)  # an augmentation asks for two, one by sign
def _neighbours(width: int, height: int, x_from: Row, y_from: Row) -> tuple[torch.Tensor, torch.Tensor]:
    """What a warp makes each pixel of, both (H * W, 4): places in the framed image, int32, and weights."""
    rows, columns = np.ogrid[:height, :width]
    x, y = _in_32nds(x_from, columns, rows), _in_32nds(y_from, columns, rows)
    right, down, below = x & 31, y & 31, width + 4
    first = ((y >> 5).clip(-2, height) + 2) * below + (x >> 5).clip(-2, width) + 2
    places = np.stack([first, first + 1, first + below, first + below + 1], axis=-1)
    left, up = 32 - right, 32 - down
    weights = np.stack([left * up, right * up, left * down, right * down], axis=-1) / 1024
    return torch.from_numpy(places.reshape(-1, 4)).int(), torch.from_numpy(weights.reshape(-1, 4)).float()


def _in_32nds(row: Row, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Where to read, in 1/32 pixel, rounded as OpenCV does: each half to 1/1024 pixel, then their sum."""
    a, b, c = row
    return ((np.rint(a * columns * 1024) + np.rint((b * rows + c) * 1024)).astype(np.int64) + 16) >> 5


def shear_x(image: Image.Image, factor: float) -> Image.Image:
    """Row y moves by `factor` * y."""
    return _shift_rows(image, factor)


def shear_y(image: Image.Image, factor: float) -> Image.Image:
    """Column x moves by `factor` * x."""
    turn = Image.Transpose.TRANSPOSE
    return _shift_rows(image.transpose(turn), factor).transpose(turn)


def _shift_rows(image: Image.Image, factor: float) -> Image.Image:
    """The same as `warp` with (1, -factor, 0), (0, 1, 0), in half its time.

    A row moves as a whole: the weights of the two neighbours are the same all along.
    """
    width, height = image.size
    moved = _in_32nds((1, -factor, 0), np.zeros((1, 1)), np.arange(height)[:, None])[:, 0]
    whole, part = moved >> 5, (moved & 31)[:, None].astype(np.uint16)
    margin = min(int(np.abs(whole).max()) + 1, width + 1)
    framed = np.full((height, width + 2 * margin, 3), FILL, np.uint8)
    framed[:, margin : margin + width] = np.asarray(image)
    starts = np.arange(height) * (width + 2 * margin) + (whole + margin).clip(0, 2 * margin - 1)
    length = 3 * (width + 1)
    rows = np.lib.stride_tricks.sliding_window_view(framed.ravel(), length)[3 * starts].astype(np.uint16)
    blended = rows[:, :-3] * (32 - part) + rows[:, 3:] * part + 16
    return Image.fromarray((blended >> 5).astype(np.uint8).reshape(height, width, 3))


def translate_x(image: Image.Image, pixels: float) -> Image.Image:
    return _shifted(image, -round(pixels), 0)


def translate_y(image: Image.Image, pixels: float) -> Image.Image:
    return _shifted(image, 0, -round(pixels))


def _shifted(image: Image.Image, right: int, down: int) -> Image.Image:
    shifted = Image.new("RGB", image.size, (FILL, FILL, FILL))
    shifted.paste(image, (right, down))
    return shifted


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """Rotate counter-clockwise about (width/2, height/2)."""
    x, y = image.width / 2, image.height / 2
    c, s = cos(radians(degrees)), sin(radians(degrees))
    return warp(image, (c, -s, x - c * x + s * y), (s, c, y - s * x - c * y))


def identity(image: Image.Image) -> Image.Image:
    return image


def autocontrast_original(image: Image.Image) -> Image.Image:
    """Autocontrast with the published defect: a channel whose darkest value is above 0 comes out all white.

    (Its offset was negated as an unsigned byte. A channel of one value stays as it is.)
    """
    pixels, stretched = np.asarray(image), np.array(ImageOps.autocontrast(image))
    darkest, brightest = pixels.min((0, 1)), pixels.max((0, 1))
    stretched[..., (darkest > 0) & (darkest < brightest)] = 255
    return Image.fromarray(stretched)


def brightness(image: Image.Image, factor: float) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def sharpness(image: Image.Image, factor: float) -> Image.Image:
    """Sharpen against a 3 x 3 smoothing; what leaves 0..255 wraps around, as published (Pillow would clip it)."""
    pixels = np.asarray(image)
    smooth = _smooth(pixels).astype(np.float32)
    sharp = pixels.astype(np.float32)
    sharp -= smooth
    sharp *= np.float32(factor)
    sharp += smooth
    return Image.fromarray(sharp.astype(np.int16).astype(np.uint8))


def _smooth(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> what Pillow's `ImageFilter.SMOOTH` makes of it (centre 5, its eight neighbours 1, of 13), faster.

    The border stays. A sum of thirteenths is never half way between two integers, so its rounding is exact.
    """
    smooth = pixels.copy()
    wide = pixels.astype(np.uint16)
    columns = wide[:-2] + wide[1:-1] + wide[2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * wide[1:-1, 1:-1]
    smooth[1:-1, 1:-1] = (2 * total + 13) // 26
    return smooth


class Augmentation(NamedTuple):
    apply: Callable[..., Image.Image]
    args: tuple[float, ...] = ()
    signed: bool = False  # the argument's sign is drawn


AUGMENTATIONS = {
    "Identity": Augmentation(identity),
    "AutoContrast": Augmentation(ImageOps.autocontrast),
    "Equalize": Augmentation(ImageOps.equalize),
    "Brightness": Augmentation(brightness, (1.36,)),
    "Sharpness": Augmentation(sharpness, (1.36,)),
    "ShearX": Augmentation(shear_x, (0.21,), signed=True),
    "ShearY": Augmentation(shear_y, (0.21,), signed=True),
    "TranslateX": Augmentation(translate_x, (7,), signed=True),
    "TranslateY": Augmentation(translate_y, (7,), signed=True),
    "Rotate": Augmentation(rotate, (21,), signed=True),
}
AUTOCONTRASTS = {"correct": ImageOps.autocontrast, "original": autocontrast_original}


class RandAugment:
    """Draw two augmentations with replacement and apply each with probability 0.5, from torch's global generator.

    `autocontrast` is "correct" or "original" (see `autocontrast_original`). Raises VLMoError for another value.
    """

    def __init__(self, autocontrast: str = "correct") -> None:
        if autocontrast not in AUTOCONTRASTS:
            raise VLMoError(f"autocontrast={autocontrast!r}: use one of {', '.join(AUTOCONTRASTS)}")
        self.augmentations = AUGMENTATIONS | {"AutoContrast": Augmentation(AUTOCONTRASTS[autocontrast])}

    def __call__(self, image: Image.Image) -> Image.Image:
        choices = list(self.augmentations.values())
        for index in torch.randint(len(choices), (2,)).tolist():
            apply, args, signed = choices[index]
            skip, negative = (
                torch.rand(2) < 0.5
            ).tolist()  # always two draws: the stream does not depend on the choice
            if not skip:
                image = apply(image, *(-value if signed and negative else value for value in args))
        return image


def to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB bytes to float32 (3, H, W), normalised with mean 0.5 and std 0.5.

    Divides as the published transform does; `v2.ToDtype` multiplies by 1/255, which differs in the last bit.
    """
    pixels = torch.from_numpy(np.array(image))
    values = torch.empty(3, image.height, image.width).copy_(pixels.permute(2, 0, 1))
    return values.div_(255).sub_(0.5).div_(0.5)


def to_levels(image: Image.Image) -> torch.Tensor:
    """RGB bytes as they are, (3, H, W) uint8, from which `wire_format.from_bytes` makes what `to_tensor` gives."""
    planes = bytearray().join(plane.tobytes() for plane in image.split())
    return torch.frombuffer(planes, dtype=torch.uint8).view(3, image.height, image.width)


class RandomSquare:
    """A random crop of at least half the image, resized (bicubic, antialiased) to size x size.

    Drawn as torchvision's `RandomResizedCrop` draws. Resized by torch in 8-bit arithmetic, five times faster than by
    Pillow: one value in some hundreds differs, by one grey level (of white noise, seldom by two).
    """

    def __init__(self, size: int):
        # here, since importing torchvision takes longer than all else that evaluation imports
        from torchvision.transforms import RandomResizedCrop

        self.size, self._draw = size, RandomResizedCrop.get_params

    def draw(self, width: int, height: int) -> Box:
        """Draws the crop of an image of that size."""
        # (torchvision asks an image for its size alone; a tensor without memory has one)
        like = torch.empty(3, height, width, device="meta")
        top, left, height, width = self._draw(like, [0.5, 1.0], [3 / 4, 4 / 3])
        return left, top, left + width, top + height

    def __call__(self, image: Image.Image) -> Image.Image:
        return self.resized(np.array(image.crop(self.draw(*image.size))))

    def resized(self, crop: np.ndarray) -> Image.Image:
        """Resizes pixels (H, W, 3)."""
        pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # channels last: as it lies, nothing is copied
        square = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        return Image.fromarray(square.permute(0, 2, 3, 1)[0].numpy())


def random_flip(image: Image.Image) -> Image.Image:
    """Left to right, half the time."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


class Compose:
    """Applies transforms in turn."""

    def __init__(self, *transforms: Callable[[Any], Any]) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> torch.Tensor:
        value: Any = image
        for transform in self.transforms:
            value = transform(value)
        return value


def leave_bytes(transform: Transform) -> Transform:
    """The same transform without the normalisation that ends it; one that ends otherwise as it is."""
    if isinstance(transform, Compose) and transform.transforms[-1:] == (to_tensor,):
        return Compose(*transform.transforms[:-1], to_levels)
    return transform


class CropAtScale(Compose):
    """The transform of training, of encoded images: JPEGs are decoded at the scale that their crop needs.

    The crop is drawn first, from the size in the JPEG's header. If it is to be scaled down to 1/2 (1/4, 1/8) or less,
    the JPEG is decoded at 1/2 (1/4, 1/8) of its size, and the crop, widened to whole pixels of that, resized from
    there. All random numbers are those of a transform that decodes first.
    """

    def __init__(self, whole: Transform) -> None:
        """
        Args:
            whole: as `square_transform_randaug` builds it.

        Raises:
            VLMoError: if it crops nothing at random.
        """
        steps = whole.transforms if isinstance(whole, Compose) else ()
        super().__init__(*steps)
        places = [place for place, each in enumerate(steps) if isinstance(each, RandomSquare)]
        if not places:
            raise VLMoError("decode_at_scale=True: is for square_transform_randaug, which takes random crops; drop it")
        self.square: Any = steps[places[0]]
        self.after = Compose(*steps[places[0] + 1 :])

    def read(self, data: Any, decoding: str) -> torch.Tensor:
        """Decodes and transforms an image. Raises UndecodableImage as `decode_image` does."""
        drawn: list[tuple[Box, int]] = []

        def choose_scale(size: tuple[int, int]) -> int:
            left, top, right, bottom = box = self.square.draw(*size)
            most = min(right - left, bottom - top) // self.square.size
            scale = max(scale for scale in (1, 2, 4, 8) if scale <= max(most, 1))
            drawn.append((box, scale))
            return scale

        decoded = decode_at_scale(data, decoding, choose_scale)
        if isinstance(decoded, Image.Image):
            return self(decoded)
        (left, top, right, bottom), scale = drawn[0]
        crop = decoded[top // scale : -(-bottom // scale), left // scale : -(-right // scale)]
        return self.after(self.square.resized(np.ascontiguousarray(crop)))


class Resize:
    """The whole image, bicubic and antialiased, to size x size."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize((self.size, self.size), Image.Resampling.BICUBIC)


def square_transform(size: int) -> Compose:
    """Builds the transform of evaluation: the whole image, resized to size x size."""
    return Compose(to_rgb, Resize(size), to_tensor)


@TRANSFORMS.register("square_transform_randaug")
def square_transform_randaug(size: int, autocontrast: str = "correct") -> Compose:
    """Builds the transform of training: a random crop of at least half the image, a random flip, two augmentations."""
    return Compose(to_rgb, RandomSquare(size), random_flip, RandAugment(autocontrast), to_tensor)


TRANSFORMS.register("square_transform")(lambda size, autocontrast: square_transform(size))
for _name in ("pixelbert", "pixelbert_randaug"):
    TRANSFORMS.dropped[_name] = "it keeps the image's shape, and the model takes squares"


def keys_to_transforms(keys: Iterable[str], size: int, autocontrast: str = "correct") -> list[Transform]:
    """Builds the transforms named by `keys`: each takes a PIL image of any mode to a float tensor (3, size, size).

    `autocontrast` is "correct" or "original": the published AutoContrast turns whole channels white. Raises VLMoError
    with one line for each name that is not known.
    """
    keys = list(keys)
    TRANSFORMS.require(keys, "transform")
    return [TRANSFORMS[key](size, autocontrast) for key in keys]
