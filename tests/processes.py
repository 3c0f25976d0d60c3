"""Work in several processes of this machine: as a gloo group, or as torchrun would start them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmo.training.runner import run

TIMEOUT = 150  # seconds


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(rank: int, world: int, port: int, config: Mapping[str, Any], folder: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ.update({name: str(value) for name, value in (place | meeting).items()})
    torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
    try:
        torch.save(run(config), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)  # the others see that it is gone
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def start_on(world: int, config: Mapping[str, Any], folder: Path) -> list[Any]:
    """Starts `run` on each of `world` CPU processes; `folder` is for what they leave, and new."""
    folder.mkdir(parents=True)
    config = {**config, "num_gpus": world, "accelerator": "cpu"}
    context = multiprocessing.get_context("fork")
    port = free_port()
    processes = [context.Process(target=_run, args=(rank, world, port, config, folder)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def run_on(world: int, config: Mapping[str, Any], folder: Path) -> list[dict[str, float]]:
    """What `run` returns on each of `world` CPU processes; `folder` is for what they leave, and new."""
    processes = start_on(world, config, folder)
    for process in processes:
        process.join(TIMEOUT)
    failures = [path.read_text() for path in sorted(folder.glob("*.txt"))]
    for process in processes:
        if process.is_alive():
            process.kill()
            failures.append(f"killed after {TIMEOUT} s")
    assert not failures, "\n".join(failures)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]
