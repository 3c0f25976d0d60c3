"""What the processes of a run send each other in an optimizer step, recorded in a single process without data.

`ledger` runs one step of rank 0 in a fake process group of the size in question: the model's weights, images and
activations are fake tensors (shapes alone), so that any model takes seconds and little memory; what is small and read,
such as the sizes of batches, is real. Collectives are recorded where torch is asked for them, whoever asks: the tasks,
DDP's reducer, FSDP2's hooks, metrics, callbacks. So none is counted by hand, and a new one is in the ledger by itself.
ZeRO is the exception: DeepSpeed does not run here, its collectives are computed (`_zero`).

Bytes are those of the ring algorithms, which NCCL uses for large buffers, for w processes:

    all-reduce       sends and receives 2 (w - 1) / w of the buffer
    all-gather       sends and receives w - 1 parts, a part being what each process gives
    reduce-scatter   sends and receives w - 1 parts, a part being what each process gets
    all-to-all       sends and receives what is of other processes
    broadcast        sends and receives the buffer (of the processes in the middle of the chain)
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vlmo.batch import Batch, Field
from vlmo.distributed import collectives
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.modules.block import Block
from vlmo.settings import Settings
from vlmo.training.callbacks import skipping
from vlmo.training.strategy import ScalarsAsVectors
from vlmo.training.unused_parameters import exclude_from_ddp, unused_parameters

STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2")
DEVICES_PER_NODE = 8
SETUP_PASSES = {"ddp": 2, "fsdp2": 1}  # in which a strategy also exchanges what it does not later
ZERO_BUCKET = 200_000_000  # elements, of Lightning's DeepSpeedStrategy
LARGE = 2**20  # elements from which on a new tensor is fake

# What a collective is for, by the file and function that it is called in, or is called on behalf of.
PURPOSES = {
    "collectives.gather_shapes": "sizes",
    "collectives.fetch_rows": "ITM images",
    "collectives.fetch_pairs": "ITM texts",
    "collectives.mean_gradients": "gradients",
    "collectives.backward": "gradients of contrast features",
    "itc.contrast": "contrast features",
    "metrics.compute_step": "metrics",
    "skipping.on_before_optimizer_step": "finite check",
    "communication._reduce_bucket": "gradients",
}
# Functions that read what they exchanged: they are given real tensors, black images and indices of the first row.
READERS = ("all_reduce_any", "fetch_rows")

# By torch's name: ours, and which argument holds what a process gives (gets, of a reduce-scatter)
OPERATIONS = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::allreduce_coalesced_": ("all-reduce", 0),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_into_tensor_coalesced_": ("all-gather", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 0),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 0),
    "c10d::alltoall_base_": ("all-to-all", 1),
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


def ledger(settings: Settings, world: int, strategy: str = "ddp") -> list[Collective]:
    """Lists what the busiest of `world` processes sends and receives in one optimizer step; a single one, nothing.

    Args:
        settings: of the run; devices, nodes and `batch_size` are set by `laid_out`.
        strategy: one of `STRATEGIES`.

    Raises:
        VLMoError: for another strategy, and within a process group.
    """
    if strategy not in STRATEGIES:
        raise VLMoError(f"strategy={strategy!r}: its communication is not known; give one of {', '.join(STRATEGIES)}")
    if dist.is_initialized():
        raise VLMoError("the ledger needs a process of its own: this one belongs to a process group")
    if world == 1:
        return []
    settings = laid_out(settings, world)
    with _fake_group(world):
        return _record_step(settings, strategy)


def laid_out(settings: Settings, world: int) -> Settings:
    """Gives the settings of the run on `world` devices, 8 a node, with the nearest `batch_size` that fits.

    Raises:
        VLMoError: if the nodes cannot be full.
    """
    if world < 1 or (world > DEVICES_PER_NODE and world % DEVICES_PER_NODE):
        raise VLMoError(f"a world of {world} processes: give up to {DEVICES_PER_NODE}, or a multiple of it")
    devices = min(world, DEVICES_PER_NODE)
    a_pass = settings.per_gpu_batchsize * world
    layout = {"num_gpus": devices, "num_nodes": world // devices, "load_path": ""}
    return settings.model_copy(update=layout | {"batch_size": max(round(settings.batch_size / a_pass), 1) * a_pass})


@contextmanager
def _fake_group(world: int) -> Iterator[None]:
    """A process group that sends nothing: every other process is taken to hold what this one, rank 0, holds."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


