"""Rank, world size, and how rows travel between processes; without a process group, everything works as one process.

Where rows of all processes come together, a process's own come first, then the others' in the order of their ranks.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlmo.distributed.wire_format import from_bytes, pack_texts, text_width, to_bytes, unpack_texts

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


def fetch_pairs(
    image: Tensor,
    ids: Tensor,
    masks: Tensor,
    image_index: Tensor,
    text_index: Tensor,
    shapes: Sequence[Sequence[int]],
    vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Fetches images and texts that are picked among those of all processes.

    Texts are gathered, two bytes a token; of images only those that are picked travel, each to who asked for it.

    Args:
        image: (B, 3, size, size); ids, masks: (B, T), of this process. They may lie beside the device of the exchange.
        image_index, text_index: (M,) numbers in the order of `all_gather_rows`, at most as many as the largest B.
        shapes: B and T of every process, by rank.

    Returns:
        images (M, 3, size, size), ids and masks (M, longest T), where the own ones lie, without gradient.
    """
    home, device = image.device, image_index.device
    if world_size() == 1:
        return image[image_index.to(home)], ids[text_index.to(ids.device)], masks[text_index.to(ids.device)]
    packed = pack_texts(ids.to(device), masks.to(device), vocab_size)
    packed = all_gather_rows(packed, shapes=[(count, length * text_width(vocab_size)) for count, length in shapes])
    counts = [count for count, _ in shapes]
    fetched = fetch_rows(image.to(device), image_index, counts, to_bytes, from_bytes)
    return fetched.to(home, image.dtype), *unpack_texts(packed[text_index], vocab_size)


@dataclass(frozen=True)
class ExchangePlan:
    """Which rows a process sends to whom, and how it sorts what it receives.

    Attributes:
        sent: its own rows, in the order of the ranks that they go to; send_counts: how many to each rank.
        receive_counts: how many come from each rank.
        order: (M,) for each received row, which of the requests it answers.
    """

    sent: list[int]
    send_counts: list[int]
    receive_counts: list[int]
    order: list[int]


def plan_exchange(requests: Sequence[Sequence[int]], counts: Sequence[int], own_rank: int) -> ExchangePlan:
    """Plans who sends which rows, from what every process requests.

    Args:
        requests: of each rank, the rows that it wants, numbered through by rank.
        counts: rows of each rank.
        own_rank: of the process whose part of the exchange is planned.
    """
    starts = [0, *accumulate(counts)]
    # rank 0 requests [4, 0] of counts [2, 3]: row 4 is of rank 1 (its row 2), row 0 of rank 0
    owners = [[bisect_right(starts, row) - 1 for row in wanted] for wanted in requests]
    sent = [
        [row - starts[own_rank] for row, owner in zip(wanted, its_owners, strict=True) if owner == own_rank]
        for wanted, its_owners in zip(requests, owners, strict=True)
    ]
    own = owners[own_rank]
    return ExchangePlan(
        sent=list(chain.from_iterable(sent)),
        send_counts=[len(rows) for rows in sent],
        receive_counts=[own.count(rank) for rank in range(len(counts))],
        order=sorted(range(len(own)), key=own.__getitem__),  # (rows come by owner; sorting is stable, as `sent` is)
    )


def fetch_rows(
    rows: Tensor,
    index: Tensor,
    counts: Sequence[int],
    pack: Callable[[Tensor], Tensor],
    unpack: Callable[[Tensor], Tensor],
) -> Tensor:
    """Fetches the rows that `index` picks among those of all processes; only these travel, each to who asked for it.

    Args:
        rows: (B, ...) of this process.
        index: (M,) numbers in the order of `all_gather_rows`, at most as many as the largest B.
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
    # one exchange tells everybody who requests which rows, and whether packing is without loss everywhere
    message = index.new_full((1 + max(counts),), -1)
    message[0] = (unpack(packed).to(rows.dtype) == rows).all()
    message[1 : 1 + len(index)] = by_rank[index]
    messages = [torch.empty_like(message) for _ in counts]
    dist.all_gather(messages, message)
    received_messages = torch.stack(messages).tolist()
    lossless = all(each[0] for each in received_messages)
    if not lossless:
        packed = rows.detach()
    requests = [[row for row in each[1:] if row >= 0] for each in received_messages]
    plan = plan_exchange(requests, counts, rank())
    received = packed.new_empty(len(plan.order), *rows.shape[1:])
    sent = packed[torch.tensor(plan.sent, dtype=torch.long, device=rows.device)]
    dist.all_to_all_single(received, sent, plan.receive_counts, plan.send_counts)
    fetched = torch.empty_like(received)
    fetched[torch.tensor(plan.order, dtype=torch.long, device=rows.device)] = received
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
