"""Reading ahead of remote and packed sources, by the order that is known: each batch says what will be needed later."""

import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from vlmo.datasets.base_dataset import ConcatDataset
from vlmo.errors import VLMoError

THREADS = 8  # of a process, that fetch


class Announcing(NamedTuple):
    """A batch: what it takes, and what will be needed some batches later."""

    keys: list[Any]
    units: list[tuple[int, int, int]]  # part, file, and block or row group


class AnnouncedBatches:
    """Batches of another sampler, each with the units that the samples `ahead` of it need.

    One that was needed within the last `ahead` samples is not named again; before that, the cache may have lost it.

    Attributes:
        sampler: of single samples; Lightning tells it the epoch.
    """

    def __init__(self, batches: Any, dataset: ConcatDataset, ahead: int) -> None:
        """
        Args:
            batches: lists of keys: numbers, or (number, seed).
            ahead: samples.
        """
        self.batches, self.dataset, self.ahead = batches, dataset, ahead
        self.sampler = getattr(batches, "sampler", None)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Announcing]:
        waiting: deque[Announcing] = deque()
        needed: dict[tuple[int, int, int], int] = {}  # by which sample last, in this order
        count = number = 0
        for batch in self.batches:
            keys = list(batch)
            units = self.dataset.units(_numbers(keys))
            new = [unit for unit in units if unit not in needed]
            for unit in units:
                needed.pop(unit, None)
                needed[unit] = number
            while needed and number - needed[oldest := next(iter(needed))] > self.ahead:
                del needed[oldest]
            waiting.append(Announcing(keys, new))
            count += len(keys)
            number += len(keys)
            if count > self.ahead:
                first = waiting.popleft()
                count -= len(first.keys)
                yield _with_all(first, waiting)
        while waiting:
            yield _with_all(waiting.popleft(), ())


def _with_all(batch: Announcing, waiting: Iterable[Announcing]) -> Announcing:
    """The batch with what those that wait need, which have then nothing to announce."""
    units = batch.units + list(chain.from_iterable(later.units for later in waiting))
    for later in waiting:
        later.units.clear()
    return batch._replace(units=units)


def _numbers(keys: list[Any]) -> np.ndarray:
    return np.array([key[0] if isinstance(key, tuple) else key for key in keys], np.int64)


class ReadAhead(Dataset):
    """Samples of another data set, taken by the batch; what a batch announces is fetched by threads meanwhile."""

    def __init__(self, dataset: ConcatDataset) -> None:
        self.dataset = dataset
        self._pid = 0
        self._queue: queue.SimpleQueue[tuple[Any, int]] = queue.SimpleQueue()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        return self.dataset[key]

    def __getitems__(self, batch: Announcing) -> list[Any]:
        """The samples of a batch; torch's loader calls it."""
        if self._pid != os.getpid():  # threads are not forked
            self._pid, self._queue = os.getpid(), queue.SimpleQueue()
            for _ in range(THREADS):
                threading.Thread(target=_fetch, args=(self._queue,), daemon=True).start()
        for part, table, unit in batch.units:
            self._queue.put((self.dataset.datasets[part].tables.reader(table), unit))
        return [self.dataset[key] for key in batch.keys]

    def __getstate__(self) -> dict[str, Any]:
        return {"dataset": self.dataset, "_pid": 0, "_queue": None}


def _fetch(waiting: "queue.SimpleQueue[tuple[Any, int]]") -> None:
    while True:
        reader, unit = waiting.get()
        with suppress(VLMoError):  # (whoever reads it meets the same)
            reader.fetch(unit)
