"""Ordered work in several processes that end with the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from vlmo.errors import VLMoError


class Workers:
    """`number` processes besides this one, started at the first use; with 1 (or 0) the work is done in this one."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.parallel = number > 1
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        is_far_ahead: Callable[[], bool] | None = None,
    ) -> Iterator[Any]:
        """The results of `function(*arguments)` in the order of `calls`.

        Args:
            is_far_ahead: shall no further call be taken before the first that is under way has its result? By default,
                when more are under way than the processes can begin.
        """
        if not self.parallel:
            yield from (function(*arguments) for arguments in calls)
            return
        if self._pool is None:
            # Not forked: a fork copies locks that other threads of the caller (pyarrow, torch) may hold.
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.number, mp_context=context, initializer=_start)
        pending: deque[Future] = deque()
        is_far_ahead = is_far_ahead or (lambda: len(pending) > self.number + 1)
        try:
            for arguments in calls:
                pending.append(self._pool.submit(function, *arguments))
                while pending and (pending[0].done() or is_far_ahead()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise VLMoError(
                "a worker process ended: out of memory (use fewer num_workers), or the calling script does not guard "
                'its work with `if __name__ == "__main__":`'
            ) from error

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def _start() -> None:
    """Ctrl-C is the parent's to handle; a worker whose parent was killed must not stay behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
