"""The transforms with which BEiT is fine-tuned on ImageNet: timm's, drawn from torch's generator as ours are."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image

from vlmo.registry import TRANSFORMS
from vlmo.transforms.square import to_rgb

HALF = (0.5, 0.5, 0.5)  # mean and deviation, as of the other transforms
CROP = 0.875  # of evaluation: the middle 224 of 256 pixels


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators from `seed`, which timm draws from; afterwards they are as before."""
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


class Augmented:
    """A random crop of 8 % to all of the image, a flip, RandAugment of magnitude 9, random erasing."""

    def __init__(self, size: int) -> None:
        from timm.data import create_transform  # here, since importing timm takes longer than all else

        self.transform = create_transform(
            size,
            is_training=True,
            auto_augment="rand-m9-mstd0.5-inc1",
            interpolation="bicubic",
            mean=HALF,
            std=HALF,
            re_prob=0.25,
            re_mode="pixel",
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        with seeded(int(torch.randint(2**32, ()))):
            return self.transform(to_rgb(image))


class Cropped:
    """The middle of the image, at its own aspect ratio."""

    def __init__(self, size: int) -> None:
        from timm.data import create_transform

        self.transform = create_transform(size, interpolation="bicubic", mean=HALF, std=HALF, crop_pct=CROP)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(to_rgb(image))


TRANSFORMS.register("classification_randaug")(lambda size, autocontrast: Augmented(size))
TRANSFORMS.register("classification")(lambda size, autocontrast: Cropped(size))
