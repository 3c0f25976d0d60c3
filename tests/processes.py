"""Work in several processes of this machine that form a gloo group."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def in_processes(work: Callable[[int], Any], folder: Path, world: int = 2, seconds: float = 60) -> list[Any]:
    """What `work(rank)` returns in each of `world` forked processes; fails if one raises or takes longer."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_work, args=(work, rank, world, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
    for failure in folder.glob("*.txt"):
        pytest.fail(failure.read_text())
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
    assert not late, f"processes {late} hang"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _work(work: Callable[[int], Any], rank: int, world: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world
        )
        torch.save(work(rank), folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
