"""The two published ways from a picture to a square tensor (3, size, size) in [-1, 1]."""

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from vlmo.transforms.randaugment import RandAugment


def to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """RGB bytes to float32 (3, H, W), normalised with mean 0.5 and std 0.5.

    Divides as the published transform does; `v2.ToDtype` multiplies by 1/255, which differs in the last bit.
    """
    return v2.functional.pil_to_tensor(image).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def square_transform(size: int) -> v2.Compose:
    """For evaluation: the whole picture, resized to size x size."""
    resize = v2.Resize((size, size), InterpolationMode.BICUBIC)
    return v2.Compose([to_rgb, resize, to_tensor])


def square_transform_randaug(size: int, autocontrast: str = "correct") -> v2.Compose:
    """For training: a random crop of at least half the picture, a random flip, two random augmentations."""
    crop = v2.RandomResizedCrop(size, scale=(0.5, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v2.Compose([to_rgb, crop, v2.RandomHorizontalFlip(), RandAugment(autocontrast), to_tensor])
