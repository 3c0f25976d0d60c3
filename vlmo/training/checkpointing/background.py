"""Writing while training goes on: a copy of the state in the CPU's memory, and a thread that makes and writes it."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def copied_to_cpu(state: Any, mesh: DeviceMesh | None = None) -> Any:
    """The state with all its tensors in new memory of the CPU.

    Args:
        mesh: of the CPUs, where tensors of the state are shared out.
    """
    if isinstance(state, DTensor):
        assert mesh is not None
        local = copied_to_cpu(state.to_local())
        size, stride = state.shape, state.stride()
        return DTensor.from_local(local, mesh, state.placements, run_check=False, shape=size, stride=stride)
    if isinstance(state, Tensor):
        pinned = state.device.type == "cuda"
        return torch.empty(state.shape, dtype=state.dtype, pin_memory=pinned).copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # (its type and attributes too)
        copied.update((name, copied_to_cpu(value, mesh)) for name, value in state.items())
        return copied
    if isinstance(state, list | tuple):
        return type(state)([copied_to_cpu(value, mesh) for value in state])
    return state


class CopyOfGPU:
    """Makes copies by `copied_to_cpu` in another thread, beside what the GPU computes; without a GPU there is no more
    to it. Made where the state is complete as far as that thread has asked the GPU for.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())

    def __call__(self, state: Any, mesh: DeviceMesh | None) -> Any:
        with torch.cuda.stream(self.stream):
            copied = copied_to_cpu(state, mesh)
        if self.stream:
            self.stream.synchronize()
        return copied


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
