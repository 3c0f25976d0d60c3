"""Requests of many users as batches: one thread computes, everybody waits for the own result."""

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from vlmo.errors import InputError


class Busy(Exception):
    """As many requests wait as may."""


class _Waiting(NamedTuple):
    kind: Hashable
    row: Any
    result: "Future[Any]"
    since: float


class Batcher:
    """Computes rows of one kind together.

    Args:
        compute: of a kind and its rows, one result for each row; may raise.
        batch_size: most rows of a batch.
        wait: seconds that the first row of a batch waits for others.
        limit: rows that may wait.

    Attributes:
        sizes: how many batches of each size were computed.
    """

    def __init__(
        self, compute: Callable[[Any, list[Any]], Sequence[Any]], batch_size: int, wait: float, limit: int
    ) -> None:
        self._compute, self._batch_size, self._wait, self._limit = compute, batch_size, wait, limit
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.sizes: dict[int, int] = {}
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """How many rows wait."""
        return len(self._queue)

    def submit(self, kind: Hashable, row: Any) -> "Future[Any]":
        """Puts a row in the queue, which leaves it uncomputed if its result is cancelled. Raises Busy if it is full."""
        with self._changed:
            if len(self._queue) >= self._limit or self._closed:
                raise Busy
            waiting = _Waiting(kind, row, Future(), time.monotonic())
            self._queue.append(waiting)
            self._changed.notify()
        return waiting.result

    def close(self) -> None:
        """Computes what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next():
            wanted = [each for each in batch if each.result.set_running_or_notify_cancel()]
            if wanted:
                self.sizes[len(wanted)] = self.sizes.get(len(wanted), 0) + 1
                self._settle(wanted)

    def _next(self) -> list[_Waiting]:
        """Waits for a batch; none when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return []
            first = self._queue[0]
            left = first.since + self._wait - time.monotonic()
            self._changed.wait_for(lambda: self._closed or len(self._of(first.kind)) >= self._batch_size, max(left, 0))
            batch = self._of(first.kind)[: self._batch_size]
            taken = set(map(id, batch))
            self._queue = deque(each for each in self._queue if id(each) not in taken)
            return batch

    def _of(self, kind: Hashable) -> list[_Waiting]:
        return [each for each in self._queue if each.kind == kind]

    def _settle(self, batch: list[_Waiting]) -> None:
        try:
            results = self._compute(batch[0].kind, [each.row for each in batch])
        except InputError as error:
            if len(batch) > 1:  # finds the one that it was
                for each in batch:
                    self._settle([each])
            else:
                batch[0].result.set_exception(error)
        except Exception as error:  # is raised where the result is waited for
            for each in batch:
                each.result.set_exception(error)
        else:
            for each, result in zip(batch, results, strict=True):
                each.result.set_result(result)
