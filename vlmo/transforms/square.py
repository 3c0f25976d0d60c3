"""The two published ways from a picture to a square tensor (3, size, size) in [-1, 1]."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from vlmo.transforms.randaugment import RandAugment


def to_rgb(image: Image.Image) -> Image.Image:
    return image if image.mode == "RGB" else image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB bytes to float32 (3, H, W), normalised with mean 0.5 and std 0.5.

    Divides as the published transform does; `v2.ToDtype` multiplies by 1/255, which differs in the last bit.
    """
    pixels = torch.from_numpy(np.array(image))
    values = torch.empty(3, image.height, image.width).copy_(pixels.permute(2, 0, 1))
    return values.div_(255).sub_(0.5).div_(0.5)


class RandomSquare:
    """A random crop of at least half the picture, resized (bicubic, antialiased) to size x size.

    Drawn as torchvision's `RandomResizedCrop` draws. Resized by torch in 8-bit arithmetic, five times faster than by
    Pillow: one value in some hundreds differs, by one grey level (of white noise, seldom by two).
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
        crop = np.array(image.crop((left, top, left + width, top + height)))
        pixels = torch.from_numpy(crop)[None].permute(0, 3, 1, 2)  # channels last: as it lies, nothing is copied
        square = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True)
        return Image.fromarray(square.permute(0, 2, 3, 1)[0].numpy())


def random_flip(image: Image.Image) -> Image.Image:
    """Left to right, half the time."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(()) < 0.5 else image


def square_transform(size: int) -> v2.Compose:
    """For evaluation: the whole picture, resized to size x size."""
    resize = v2.Resize((size, size), InterpolationMode.BICUBIC)
    return v2.Compose([to_rgb, resize, to_tensor])


def square_transform_randaug(size: int, autocontrast: str = "correct") -> v2.Compose:
    """For training: a random crop of at least half the picture, a random flip, two random augmentations."""
    return v2.Compose([to_rgb, RandomSquare(size), random_flip, RandAugment(autocontrast), to_tensor])
