"""Rows that travel between processes: one process, and two against one."""

from collections.abc import Iterator
from contextlib import contextmanager
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
    picked = distributed.fetch_rows(torch.arange(4), torch.tensor([3, 0, 3]), [4], to_bytes, from_bytes)
    assert torch.equal(picked, torch.tensor([3, 0, 3]))


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


def fetch(rows: torch.Tensor, index: list[int]) -> torch.Tensor:
    return distributed.fetch_rows(rows, torch.tensor(index, dtype=torch.long), [2, 4], to_bytes, from_bytes)


def work(rank: int) -> dict[str, Any]:
    images, own = pairs()[0][own_rows(rank)], own_rows(rank)
    ratio = Ratio()
    ratio.update(mean(torch.tensor(float(rank)), 1 + 2 * rank))
    total, count = distributed.sum_over_processes(ratio.sums())
    wanted = [[5, 0], [0, 4, 1, 1]][rank]
    with travelling() as kinds:
        result = {
            "place": (distributed.rank(), distributed.world_size()),
            "images": distributed.all_gather_rows(images),
            "texts": distributed.all_gather_rows(texts()[rank]),
            "stacked": distributed.all_gather_rows(torch.stack([texts()[rank]] * 2, dim=1)),
            "fetched bytes": fetch(numbered(6)[own], wanted),
            "nothing fetched": fetch(numbered(6)[own], wanted[: 2 * rank]),
            "fetched floats": fetch(images, wanted),
            # only one process has rows that are no picture: both must know
            "fetched mixed": fetch(numbered(6)[own] + (0.001 if rank else 0), wanted),
            "own": contrast_and_gradients(rank, exact=False),
            "exact": contrast_and_gradients(rank, exact=True),
            "mean": total / count,
        }
    with distributed.single_process():
        result["alone"] = distributed.all_gather_rows(images)
    return result | {"kinds": kinds}


@contextmanager
def travelling() -> Iterator[list[torch.dtype]]:
    """The types of what was sent by all-to-all within it."""
    kinds, send = [], torch.distributed.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:

        def record(output: torch.Tensor, *arguments: Any) -> None:
            kinds.append(output.dtype)
            send(output, *arguments)

        patch.setattr(torch.distributed, "all_to_all_single", record)
        yield kinds


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


def test_rows_can_be_fetched_one_by_one(results):
    mixed = numbered(6)
    mixed[2:] += 0.001
    for kind, rows in {"floats": pairs()[0], "bytes": numbered(6), "mixed": mixed}.items():
        assert torch.equal(results[0][f"fetched {kind}"], rows[[5, 0]])
        assert torch.equal(results[1][f"fetched {kind}"], rows[[2, 3, 4, 5, 0, 1]][[0, 4, 1, 1]])
    assert [len(result["nothing fetched"]) for result in results] == [0, 2]


def test_pictures_travel_as_bytes_and_other_floats_as_they_are(results):
    for result in results:
        assert result["kinds"] == [torch.uint8, torch.uint8, torch.float32, torch.float32]


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
