"""Ordered work on Ray: on the cluster that `ray start` or RAY_ADDRESS names, else in processes of this machine."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from typing import Any

from vlmo.errors import VLMoError
from vlmo.utils.workers import Workers

RETRIES = 3  # of a call whose process or machine was lost


class RayWorkers(Workers):
    """`number` calls at a time, each in a process of Ray's; all machines must see the same files by the same paths.

    A call whose process was killed is made again, so it must be one that can be: what it reads stays, what it writes is
    overwritten.
    """

    def __init__(self, number: int) -> None:
        """
        Raises:
            VLMoError: if Ray is not installed, or `number` is no number of processes.
        """
        if find_spec("ray") is None:
            raise VLMoError("engine=ray: Ray is not installed; run pip install 'vlmo[ray]', or leave engine out")
        if number < 1:
            raise VLMoError(f"num_workers={number}: must be 1 or more with engine=ray")
        super().__init__(number)
        self.parallel = True
        self._connected = False

    def map(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[Any, ...]],
        is_far_ahead: Callable[[], bool] | None = None,
    ) -> Iterator[Any]:
        """As `Workers.map`; at most two calls a process are under way.

        Raises:
            VLMoError: if a process is lost again and again.
        """
        import ray

        self._connect()
        remote = ray.remote(max_retries=RETRIES)(function)
        pending: deque[Any] = deque()

        def first() -> Any:
            try:
                return ray.get(pending.popleft())
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as error:
                raise VLMoError(
                    f"engine=ray: a call was lost {RETRIES + 1} times ({error}); is memory short? use fewer num_workers"
                ) from error

        for arguments in calls:
            pending.append(remote.remote(*arguments))
            while pending and (len(pending) >= 2 * self.number or (is_far_ahead and is_far_ahead())):
                yield first()
        while pending:
            yield first()

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError:  # there is no cluster
            ray.init(
                address="local",
                num_cpus=self.number,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        self._connected = True

    def close(self) -> None:
        if self._connected:
            import ray

            ray.shutdown()
            self._connected = False


ENGINES: dict[str, type[Workers]] = {"processes": Workers, "ray": RayWorkers}
