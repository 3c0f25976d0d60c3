"""Rank, world size, and how rows travel between processes; without a process group, everything works as one process.

Where rows of all processes come together, a process's own come first, then the others' in the order of their ranks.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.distributed.wire_format import pack_texts, text_width, to_bytes, unpack_texts

_alone = False


@contextmanager
def single_process() -> Iterator[None]:
    """Within it this process acts as the only one: for evaluation, as processes differ in their number of batches."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def _grouped() -> bool:
    return not _alone and dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if _grouped() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _grouped() else 1


def any_process(yes: bool) -> bool:
    """Whether any process says yes; all have to ask. No device is waited for."""
    return any(answer for (answer,) in gather_numbers([int(yes)]))


def all_reduce_any(yes: Tensor) -> bool:
    """Whether a scalar is true on any process; all have to ask, and each waits for its device."""
    if world_size() == 1:
        return bool(yes)
    answer = yes.float()
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


_cpu_groups: dict[Any, Any] = {}  # by the default group; it is another one after processes have met anew


def _cpu_group() -> Any:
    """Gives the group for numbers of the CPU, which must not wait for a device: of NCCL's processes, one beside it."""
    if dist.get_backend() != "nccl":
        return dist.group.WORLD
    if dist.group.WORLD not in _cpu_groups:
        _cpu_groups[dist.group.WORLD] = dist.new_group(backend="gloo")
    return _cpu_groups[dist.group.WORLD]


def gather_numbers(own: Sequence[int]) -> list[tuple[int, ...]]:
    """Gives the numbers of all processes, by rank, as many from each; an exchange that waits for no device."""
    if world_size() == 1:
        return [tuple(own)]
    gathered = torch.empty(world_size(), len(own), dtype=torch.int64)
    dist.all_gather(list(gathered), torch.tensor(own, dtype=torch.int64), group=_cpu_group())
    return [tuple(row) for row in gathered.tolist()]


def _own_first() -> list[int]:
    """All ranks, this process's first."""
    return [rank(), *(other for other in range(world_size()) if other != rank())]


class _AllGather(torch.autograd.Function):
    """(B, ...) of every process -> (processes, B, ...); the gradient of a row is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        gathered = rows.new_empty(world_size(), *rows.shape)
        dist.all_gather(list(gathered), rows)
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def all_gather_rows(
    rows: Tensor, exact_gradient: bool = False, shapes: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Rows of all processes, this one's first.

    Args:
        rows: (B, ..., D); B may differ between processes, D too: shorter rows are then padded with zeros at their end.
        exact_gradient: False, as published: only the own rows carry gradient, so that every process computes the whole
            contrast and differentiates its own share of it. True: gradient flows back to the process of each row, so
            that the mean over processes is the gradient of the joint batch.
        shapes: B and D of every process, by rank, where they are known already.

    Returns:
        (sum of B, ..., longest D)
    """
    if world_size() == 1:
        return rows
    shapes = gather_numbers([rows.shape[0], rows.shape[-1]]) if shapes is None else shapes
    most, longest = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    padding = [0, longest - rows.shape[-1], *[0] * (2 * rows.ndim - 4), 0, most - rows.shape[0]]
    padded = F.pad(rows, padding).contiguous()
    gathered = _AllGather.apply(padded if exact_gradient else padded.detach())
    parts = list(gathered)
    if not exact_gradient:
        parts[rank()] = padded
    return torch.cat([parts[r][: shapes[r][0]] for r in _own_first()])


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the gradients by their means over all processes; one that a process lacks counts as 0 there.

    For steps whose backward passes DistributedDataParallel does not follow.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    present = gather_numbers([int(parameter.grad is not None) for parameter in trained])
    for parameter, anywhere in zip(trained, zip(*present, strict=True), strict=True):
        if any(anywhere):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / world_size()


def pick_pairs(
    image: Tensor,
    ids: Tensor,
    masks: Tensor,
    image_index: Tensor,
    text_index: Tensor,
    shapes: Sequence[Sequence[int]],
    vocab_size: int,
    as_bytes: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Picks images and texts among those of all processes.

    All of them travel, images as bytes and texts as two bytes a token, because to send only those that are picked every
    process would have to wait for its device to learn which.

    Args:
        image: (B, 3, size, size); ids, masks: (B, T), of this process. They may lie elsewhere than the indices.
        image_index, text_index: (M,) numbers in the order of `all_gather_rows`.
        shapes: B and T of every process, by rank.
        as_bytes: whether the images are normalised bytes, on all processes.

    Returns:
        images (M, 3, size, size), uint8 if they came as bytes (see `from_bytes`), ids and masks (M, longest T), on the
        device of the indices, without gradient.
    """
    device = image_index.device
    if len(shapes) == 1 and image.device == device:
        return image[image_index], ids[text_index], masks[text_index]
    packed = (to_bytes(image) if as_bytes and image.dtype != torch.uint8 else image.detach()).to(device)
    texts = pack_texts(ids.to(device), masks.to(device), vocab_size)
    packed = all_gather_rows(packed, shapes=[(count, packed.shape[-1]) for count, _ in shapes])
    texts = all_gather_rows(texts, shapes=[(count, length * text_width(vocab_size)) for count, length in shapes])
    return packed[image_index], *unpack_texts(texts[text_index], vocab_size)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, of each element; without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gather_objects(part: list[Any]) -> list[Any]:
    """The entries of the lists of all processes, in the order of their ranks; anything that can be pickled."""
    if world_size() == 1:
        return part
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, part)
    return [entry for entries in parts for entry in entries]