# --- the step --------------------------------------------------------------------------------------------------------


class _Model(VLMo):
    """Logs nothing, and runs the training step where DDP calls `forward`, as under Lightning."""

    within = False  # whether it is the step that calls `forward`

    def forward(self, batch: Batch) -> Any:
        return super().forward(batch) if self.within else self.train_on(batch)

    def train_on(self, batch: Batch) -> Tensor:
        """The loss of a training batch."""
        self.within = True
        loss = self.training_step(batch, 0)
        self.within = False
        assert loss is not None
        return loss

    def log(self, *args: Any, **kwargs: Any) -> None: ...

    def log_dict(self, *args: Any, **kwargs: Any) -> None: ...


def _record_step(settings: Settings, strategy: str) -> list[Collective]:
    recorder = Recorder()
    with recorder.fake:
        model = _Model(settings).train()
    for parameter in model.parameters():
        parameter.constant = None  # (torch remembers the values of fake scalars, in their first shape)
    passes = settings.accumulated_batches
    with recorder, _real_arguments(READERS), mock.patch.object(skipping, "get_total_norm", _total_norm):
        batch = _batch(model, settings.training_batch)
        step = _Step(model, strategy)
        for _ in range(SETUP_PASSES.get(strategy, 0)):
            step.run_pass(batch)
        recorder.take()
        accumulated: list[Collective] = []
        if passes > 1:
            step.run_pass(batch, accumulates=True)
            accumulated = recorder.take()
        step.run_pass(batch)
        step.finish()
    calls = accumulated * (passes - 1) + recorder.take()
    if strategy.startswith("deepspeed"):
        calls = [*_zero(model, strategy, passes), *calls]
    return _together(calls)


