"""Tensors of a checkpoint in the shapes of a model: position tables of another image size, longer texts, ..."""

import math

import torch
from torch import Tensor

from vlmo.errors import VLMoError
from vlmo.modules.positions import (
    num_relative_distance,
    num_table_rows,
    resize_absolute_position_embedding,
    resize_relative_position_bias_table,
)
from vlmo.registry import TASKS

TABLE = "relative_position_bias_table"
# Rows of a table that are no patch offsets, in BEiT and in VLMo; a window of 1 has one patch offset.
BEIT_OTHER_ROWS = num_relative_distance(1) - 1
VLMO_OTHER_ROWS = num_table_rows(1) - 1


def fit(name: str, tensor: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Gives the tensor in the target's shape, which is another, and what was done to it.

    Raises:
        VLMoError: if it is of another model or size.
    """
    if not tensor.is_floating_point():
        raise VLMoError(f"{name} is {tensor.dtype}, not floating point: damaged; copy or download the file again")
    if name in FITTERS and tensor.numel():
        axis, resize = FITTERS[name]
        if tensor.shape[:axis] + tensor.shape[axis + 1 :] == target.shape[:axis] + target.shape[axis + 1 :]:
            return resize(tensor, target)
    hint = "give another load_path"
    sizes = {"text_embeddings.word_embeddings.": "vocab_size"}  # beginning of a name -> the option of its first axis
    for beginning, option in (sizes | {k: v for task in TASKS.values() for k, v in task.sized_by.items()}).items():
        if name.startswith(beginning) and tensor.ndim > 0:
            hint = f"set {option}={len(tensor)} to use this file, or {hint}"
    raise VLMoError(f"{name} is {list(tensor.shape)} in the file, {list(target.shape)} in the model; {hint}")


def _fit_table(table: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Takes VLMo's table of another image size, or BEiT's image rows as the first; the target's other rows stay."""
    old = window_of(len(table) - VLMO_OTHER_ROWS) or window_of(len(table) - BEIT_OTHER_ROWS)
    new = window_of(len(target) - VLMO_OTHER_ROWS)
    if not old or not new:
        raise VLMoError(
            f"{TABLE} has {len(table)} rows in the file, {len(target)} in the model; only files and models with "
            "max_text_len_of_initckpt=196 can be adapted to each other"
        )
    resized = resize_relative_position_bias_table(table, old, new)
    fitted = target.clone()
    fitted[: len(resized)] = resized
    return fitted, f"window {old} -> {new}" + (f", rows below {len(resized)}" if len(resized) < len(target) else "")


def window_of(offsets: int) -> int:
    """Gives w of (2w-1)^2 patch offsets; 0 if it is no such number."""
    side = math.isqrt(max(offsets, 0))
    return (side + 1) // 2 if side % 2 and side**2 == offsets else 0


def _fit_image_positions(embedding: Tensor, target: Tensor) -> tuple[Tensor, str]:
    grid = math.isqrt(target.shape[1] - 1)
    return resize_absolute_position_embedding(embedding, grid), f"{embedding.shape[1]} -> {target.shape[1]} tokens"


def _fit_text_positions(embedding: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Takes the first positions; where the target is longer, its further ones stay new."""
    fitted = target.clone()
    rows = min(len(embedding), len(target))
    fitted[:rows] = embedding[:rows]
    return fitted, f"first {rows} of {len(embedding)} rows" + (", the rest new" if rows < len(target) else "")


def _fit_token_types(embedding: Tensor, target: Tensor) -> tuple[Tensor, str]:
    """Repeats the last row: a third, for the second image of a sample, starts as a copy of the first image's."""
    rows = torch.arange(len(target)).clamp(max=len(embedding) - 1)
    return embedding[rows], f"{len(embedding)} -> {len(target)} rows"


# name -> (the axis that may differ, how the tensor is made to fit)
FITTERS = {
    TABLE: (0, _fit_table),
    "transformer.pos_embed": (1, _fit_image_positions),
    "text_embeddings.position_embeddings.weight": (0, _fit_text_positions),
    "token_type_embeddings.weight": (0, _fit_token_types),
}
