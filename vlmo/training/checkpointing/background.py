"""Writing while training goes on: a copy of the state in the CPU's memory, and a thread that writes it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Staging:
    """Copies states to the CPU, each into the memory of the one before: to get new memory takes longer than to copy.

    It holds as much as one state, as long as it lives.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, state: Any, mesh: DeviceMesh | None = None) -> Any:
        """The state as it is now, whatever becomes of it; valid until the next call.

        Args:
            mesh: of the CPUs, where tensors of the state are shared out.
        """
        copied = self._copy(state, (), mesh)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copied

    def _copy(self, each: Any, place: tuple[Any, ...], mesh: DeviceMesh | None) -> Any:
        if isinstance(each, DTensor):
            assert mesh is not None
            local = self._to_buffer(each.to_local(), place)
            layout = {"shape": each.shape, "stride": each.stride(), "run_check": False}
            return DTensor.from_local(local, mesh, each.placements, **layout)
        if isinstance(each, Tensor):
            return self._to_buffer(each, place)
        if isinstance(each, dict):
            copied = copy.copy(each)  # (its type and attributes too)
            copied.update((name, self._copy(value, (*place, name), mesh)) for name, value in each.items())
            return copied
        if isinstance(each, list | tuple):
            values = [self._copy(value, (*place, i), mesh) for i, value in enumerate(each)]
            return values if isinstance(each, list) else tuple(values)
        return each

    def _to_buffer(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            buffer = self._buffers[place] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return buffer.copy_(tensor, non_blocking=True)


class BackgroundWork:
    """At most one piece of work in a thread; whoever starts the next, or has to know, waits for it."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Raises what the work before raised."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint-writer")
        self._thread.start()

    def wait(self) -> None:
        """Until it is done; raises what it raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # is raised in the thread that waits
            self._error = error
