"""What matching (ITM) sends per process and step, beside gathering all images as the published code does.

python -m benchmarks.itm_bytes [--processes 4] [--batch 16] [--image-size 64]

The published code gathers pictures as float32, token ids and masks as int64. First measured: every exchange of one
step's matching in that many gloo processes on this machine, counted where it is called, once with negatives drawn at
random and once with all processes wanting the pictures of a single one. What another process does not get (a process's
part for itself) is not counted. Then by the same count for the published size, a batch of 1,024 at 224 pixels over 16
to 128 processes.
"""

import argparse
import multiprocessing
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from vlmo.distributed.collectives import all_gather_rows, fetch_rows
from vlmo.distributed.wire_format import from_bytes, pack_texts, text_width, to_bytes

TEXT_LEN = 40
BATCH, SIZE, WORDS = 1024, 224, 30522  # published: stage 3


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes that this process sends to others within it, by kind of exchange."""
    sent: Counter[str] = Counter()
    others = dist.get_world_size() - 1
    gather, exchange = dist.all_gather, dist.all_to_all_single

    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        sent["gathered"] += own.nbytes * others
        gather(parts, own)

    def all_to_all_single(output: Tensor, rows: Tensor, received: Sequence[int], given: Sequence[int]) -> None:
        row = rows.nbytes // max(len(rows), 1)
        sent["pictures"] += row * (sum(given) - given[dist.get_rank()])
        exchange(output, rows, received, given)

    with mock.patch.multiple(dist, all_gather=all_gather, all_to_all_single=all_to_all_single):
        yield sent


def matching(images: Tensor, wanted: Tensor, counts: Sequence[int]) -> None:
    """The exchanges of ITM: texts of all, pictures that are wanted."""
    ids = torch.ones(len(images), TEXT_LEN, dtype=torch.long)
    texts = pack_texts(ids, ids, WORDS)
    all_gather_rows(texts, shapes=[(count, texts.shape[1]) for count in counts])
    fetch_rows(images, wanted, counts, to_bytes, from_bytes)


def work(rank: int, world: int, batch: int, size: int, meeting: str, results: Any) -> None:
    torch.set_num_threads(1)  # the threads of the parent do not exist in a forked process
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    own, draw = batch // world, torch.Generator().manual_seed(rank)
    images = from_bytes(torch.randint(0, 256, (own, 3, size, size), generator=draw))
    cases = {
        "typical": torch.randint(1, batch, (own,), generator=draw),
        # everybody else wants pictures of process 0, which come right after the own
        "worst": torch.arange(own) + (0 if rank == 0 else own),
    }
    for case, wanted in cases.items():
        with counted() as sent:
            matching(images, wanted, [own] * world)
        results.put((case, rank, sum(sent.values())))
    with counted() as sent:
        all_gather_rows(images, shapes=[(own, size)] * world)
        for _ in ("text_ids", "text_masks"):
            all_gather_rows(torch.zeros(own, TEXT_LEN, dtype=torch.long), shapes=[(own, TEXT_LEN)] * world)
    results.put(("all gathered", rank, sum(sent.values())))
    dist.destroy_process_group()


def measure(world: int, batch: int, size: int) -> dict[str, list[int]]:
    """Bytes sent by each process."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        processes = [
            context.Process(target=work, args=(rank, world, batch, size, meeting, results)) for rank in range(world)
        ]
        for process in processes:
            process.start()
        found = [results.get(timeout=300) for _ in range(3 * world)]
        for process in processes:
            process.join()
    return {case: [sent for kind, _, sent in sorted(found) if kind == case] for case, _, _ in found}


def by_formula(world: int, batch: int, size: int) -> dict[str, float]:
    """Bytes that the busiest process sends; the same count as `counted` takes."""
    own, others, pixels = batch // world, world - 1, 3 * size * size
    # texts, and the message of 1 + own int64, to every other process
    words = others * (own * TEXT_LEN * text_width(WORDS) + (1 + own) * 8)
    return {
        "all gathered": others * own * (pixels * 4 + 2 * TEXT_LEN * 8),
        "typical": words + own * others / world * pixels,  # as many are wanted of a process as it has, on average
        "worst": words + others * own * pixels,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16, help="pairs over all processes")
    parser.add_argument("--image-size", type=int, default=64)
    options = parser.parse_args()
    world, batch, size = options.processes, options.batch, options.image_size
    print(f"{'':<36}{'all gathered':>14}{'typical':>12}{'worst case':>12}{'  worst is less by':>18}")
    found = measure(world, batch, size)
    busiest = {case: max(sent) for case, sent in found.items()}
    formula = by_formula(world, batch, size)
    assert busiest["worst"] == formula["worst"] and busiest["all gathered"] == formula["all gathered"]
    print(line(f"measured: {batch} pairs, {size} px, {world} processes", busiest))
    for processes in (16, 32, 64, 128):
        print(line(f"computed: {BATCH} pairs, {SIZE} px, {processes} processes", by_formula(processes, BATCH, SIZE)))
    print("\nMB sent by the busiest process in a step")


def line(name: str, sent: dict[str, float]) -> str:
    shown = [sent["all gathered"], sent["typical"], sent["worst"]]
    megabytes = "".join(f"{number / 1e6:>{width}.2f}" for number, width in zip(shown, (14, 12, 12), strict=True))
    return f"{name:<36}{megabytes}{sent['all gathered'] / sent['worst']:>17.2f}x"


if __name__ == "__main__":
    main()
