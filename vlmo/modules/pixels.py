"""Images as bytes and back, without loss: a quarter of what they take as float32."""

import torch
from torch import Tensor

# every value that a normalised picture can have, computed as `transforms/square.py` does and where it does, on the CPU:
# a GPU may round the last bit otherwise
LEVELS = torch.arange(256).float().div_(255).sub_(0.5).div_(0.5)


def to_bytes(image: Tensor) -> Tensor:
    """Normalised pixels, floats in [-1, 1], to the nearest of 256 levels, uint8."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(levels: Tensor) -> Tensor:
    """Float32 pixels of `to_bytes`: exactly those that it was given, if they came from a picture's bytes."""
    return LEVELS.to(levels.device)[levels.int()]
