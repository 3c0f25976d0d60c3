"""Records the collectives that are called in a fake process group: operation, purpose and bytes of each.

Bytes are those of the ring algorithms, which NCCL uses for large buffers, for w processes:

    all-reduce       sends and receives 2 (w - 1) / w of the buffer
    all-gather       sends and receives w - 1 parts, a part being what each process gives
    reduce-scatter   sends and receives w - 1 parts, a part being what each process gets
    broadcast        sends and receives the buffer (of the processes in the middle of the chain)
"""

import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlmo.errors import VLMoError

LARGE = 2**20  # elements from which on a new tensor is fake

ITM = "ITM images and texts"  # told apart by their shapes
# What a collective is for, by the file and function that it is called in, or is called on behalf of.
PURPOSES = {
    "base.of_all_processes": "sizes (CPU)",
    "collectives.pick_pairs": ITM,
    "collectives.mean_gradients": "gradients",
    "collectives.backward": "gradients of contrast features",
    "itc.contrast": "contrast features",
    "itc._image_keys": "which images are the same",
    "contrast_losses.siglip": "contrast features",
    "itm.prepare": "keys of the draws",
    "whole_batch._shares": "items (CPU)",
    "metrics.compute_step": "metrics",
    "checkpoints._is_due": "is a checkpoint due",
    "checkpoints.on_train_batch_start": "shall it stop",
    "training_epoch_loop._broadcast_sigterm_tensor": "shall it stop (Lightning)",
    "skipping.on_before_optimizer_step": "finite check",
    "communication._reduce_bucket": "gradients",
}

# By torch's name: ours, and which argument holds what a process gives (gets, of a reduce-scatter)
OPERATIONS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0),
    "_c10d_functional::all_gather_into_tensor": ("all-gather", 0),
}
COMPUTED = " (computed)"  # behind an operation that was not recorded
NO_DATA = ("c10d::barrier", "_c10d_functional::wait_tensor", "_c10d_functional::_wrap_tensor_autograd")


@dataclass(frozen=True)
class Collective:
    """Calls of one kind in an optimizer step.

    Attributes:
        operation: "all-reduce", "all-gather", ...; "(computed)" behind it says that it was not recorded.
        what: is sent.
        count: of the calls.
        sent, received: bytes of all of them together, for the busiest process.
    """

    operation: str
    what: str
    count: int
    sent: int
    received: int


class Recorder(TorchDispatchMode):
    """Records the collectives that are called within it, and makes large new tensors fake ones.

    Attributes:
        fake: of the tensors that have a shape alone; they can be mixed with real ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.calls: list[Collective] = []

    def take(self) -> list[Collective]:
        """The calls since the last time, in their order."""
        calls, self.calls = self.calls, []
        return calls

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # it comes here again with the parts of this process, and with what DTensor sends
            return NotImplemented
        name = func._schema.name
        if func.namespace in ("c10d", "_c10d_functional") and name not in NO_DATA:
            self.calls.append(_collective(name, args))
        if func is torch.ops.aten.nonzero.default and isinstance(args[0], FakeTensor):
            # the rows that a CPU computes: all, as a GPU does
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.long)
        # (DTensor works shapes out within a fake mode of its own)
        with self.fake if _is_large(args) and detect_fake_mode() is None else nullcontext():
            return func(*args, **(kwargs or {}))


def _is_large(args: tuple[Any, ...]) -> bool:
    """Whether these are arguments of a function that makes a large tensor of nothing but its shape."""
    shape = args[0] if args else None
    return isinstance(shape, list | tuple) and all(isinstance(n, int) for n in shape) and math.prod(shape) >= LARGE


def _collective(name: str, args: tuple[Any, ...]) -> Collective:
    """One call of a collective.

    Raises:
        VLMoError: for one whose bytes are not known.
    """
    if name not in OPERATIONS:
        raise VLMoError(f"{name}: what it sends is not known; add it to OPERATIONS in vlmo/planning/recording.py")
    operation, position = OPERATIONS[name]
    world, what = dist.get_world_size(), _purpose(operation)
    parts = [part for part in tree_leaves(args[position]) if isinstance(part, Tensor)]
    if what == ITM:
        what = "ITM images" if parts[0].ndim > 3 else "ITM texts"
    return Collective(operation, what, 1, *ring(operation, sum(part.nbytes for part in parts), world))


def ring(operation: str, size: int, world: int, times: int = 1) -> tuple[int, int]:
    """Bytes that a process sends and receives, see above."""
    if operation == "all-reduce":
        size = 2 * (world - 1) * size // world
    elif operation in ("all-gather", "reduce-scatter"):
        size = (world - 1) * size
    return size * times, size * times


def _purpose(operation: str) -> str:
    """What the collective that is being called is for: see PURPOSES; otherwise the function that calls it."""
    caller = ""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module, function = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith("torch.distributed.fsdp"):
            return "weights" if operation == "all-gather" else "gradients"
        place = f"{module.rpartition('.')[2]}.{function}"
        if place in PURPOSES:
            return PURPOSES[place]
        if not caller and not module.startswith(("torch.", "vlmo.distributed.", "vlmo.planning.")):
            caller = place
        frame = frame.f_back
    return caller


def together(calls: list[Collective]) -> list[Collective]:
    """Sums up the calls of the same operation for the same purpose, the largest first."""
    found: dict[tuple[str, str], Collective] = {}
    for call in calls:
        key = (call.operation, call.what)
        before = found.get(key, Collective(*key, 0, 0, 0))
        sums = before.count + call.count, before.sent + call.sent, before.received + call.received
        found[key] = Collective(*key, *sums)
    return sorted(found.values(), key=lambda each: -each.sent)
