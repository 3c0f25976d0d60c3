"""Positions: which row of the relative position bias table a pair of tokens takes, and tables for another image size.

One table holds the learnt bias of every layer and head, (rows, layers * heads). Its rows, for w patches a side:

    (2w-1)^2  one for each offset between two patches
    3         image: [CLS] to patch, patch to [CLS], [CLS] to itself      (these and the above: N image rows)
    2         text to image, image to text
    2m - 3    one for each offset between two of the m - 1 words that can follow the text's [CLS]
    3         text: [CLS] to word, word to [CLS], [CLS] to itself

m is `max_text_len_of_initckpt`, 196 in every released file, whatever length the texts of a task have. An index (S, S)
holds the row for query i and key j at [i, j]; row and column 0 are [CLS].
"""

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmo.errors import VLMoError

MAX_TEXT_LEN = 196


def num_relative_distance(window: int) -> int:
    """N: the image rows of the table, for `window` patches a side."""
    return (2 * window - 1) ** 2 + 3


def num_table_rows(window: int, max_text_len_of_initckpt: int = MAX_TEXT_LEN) -> int:
    """All rows of the table."""
    return num_relative_distance(window) + 2 + 2 * max_text_len_of_initckpt


def image_relative_position_index(window: int) -> Tensor:
    """(1 + window^2, 1 + window^2) int64: rows of the table for an image, [CLS] first, patches row by row."""
    n = num_relative_distance(window)
    patch = torch.arange(window**2)
    h, w = patch // window, patch % window
    offset_h = h[:, None] - h[None, :] + window - 1
    offset_w = w[:, None] - w[None, :] + window - 1
    return _with_cls(offset_h * (2 * window - 1) + offset_w, cls_rows=n - 3)


def text_relative_position_index(length: int, window: int, max_text_len_of_initckpt: int = MAX_TEXT_LEN) -> Tensor:
    """(length, length) int64: rows of the table for a text of `length` tokens, [CLS] first.

    Raises:
        VLMoError: if the table has no rows for texts that long.
    """
    if length > max_text_len_of_initckpt:
        raise VLMoError(
            f"max_text_len={length}: the position table reaches {max_text_len_of_initckpt} tokens "
            f"(max_text_len_of_initckpt); set max_text_len={max_text_len_of_initckpt} or less"
        )
    zero_offset = num_relative_distance(window) + 2 + max_text_len_of_initckpt - 2
    word = torch.arange(length - 1)
    words = word[None, :] - word[:, None] + zero_offset
    return _with_cls(words, cls_rows=num_table_rows(window, max_text_len_of_initckpt) - 3)


def joint_relative_position_index(text_index: Tensor, image_index: Tensor, window: int) -> Tensor:
    """(T + I, T + I) int64 for [text, image], from the text's (T, T) and the image's (I, I): no distance across."""
    n = num_relative_distance(window)
    text_to_image = torch.full((len(text_index), len(image_index)), n)
    image_to_text = torch.full((len(image_index), len(text_index)), n + 1)
    return torch.cat([torch.cat([text_index, text_to_image], 1), torch.cat([image_to_text, image_index], 1)])


def _with_cls(index: Tensor, cls_rows: int) -> Tensor:
    """Puts [CLS] in front; `cls_rows`: first of the three rows [CLS] to token, token to [CLS], [CLS] to itself."""
    index = F.pad(index, (1, 0, 1, 0), value=cls_rows)
    index[:, 0] = cls_rows + 1
    index[0, 0] = cls_rows + 2
    return index


# --- another image size -----------------------------------------------------------------------------------------------


def resize_relative_position_bias_table(table: Tensor, old_window: int, new_window: int) -> Tensor:
    """The table for `new_window` patches a side: patch offsets interpolated per head, every other row kept.

    Args:
        table: ((2 * old_window - 1)^2 + k, heads), the patch offsets first.

    Returns:
        ((2 * new_window - 1)^2 + k, heads), in the table's dtype.

    Raises:
        VLMoError: if the old table is of a single patch or not finite.
    """
    from scipy.interpolate import RectBivariateSpline  # here: importing it takes a third of the time that torch takes

    if old_window == new_window:
        return table
    if old_window < 2:
        raise VLMoError("a position table of a single patch cannot be resized; use the image size of its training")
    old_side = 2 * old_window - 1
    source = _source_positions(old_window - 1, new_window - 1)
    target = np.arange(1 - new_window, new_window, dtype=np.float64)
    degree = min(3, old_side - 1)

    offsets = table[: old_side**2].double()
    if not offsets.isfinite().all():
        raise VLMoError(
            "a position table with nan or inf cannot be resized: the training diverged or the file is damaged"
        )
    heads = offsets.T.unflatten(1, (old_side, old_side)).numpy()
    splines = [RectBivariateSpline(source, source, head, kx=degree, ky=degree) for head in heads]
    resized = np.stack([spline(target, target).reshape(-1) for spline in splines], axis=1)
    return torch.cat([torch.from_numpy(resized).to(table.dtype), table[old_side**2 :]])


def _source_positions(old_reach: int, new_reach: int) -> Any:
    """Where the old offsets -old_reach .. old_reach lie among the new: 0, +-1, +-(1 + q), +-(1 + q + q^2), ...

    BEiT's choice: near offsets keep their meaning, far ones spread. q is such that the largest old offset falls on the
    largest new one, by bisection in [1.01, 1.5]; so a smaller image takes the middle of the table, almost unchanged.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if sum(ratio**i for i in range(old_reach)) > new_reach:
            high = ratio
        else:
            low = ratio
    positive = np.cumsum(ratio ** np.arange(old_reach))
    return np.concatenate([-positive[::-1], [0.0], positive])


def resize_absolute_position_embedding(embedding: Tensor, new_grid: int) -> Tensor:
    """(1, 1 + g^2, D) -> (1, 1 + new_grid^2, D): patches bicubic, [CLS] kept.

    Raises:
        VLMoError: if the embedding is not of a square grid.
    """
    grid = math.isqrt(max(embedding.shape[1] - 1, 0))
    if grid == 0 or 1 + grid**2 != embedding.shape[1]:
        raise VLMoError(f"position embeddings of {embedding.shape[1]} tokens: not [CLS] and a square of patches")
    if grid == new_grid:
        return embedding
    patches = embedding[:, 1:].float().transpose(1, 2).unflatten(2, (grid, grid))
    patches = F.interpolate(patches, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([embedding[:, :1], patches.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)
