"""The two published ways from a picture to a square tensor (3, size, size) in [-1, 1]."""

import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode, RandomResizedCrop, v2

from vlmo.transforms.randaugment import RandAugment


def to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB bytes to float32 (3, H, W), normalised with mean 0.5 and std 0.5.

    Divides as the published transform does; `v2.ToDtype` multiplies by 1/255, which differs in the last bit.
    """
    return v2.functional.pil_to_tensor(image).contiguous().float().div_(255).sub_(0.5).div_(0.5)


class RandomSquare:
    """A random crop of at least half the picture, resized (bicubic, antialiased) to size x size.

    Drawn as torchvision's `RandomResizedCrop` draws. Resized by torch in 8-bit arithmetic, five times faster than by
    Pillow: one value in some hundreds differs, by one grey level (of white noise, seldom by two).
    """

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = RandomResizedCrop.get_params(image, [0.5, 1.0], [3 / 4, 4 / 3])
        pixels = v2.functional.pil_to_tensor(image.crop((left, top, left + width, top + height)))
        square = F.interpolate(pixels[None], (self.size, self.size), mode="bicubic", antialias=True)[0]
        return Image.fromarray(square.permute(1, 2, 0).numpy())


def square_transform(size: int) -> v2.Compose:
    """For evaluation: the whole picture, resized to size x size."""
    resize = v2.Resize((size, size), InterpolationMode.BICUBIC)
    return v2.Compose([to_rgb, resize, to_tensor])


def square_transform_randaug(size: int, autocontrast: str = "correct") -> v2.Compose:
    """For training: a random crop of at least half the picture, a random flip, two random augmentations."""
    return v2.Compose([to_rgb, RandomSquare(size), v2.RandomHorizontalFlip(), RandAugment(autocontrast), to_tensor])
