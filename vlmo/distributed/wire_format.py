"""How images and texts travel between processes, and to a device: in few bytes, and without loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmo.batch import IMAGES, PAD_ID


def to_bytes(image: Tensor) -> Tensor:
    """Normalised pixels, floats in [-1, 1], to the nearest of 256 levels, uint8."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(levels: Tensor) -> Tensor:
    """Float32 pixels of `to_bytes`: exactly those that it was given, if they came from a picture's bytes."""
    # divided by a tensor, as by a number a GPU multiplies with the reciprocal, which rounds the last bit otherwise
    return levels.float().div_(torch.full((), 255.0, device=levels.device)).sub_(0.5).div_(0.5)


def as_pixels(image: Tensor) -> Tensor:
    """Normalised pixels of images that may be bytes."""
    return from_bytes(image) if image.dtype == torch.uint8 else image


def with_pixels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with normalised pixels where it has images as bytes, as the training loader leaves them."""
    return {name: as_pixels(value) if name.rpartition(".")[2] in IMAGES else value for name, value in batch.items()}


def pack_texts(ids: Tensor, masks: Tensor, vocab_size: int) -> Tensor:
    """(B, T) token ids and masks as (B, T * width) bytes: numbers from 1 on, 0 where the mask is 0."""
    return ((ids + 1) * masks).to(_type(vocab_size)).view(torch.uint8)  # (NCCL knows no int16)


def unpack_texts(packed: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Ids and masks (B, T) int64 of `pack_texts`; what the mask hides is padding."""
    numbers = packed.view(_type(vocab_size)).long()
    masks = (numbers > 0).long()
    return torch.where(numbers > 0, numbers - 1, PAD_ID), masks


def text_width(vocab_size: int) -> int:
    """Bytes of a token."""
    return _type(vocab_size).itemsize


def _type(vocab_size: int) -> torch.dtype:
    return torch.int16 if vocab_size <= torch.iinfo(torch.int16).max else torch.int32
