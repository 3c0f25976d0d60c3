"""Rows that travel between processes: one process, and two against one."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.processes import in_processes
from vlmo.distributed import collectives as distributed
from vlmo.distributed.wire_format import from_bytes, pack_texts, to_bytes, unpack_texts
from vlmo.tasks.base import mean
from vlmo.tasks.itc import contrast
from vlmo.training.metrics import Ratio
from vlmo.transforms.square import to_tensor

WORLD = 2
SCALE = torch.tensor(1.0)


def test_one_process():
    rows = torch.ones(2, 3, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    assert distributed.all_gather_rows(rows) is rows
    assert distributed.gather_numbers([3, 5]) == [(3, 5)]
    picked, ids, _ = pick(numbered(6), TEXT_IDS, [3, 0, 3], [[6, 5]])
    assert torch.equal(picked, numbered(6)[[3, 0, 3]])
    assert torch.equal(ids, TEXT_IDS[[3, 0, 3]])


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


def numbered(size: int) -> torch.Tensor:
    """Pictures of bytes, as the transforms normalise them; the first of them tells which it is."""
    levels = torch.arange(size * 3 * 4, dtype=torch.uint8).reshape(size, 3, 2, 2)
    return from_bytes(levels)


TEXT_IDS = torch.tensor([[2, 5 + row, 3, 0, 0] for row in range(6)])


def pick(images, ids, index, shapes, as_bytes=True):
    """Images and their texts, by the same numbers."""
    index = torch.tensor(index, dtype=torch.long)
    return distributed.pick_pairs(images, ids, (ids > 0).long(), index, index, shapes, 64, as_bytes)


def work(rank: int) -> dict[str, Any]:
    images, own = pairs()[0][own_rows(rank)], own_rows(rank)
    ratio = Ratio()
    ratio.update(mean(torch.tensor(float(rank)), 1 + 2 * rank))
    total, count = distributed.sum_over_processes(ratio.sums())
    wanted, shapes = [[5, 0], [0, 4, 1, 1]][rank], [[2, 5], [4, 5]]
    result = {
        "place": (distributed.rank(), distributed.world_size()),
        "images": distributed.all_gather_rows(images),
        "texts": distributed.all_gather_rows(texts()[rank]),
        "stacked": distributed.all_gather_rows(torch.stack([texts()[rank]] * 2, dim=1)),
        "picked bytes": pick(numbered(6)[own], TEXT_IDS[own], wanted, shapes),
        "nothing picked": pick(numbered(6)[own], TEXT_IDS[own], wanted[: 2 * rank], shapes)[0],
        "picked floats": pick(images, TEXT_IDS[own], wanted, shapes, as_bytes=False),
        "numbers": distributed.gather_numbers([rank, 7]),
        "any": [distributed.any_process(bool(rank)), distributed.any_process(False)],
        "own": contrast_and_gradients(rank, exact=False),
        "exact": contrast_and_gradients(rank, exact=True),
        "mean": total / count,
    }
    with distributed.single_process():
        result["alone"] = distributed.all_gather_rows(images)
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return in_processes(work, tmp_path_factory.mktemp("processes"), WORLD)


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

    assert torch.equal(results[1]["stacked"], torch.cat([long, padded])[:, None].expand(-1, 2, -1))


def test_pairs_are_picked_among_those_of_all_processes(results):
    order = (range(6), [2, 3, 4, 5, 0, 1])  # the own rows come first
    wanted = ([5, 0], [0, 4, 1, 1])
    for rank, result in enumerate(results):
        rows = [order[rank][number] for number in wanted[rank]]
        images, ids, masks = result["picked bytes"]
        assert images.dtype == torch.uint8
        assert torch.equal(from_bytes(images), numbered(6)[rows])
        assert torch.equal(ids, TEXT_IDS[rows])
        assert torch.equal(masks, (TEXT_IDS[rows] > 0).long())
        assert torch.equal(result["picked floats"][0], pairs()[0][rows])
    assert [len(result["nothing picked"]) for result in results] == [0, 2]


def test_plain_numbers_of_all_processes(results):
    for result in results:
        assert result["numbers"] == [(0, 7), (1, 7)]
        assert result["any"] == [True, False]


@pytest.mark.parametrize("vocab_size, width", [(32767, 2), (32768, 4)])
def test_texts_survive(vocab_size, width):
    ids, masks = torch.tensor([[2, vocab_size - 1, 3, 0], [2, 7, 3, 0]]), torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    packed = pack_texts(ids, masks, vocab_size)
    assert packed.shape == (2, 4 * width)
    found, kept = unpack_texts(F.pad(packed, (0, 2 * width)), vocab_size)  # padded as a longer text needs it
    assert torch.equal(kept, F.pad(masks, (0, 2)))
    assert torch.equal(found, F.pad(ids * masks, (0, 2)))


def test_every_level_of_a_picture_survives():
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    picture = to_tensor(Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).numpy()))
    assert torch.equal(to_bytes(picture), levels.expand(3, -1, -1))
    assert torch.equal(from_bytes(to_bytes(picture)), picture)


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
