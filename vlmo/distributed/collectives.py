"""Rank, world size, and how rows travel between processes; without a process group, everything works as one process.

Where rows of all processes come together, a process's own come first, then the others' in the order of their ranks.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

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


def all_reduce_any(yes: bool | Tensor, device: torch.device) -> bool:
    """Whether any process says yes (a bool, or a scalar of its device); all have to ask."""
    if world_size() == 1:
        return bool(yes)
    answer = torch.as_tensor(yes, device=device).float()
    dist.all_reduce(answer, dist.ReduceOp.MAX)
    return bool(answer)


def _own_first() -> list[int]:
    """All ranks, this process's first."""
    return [rank(), *(other for other in range(world_size()) if other != rank())]


class _AllGather(torch.autograd.Function):
    """(B, ...) of every process -> (processes, B, ...); the gradient of a row is the sum over all processes."""

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
    """First and last dimension of `rows` on every process, by rank: an exchange, which waits for the others."""
    if world_size() == 1:
        return [[rows.shape[0], rows.shape[-1]]]
    shape = torch.tensor([rows.shape[0], rows.shape[-1]], device=rows.device)
    shapes = [torch.empty_like(shape) for _ in range(world_size())]
    dist.all_gather(shapes, shape)
    return torch.stack(shapes).tolist()


def all_gather_rows(
    rows: Tensor, exact_gradient: bool = False, shapes: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Rows of all processes, this one's first.

    Args:
        rows: (B, ..., D); B may differ between processes, D too: shorter rows are then padded with zeros at their end.
        exact_gradient: False, as published: only the own rows carry gradient, so that every process computes the whole
            contrast and differentiates its own share of it. True: gradient flows back to the process of each row, so
            that the mean over processes is the gradient of the joint batch.
        shapes: what `gather_shapes` gives of these rows, where it is known already.

    Returns:
        (sum of B, ..., longest D)
    """
    if world_size() == 1:
        return rows
    shapes = gather_shapes(rows) if shapes is None else shapes
    most, longest = (max(shape[axis] for shape in shapes) for axis in (0, 1))
    padding = [0, longest - rows.shape[-1], *[0] * (2 * rows.ndim - 4), 0, most - rows.shape[0]]
    padded = F.pad(rows, padding).contiguous()
    parts = list(_AllGather.apply(padded))
    if not exact_gradient:
        parts = [padded if r == rank() else part.detach() for r, part in enumerate(parts)]
    return torch.cat([parts[r][: shapes[r][0]] for r in _own_first()])


def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replaces the gradients by their means over all processes; one that a process lacks counts as 0 there.

    For steps whose backward passes DistributedDataParallel does not follow.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = trained[0].device
    present = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32, device=device)
    dist.all_reduce(present)
    for parameter, somewhere in zip(trained, present.tolist(), strict=True):
        if somewhere:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(gradient)
            parameter.grad = gradient / world_size()


def fetch_rows(
    rows: Tensor,
    index: Tensor,
    counts: Sequence[int],
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor], Tensor],
) -> Tensor:
    """The rows that `index` picks among those of all processes; only these travel, each to who asked for it.

    Args:
        rows: (B, ...) of this process.
        index: (M,) numbers in the order of `gather_own_first`, at most as many as the largest B.
        counts: B of every process, by rank.
        pack: to the form in which rows travel; where that loses anything on any process, they travel as they are.
        unpack: back from it.

    Returns:
        (M, ...) without gradient.
    """
    if world_size() == 1:
        return rows[index]
    starts = [0, *accumulate(counts)]  # rows are numbered through by rank
    by_rank = torch.cat([torch.arange(starts[r], starts[r + 1]) for r in _own_first()]).to(index.device)
    packed = pack(rows.detach())
    # one exchange tells everybody who wants which rows, and whether packing is without loss everywhere
    message = index.new_full((1 + max(counts),), -1)
    message[0] = (unpack(packed).to(rows.dtype) == rows).all()
    message[1 : 1 + len(index)] = by_rank[index]
    messages = [torch.empty_like(message) for _ in counts]
    dist.all_gather(messages, message)
    told = torch.stack(messages).tolist()
    lossless = all(row[0] for row in told)
    wishes = [[number for number in row[1:] if number >= 0] for row in told]
    if not lossless:
        packed = rows.detach()
    owner = partial(bisect_right, starts[1:])
    wanted = wishes[rank()]
    given = [[n - starts[rank()] for n in wish if owner(n) == rank()] for wish in wishes]
    owners = [owner(n) for n in wanted]
    received = packed.new_empty(len(wanted), *rows.shape[1:])
    sent = packed[torch.tensor(list(chain.from_iterable(given)), dtype=torch.long, device=rows.device)]
    dist.all_to_all_single(received, sent, [owners.count(r) for r in range(len(counts))], [len(g) for g in given])
    by_owner = sorted(range(len(wanted)), key=owners.__getitem__)  # (stable: as `given` is)
    fetched = torch.empty_like(received)
    fetched[torch.tensor(by_owner, dtype=torch.long, device=rows.device)] = received
    return unpack(fetched).to(rows.dtype) if lossless else fetched


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
