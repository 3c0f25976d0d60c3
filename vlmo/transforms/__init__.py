"""Image transforms by their published names. Randomness comes from torch's global generator only."""

from collections.abc import Callable, Iterable

import torch
from PIL import Image

from vlmo.errors import VLMoError
from vlmo.transforms.square import square_transform, square_transform_randaug, to_rgb

__all__ = ["TRANSFORMS", "keys_to_transforms", "square_transform", "square_transform_randaug", "to_rgb"]

Transform = Callable[[Image.Image], torch.Tensor]

# name -> builder(size, autocontrast)
TRANSFORMS: dict[str, Callable[[int, str], Transform]] = {
    "square_transform": lambda size, autocontrast: square_transform(size),
    "square_transform_randaug": square_transform_randaug,
}


def keys_to_transforms(keys: Iterable[str], size: int, autocontrast: str = "correct") -> list[Transform]:
    """Build the transforms named by `keys`: each takes a PIL image of any mode to a float tensor (3, size, size).

    `autocontrast` is "correct" or "original": the published AutoContrast turns whole channels white. Raises VLMoError
    with one line for each name that is not known.
    """
    keys = list(keys)
    problems = [_problem(key) for key in keys if key not in TRANSFORMS]
    if problems:
        raise VLMoError("\n".join(problems))
    return [TRANSFORMS[key](size, autocontrast) for key in keys]


def _problem(key: str) -> str:
    remedy = f"use one of {', '.join(TRANSFORMS)}"
    if key in ("pixelbert", "pixelbert_randaug"):
        return f"transform {key!r} was dropped: it keeps the picture's shape, and the model takes squares; {remedy}"
    return f"unknown transform {key!r}: {remedy}"
