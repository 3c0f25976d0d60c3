"""Gathering in one process, and in two against one."""

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlmo import distributed
from vlmo.metrics import Mean
from vlmo.modules.objectives.itc import contrast

WORLD = 2


def test_one_process():
    rows = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_own_first(rows) is rows


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 6, 4, generator=draw), dim=-1)
    return image, text


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    own = slice(3 * rank, 3 * rank + 3)
    image, text = (side[own].clone().requires_grad_() for side in pairs())
    gathered = distributed.gather_own_first(image)
    loss, logits, labels = contrast(image, text, torch.tensor(1.0))
    loss.backward()
    mean = Mean()
    mean.update(torch.tensor(float(rank)), 1 + 2 * rank)
    result = {
        "place": (distributed.rank(), distributed.world_size()),
        "gathered": gathered.detach(),
        "loss": loss.detach(),
        "labels": labels,
        "own_logits": logits[:3, :3].detach(),
        "gradient": image.grad,
        "mean": mean.compute(),
    }
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_own_rows_come_first(results):
    image, _ = pairs()
    assert [result["place"] for result in results] == [(0, 2), (1, 2)]
    assert torch.equal(results[0]["gathered"], image)
    assert torch.equal(results[1]["gathered"], image[[3, 4, 5, 0, 1, 2]])


def test_contrast_of_two_processes_is_that_of_one(results):
    image, text = (side.requires_grad_() for side in pairs())
    loss, logits, _ = contrast(image, text, torch.tensor(1.0))
    loss.backward()
    for rank, result in enumerate(results):
        own = slice(3 * rank, 3 * rank + 3)
        assert torch.allclose(result["loss"], loss)
        assert torch.allclose(result["own_logits"], logits[own, own])
        assert result["labels"].tolist() == list(range(6))
        # every process computes the whole loss and differentiates its own rows
        assert torch.allclose(result["gradient"], image.grad[own], atol=1e-6)


def test_metrics_are_weighted_over_the_processes(results):
    assert [result["mean"].item() for result in results] == [0.75, 0.75]
