"""Rank, world size and gathering; everything also works without a process group, as one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Number of this process, 0 without a process group."""
    return dist.get_rank() if _initialised() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if _initialised() else 1


def gather_own_first(rows: Tensor) -> Tensor:
    """Rows of all processes, this one's first, then the others' in the order of their ranks.

    As published: only the own rows carry gradient, so that every process computes the whole contrast and differentiates
    its own share of it.

    Args:
        rows: (B, ...), B the same on every process.

    Returns:
        (world size * B, ...)
    """
    if world_size() == 1:
        return rows
    gathered = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(gathered, rows.detach().contiguous())
    own = gathered.pop(rank())
    assert own.shape == rows.shape
    return torch.cat([rows, *gathered])
