"""Rank, world size, and how rows travel between processes; without a process group, everything works as one process.

Where rows of all processes come together, a process's own come first, then the others' in the order of their ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_alone = False


@contextmanager
def alone() -> Iterator[None]:
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


def _own_first() -> list[int]:
    """All ranks, this process's first."""
    return [rank(), *(other for other in range(world_size()) if other != rank())]


class _AllGather(torch.autograd.Function):
    """(B, D) of every process -> (processes, B, D); the gradient of a row is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[rank()]


def gather_shapes(rows: Tensor) -> list[list[int]]:
    """The first two dimensions of `rows` (at least 2-D) on every process, by rank."""
    shape = torch.tensor(rows.shape[:2], device=rows.device)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    return torch.stack(shapes).tolist()


def gather_own_first(rows: Tensor, exact_gradient: bool = False) -> Tensor:
    """Rows of all processes, this one's first.

    Args:
        rows: (B, D); B may differ between processes, D too: shorter rows are then padded with zeros at their end.
        exact_gradient: False, as published: only the own rows carry gradient, so that every process computes the whole
            contrast and differentiates its own share of it. True: gradient flows back to the process of each row, so
            that the mean over processes is the gradient of the joint batch.

    Returns:
        (sum of B, longest D)
    """
    if world_size() == 1:
        return rows
    shapes = gather_shapes(rows)
    most, longest = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    padded = F.pad(rows, (0, longest - rows.shape[1], 0, most - rows.shape[0])).contiguous()
    parts = list(_AllGather.apply(padded))
    if not exact_gradient:
        parts = [padded if r == rank() else part.detach() for r, part in enumerate(parts)]
    return torch.cat([parts[r][: shapes[r][0]] for r in _own_first()])


def fetch_rows(rows: Tensor, index: Tensor) -> Tensor:
    """The rows that `index` picks among those of all processes; only these travel, each to who asked for it.

    Args:
        rows: (B, ...) of this process.
        index: (M,) numbers in the order of `gather_own_first`.

    Returns:
        (M, ...) without gradient.
    """
    if world_size() == 1:
        return rows[index]
    order = _own_first()
    sizes = torch.tensor(gather_shapes(rows), device=rows.device)[:, 0]
    ends = sizes[order].cumsum(0)
    place = torch.bucketize(index, ends, right=True)  # which entry of `order` holds the row
    row = index - (ends - sizes[order])[place]
    owner = torch.tensor(order, device=rows.device)[place]
    # ask: the numbers of the wanted rows, grouped by owner
    by_owner = owner.argsort(stable=True)
    asked = torch.bincount(owner, minlength=world_size())
    matrix = [torch.empty_like(asked) for _ in order]
    dist.all_gather(matrix, asked)
    counts = torch.stack(matrix).tolist()  # counts[r][s]: rows that r wants of s
    wanted, given = counts[rank()], [asks[rank()] for asks in counts]
    requests = index.new_empty(sum(given))
    dist.all_to_all_single(requests, row[by_owner].contiguous(), given, wanted)
    # answer
    received = rows.new_empty(sum(wanted), *rows.shape[1:])
    dist.all_to_all_single(received, rows.detach()[requests].contiguous(), wanted, given)
    fetched = torch.empty_like(received)
    fetched[by_owner] = received
    return fetched


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