class _Step:
    """A training step of rank 0, with the hooks that exchange something in the order of `docs/training_step.md`."""

    def __init__(self, model: _Model, strategy: str) -> None:
        self.model, self.nonfinite = model, skipping.NonFinite(10)
        self.parallel: nn.Module = model
        if strategy == "ddp":
            exclude_from_ddp(model)
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
            self.parallel.register_comm_hook(None, _reduce_bucket)
        elif strategy == "fsdp2":
            shard(model)
        device = next(model.parameters()).device
        place = SimpleNamespace(root_device=device)
        self.trainer: Any = SimpleNamespace(model=self.parallel, strategy=place, training=True)
        model.trainer = self.trainer
        model.on_train_start()

    def run_pass(self, batch: Batch, accumulates: bool = False) -> None:
        """Forward and backward; DDP leaves the gradients where they are if the pass `accumulates`."""
        ddp = self.parallel if isinstance(self.parallel, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and accumulates else nullcontext():
            loss = ddp(batch) if ddp else self.model.train_on(batch)
            self.nonfinite.on_before_backward(self.trainer, self.model, loss)
            self.model.backward(loss)

    def finish(self) -> None:
        """What comes before the optimizer's update, which sends nothing."""
        optimizer: Any = SimpleNamespace(param_groups=self.model.parameter_groups())
        self.nonfinite.on_before_optimizer_step(self.trainer, self.model, optimizer)
        self.model.on_before_optimizer_step(optimizer)


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, of which FSDP2 leaves each process a part."""
    norm = get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _reduce_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook; it would wait for an answer that a fake group does not give."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def shard(model: VLMo) -> None:
    """Shards a model over all processes as FSDP2 does: each block by itself, and the rest together.

    Weights stay in float32 on the way, as under Lightning's mixed precision.
    """
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ScalarsAsVectors(model)
    names = unused_parameters(model)
    ignored = {parameter for name, parameter in model.named_parameters() if name in names}
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, ignored_params=ignored)
    fully_shard(model, mesh=mesh, ignored_params=ignored)


def _batch(model: VLMo, size: int) -> Batch:
    """A batch of that size with texts of the greatest length, every number of it 1."""
    sizes = {"B": size, "S": model.image_size, "P": model.transformer.window**2, "T": model.max_text_len, "K": 10}
    fields: dict[str, Field] = {name: field for task in model.tasks for name, field in task.fields.items()}
    batch: Any = {}
    for name, field in fields.items():
        shape = [size, *(sizes[each] if isinstance(each, str) else each for each in field.shape)]
        batch[name] = [""] * size if field.dtype is None else torch.ones(shape, dtype=field.dtype)
    for task in model.tasks:
        batch |= task.derive(batch)
    return batch


def _zero(model: VLMo, strategy: str, passes: int) -> list[Collective]:
    """What DeepSpeed's ZeRO stage 1 or 2 exchanges of gradients and weights, computed.

    Gradients are summed by all-reduces of whole buckets: the default (use_multi_rank_bucket_allreduce), although each
    process keeps its part alone. Stage 1 does so once a step, stage 2 after each pass. After the update the parts of
    the weights are gathered. Both travel in the precision of the weights, 16 bits unless precision=32.
    (https://www.deepspeed.ai/docs/config-json/, https://github.com/deepspeedai/DeepSpeed/discussions/5560)
    """
    width = 4 if str(model.settings.precision) == "32" else 2
    size = width * sum(parameter.numel() for _, parameter in model.trained_parameters())
    reduced = passes if strategy == "deepspeed_stage_2" else 1
    world = dist.get_world_size()
    buckets = math.ceil(size / width / ZERO_BUCKET)
    return [
        Collective(f"all-reduce{COMPUTED}", "gradients", buckets * reduced, *_ring("all-reduce", size, world, reduced)),
        Collective(f"all-gather{COMPUTED}", "weights", buckets, *_ring("all-gather", size // world, world)),
    ]


# --- recording -------------------------------------------------------------------------------------------------------


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
        NotImplementedError: for one whose bytes are not known.
    """
    if name not in OPERATIONS:
        raise NotImplementedError(f"{name}: the ledger does not know what it sends; add it to OPERATIONS")
    operation, position = OPERATIONS[name]
    world, buffer = dist.get_world_size(), args[position]
    size = sum(part.nbytes for part in tree_leaves(buffer) if isinstance(part, Tensor))
    if operation == "all-to-all":
        sent, received = (_of_others(args[1], args[4], world), _of_others(args[0], args[3], world))
        return Collective(operation, _purpose(operation), 1, sent, received)
    return Collective(operation, _purpose(operation), 1, *_ring(operation, size, world))


def _ring(operation: str, size: int, world: int, times: int = 1) -> tuple[int, int]:
    """Bytes that a process sends and receives, see above."""
    if operation == "all-reduce":
        size = 2 * (world - 1) * size // world
    elif operation in ("all-gather", "reduce-scatter"):
        size = (world - 1) * size
    return size * times, size * times


def _of_others(rows: Tensor, counts: list[int], world: int) -> int:
    """Bytes of an all-to-all's rows that go to, or come from, other processes than rank 0, which runs."""
    own = counts[0] / max(sum(counts), 1) if counts else 1 / world
    return round(rows.nbytes * (1 - own))


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
        if not caller and not module.startswith(("torch.", "vlmo.distributed.", __name__)):
            caller = place
        frame = frame.f_back
    return caller


def _together(calls: list[Collective]) -> list[Collective]:
    """Sums up the calls of the same operation for the same purpose, the largest first."""
    found: dict[tuple[str, str], Collective] = {}
    for call in calls:
        key = (call.operation, call.what)
        before = found.get(key, Collective(*key, 0, 0, 0))
        sums = before.count + call.count, before.sent + call.sent, before.received + call.received
        found[key] = Collective(*key, *sums)
    return sorted(found.values(), key=lambda each: -each.sent)


@contextmanager
def _real_arguments(names: Iterable[str]) -> Iterator[None]:
    """Has functions of `vlmo.distributed` work on real tensors of the shapes that they are given."""
    with ExitStack() as patches:
        for name in names:
            function = getattr(collectives, name)
            for module in [m for m in sys.modules.values() if getattr(m, name, None) is function]:
                patches.enter_context(mock.patch.object(module, name, _on_real_tensors(function)))
        yield


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        return function(*tree_map_only(FakeTensor, _real, args))

    return called


def _real(tensor: Tensor) -> Tensor:
    """Black images; False; indices of the first row."""
    return torch.full(tuple(tensor.shape), -1 if tensor.is_floating_point() else 0, dtype=tensor.dtype)
