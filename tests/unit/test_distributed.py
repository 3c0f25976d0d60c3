"""Rows that travel between processes: one process, and two against one."""

import multiprocessing
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from vlmo import distributed
from vlmo.metrics import Mean
from vlmo.modules.objectives.itc import contrast

WORLD = 2
SCALE = torch.tensor(1.0)


def test_one_process():
    rows = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.gather_own_first(rows) is rows
    assert torch.equal(distributed.fetch_rows(torch.arange(4), torch.tensor([3, 0, 3])), torch.tensor([3, 0, 3]))


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    image, text = F.normalize(torch.randn(2, 6, 4, generator=draw), dim=-1)
    return image, text


def own_rows(rank: int) -> slice:
    """Of six pairs, the first process has two and the second four: images that cannot be read are left out."""
    return (slice(0, 2), slice(2, 6))[rank]


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Trimmed to the longest of each process."""
    return torch.arange(6).reshape(2, 3) + 1, torch.arange(20).reshape(4, 5) + 1


def contrast_and_gradients(rank: int, exact: bool) -> dict[str, torch.Tensor]:
    image, text = (side[own_rows(rank)].clone().requires_grad_() for side in pairs())
    loss, logits, labels = contrast(image, text, SCALE, exact)
    loss.backward()
    size = len(image)
    return {"loss": loss.detach(), "logits": logits[:size, :size].detach(), "labels": labels, "gradient": image.grad}


def work(rank: int, folder: Path) -> None:
    try:
        torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD
        )
        images = pairs()[0][own_rows(rank)]
        mean = Mean()
        mean.update(torch.tensor(float(rank)), 1 + 2 * rank)
        wanted = torch.tensor([[5, 0, 2, 5], [0, 4, 1, 1]][rank])
        result = {
            "place": (distributed.rank(), distributed.world_size()),
            "images": distributed.gather_own_first(images),
            "texts": distributed.gather_own_first(texts()[rank]),
            "fetched": distributed.fetch_rows(images, wanted),
            "nothing fetched": distributed.fetch_rows(images, wanted[: 2 * rank]),
            "own": contrast_and_gradients(rank, exact=False),
            "exact": contrast_and_gradients(rank, exact=True),
            "mean": mean.compute(),
        }
        with distributed.alone():
            result["alone"] = distributed.gather_own_first(images)
        torch.save(result, folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()
    except Exception:
        (folder / f"{rank}.txt").write_text(traceback.format_exc())


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    for failure in folder.glob("*.txt"):
        pytest.fail(failure.read_text())
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_own_rows_come_first(results):
    image, _ = pairs()
    assert [result["place"] for result in results] == [(0, 2), (1, 2)]
    assert torch.equal(results[0]["images"], image)
    assert torch.equal(results[1]["images"], image[[2, 3, 4, 5, 0, 1]])


def test_shorter_rows_are_padded(results):
    short, long = texts()
    padded = F.pad(short, (0, 2))
    assert torch.equal(results[0]["texts"], torch.cat([padded, long]))
    assert torch.equal(results[1]["texts"], torch.cat([long, padded]))


def test_rows_can_be_fetched_one_by_one(results):
    image, _ = pairs()
    assert torch.equal(results[0]["fetched"], image[[5, 0, 2, 5]])
    assert torch.equal(results[1]["fetched"], image[[2, 3, 4, 5, 0, 1]][[0, 4, 1, 1]])
    assert [len(result["nothing fetched"]) for result in results] == [0, 2]


def test_alone_a_process_sees_its_own_rows(results):
    assert [len(result["alone"]) for result in results] == [2, 4]


@pytest.mark.parametrize("kind, factor", [("own", 1), ("exact", WORLD)])
def test_contrast_of_two_processes_is_that_of_one(results, kind, factor):
    image, text = (side.requires_grad_() for side in pairs())
    loss, logits, _ = contrast(image, text, SCALE, exact_gradient=False)
    loss.backward()
    for rank, result in enumerate(results):
        own, found = own_rows(rank), result[kind]
        assert torch.allclose(found["loss"], loss)
        assert torch.allclose(found["logits"], logits[own, own])
        assert found["labels"].tolist() == list(range(6))
        # published: each process differentiates its own rows alone, and data parallelism then takes the mean over the
        # processes; exact: the sum over the processes' losses, so that the mean is the gradient of the joint batch
        assert torch.allclose(found["gradient"], factor * image.grad[own], atol=1e-6)


def test_metrics_are_weighted_over_the_processes(results):
    assert [result["mean"].item() for result in results] == [0.75, 0.75]
