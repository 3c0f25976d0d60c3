"""The batch: every key with its shape and type. It is final when it leaves the collator.

A field says how samples become a batch, and how a batch without samples looks. The common ones stand here; a task or a
data set adds its own (`Task.fields`, `BaseDataset.fields`).

Shapes: B samples, T text tokens (padded), S pixels a side, P patches, R most masked tokens of a text, K most entries of
a row, M masked tokens of all texts.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

IGNORE_INDEX = -100  # label of a position that is not predicted (torch's)
PAD_ID = 0  # of BERT's vocabulary, which the released files fix


@dataclass(frozen=True)
class Field:
    """One key of a batch.

    Attributes:
        shape: of one sample, sizes by letter or number; () for one value a sample.
        dtype: None for values that are no tensor: the batch holds a list.
        padding: fills the rows of samples with fewer entries (of "T" and "K"); None where all have as many.
    """

    shape: tuple[str | int, ...] = ()
    dtype: torch.dtype | None = torch.int64
    padding: float | None = None

    def empty(self, sizes: Mapping[str, int], like: Tensor) -> Any:
        """The field of a batch without samples, on the device of `like`; sizes that are not given count as 1."""
        if self.dtype is None:
            return []
        dtype = like.dtype if self.dtype.is_floating_point else self.dtype
        shape = [size if isinstance(size, int) else sizes.get(size, 1) for size in self.shape]
        return like.new_zeros(0, *shape, dtype=dtype)


IMAGE = Field((3, "S", "S"), torch.float32)
NUMBER = Field()
FLAG = Field((), torch.bool)
VALUES = Field((), None)

FIELDS: dict[str, Field] = {
    "image": IMAGE,
    "image_0": IMAGE,
    "image_1": IMAGE,
    "text": VALUES,
    "text_ids": Field(("T",), padding=PAD_ID),
    "text_masks": Field(("T",), padding=0),
    "text_ids_mlm": Field(("T",), padding=PAD_ID),
    "text_labels_mlm": Field(("T",), padding=IGNORE_INDEX),
    "patch_mask": Field(("P",), torch.bool),
    "image_key": NUMBER,
    "raw_index": NUMBER,
    "img_index": NUMBER,
    "cap_index": NUMBER,
}

IMAGES = frozenset(name for name, field in FIELDS.items() if field is IMAGE)  # may be bytes


class Batch(TypedDict, total=False):
    """Keys of `FIELDS`; which of them are there depends on the data set and on what the tasks ask for.

    The training loader leaves images as bytes (uint8), a quarter of what workers hand over and a GPU is sent; on the
    device, before a callback or a task sees them, they become pixels (`wire_format.with_pixels`).
    """

    image: Tensor  # (B, 3, S, S) float, normalised to [-1, 1]
    image_0: Tensor  # (B, 3, S, S) the first of two images
    image_1: Tensor  # (B, 3, S, S) the second
    text: list[str]  # B
    text_ids: Tensor  # (B, T) token ids
    text_masks: Tensor  # (B, T) 1, 0 on padding
    text_ids_mlm: Tensor  # (B, T) with masked tokens replaced
    text_labels_mlm: Tensor  # (B, T) the true ids of masked tokens, IGNORE_INDEX elsewhere
    masked_positions: Tensor  # (B, R) of the masked tokens, shorter rows filled up with 0
    masked_kept: Tensor  # (M,) which of the B * R are no filling
    patch_mask: Tensor  # (B, P) bool, True where a patch is hidden
    patch_positions: Tensor  # (B, R) of the hidden patches, shorter rows filled up with 0
    patch_kept: Tensor  # (M,) which of the B * R are no filling
    images_are_bytes: bool  # there and True where images are bytes, or the pixels that were made of them
    random_keys: Tensor  # (B,) int64: with `layout_invariant`, what this step's random numbers follow from
    image_key: Tensor  # (B,) equal where the encoded image is: see `images.image_key`
    raw_index: Tensor  # (B,) number of the sample
    img_index: Tensor  # (B,) number of its image
    cap_index: Tensor  # (B,) number of the text among the image's
    skipped: list[str]  # a line for each sample that is left out because its image cannot be decoded
    skipped_targets: list[dict[str, Any]]  # what is known of those samples all the same


def empty_batch(
    fields: Mapping[str, Field],
    sizes: Mapping[str, int],
    like: Tensor,
    finish: Iterable[Callable[[Batch], dict[str, Tensor]]] = (),
) -> Batch:
    """A batch without samples, on the device and with the type of `like`.

    It is what a process computes whose images are all unreadable, because the others wait for its part of every
    exchange: losses of 0 whose gradients are zeros.

    Args:
        fields: those that the active tasks read.
        sizes: by the letters of `Field.shape`; those that are not given count as 1.
        finish: adds what is computed of the others (`Task.derive`), as in the collator.
    """
    batch: dict[str, Any] = {name: field.empty(sizes, like) for name, field in fields.items()}
    for derive in finish:
        batch |= derive(cast(Batch, batch))
    return cast(Batch, batch)
