"""What the processes of a run send each other in an optimizer step, recorded in a single process without data.

`ledger` runs one step of rank 0 in a fake process group of the size in question: the model's weights, images and
activations are fake tensors (shapes alone), so that any model takes seconds and little memory; what is small and read,
such as the sizes of batches, is real. Collectives are recorded where torch is asked for them, whoever asks: the tasks,
DDP's reducer, FSDP2's hooks, metrics, callbacks. So none is counted by hand, and a new one is in the ledger by itself.
ZeRO is the exception: DeepSpeed does not run here, its collectives are computed (`_zero`). The algorithms that bytes
are of stand in `recording.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, OffloadPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from vlmo.batch import Batch, Field
from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.planning.recording import COMPUTED, Collective, Recorder, ring, together
from vlmo.settings import Settings
from vlmo.tasks import itm
from vlmo.training.callbacks import skipping
from vlmo.training.callbacks.signals import StopSignals
from vlmo.training.checkpointing.checkpoints import Checkpoints
from vlmo.training.sharding import ScalarsAsVectors, shard
from vlmo.training.unused_parameters import exclude_from_ddp

STRATEGIES = ("ddp", "fsdp2", "deepspeed_stage_1", "deepspeed_stage_2")
DEVICES_PER_NODE = 8
SETUP_PASSES = {"ddp": 2, "fsdp2": 1}  # in which a strategy also exchanges what it does not later
ZERO_BUCKET = 200_000_000  # elements, of Lightning's DeepSpeedStrategy
# Functions whose results a CPU's step reads: they are given real tensors.
READERS = ((skipping, "all_reduce_any"), (itm, "draw_negatives"))


def ledger(settings: Settings, world: int, strategy: str = "ddp") -> list[Collective]:
    """Lists what the busiest of `world` processes sends and receives in one optimizer step; a single one, nothing.

    Args:
        settings: of the run; if it is for another number, devices, nodes and `batch_size` are set by `laid_out`.
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
    if settings.devices * settings.num_nodes != world:
        settings = laid_out(settings, world)
    settings = settings.model_copy(update={"load_path": ""})
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
    layout = {"num_gpus": devices, "num_nodes": world // devices}
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

    device = torch.device("cpu")
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
    with torch.device("meta"):
        model = _Model(settings).train()
    with recorder.fake:
        model.to_empty(device="cpu")
    passes = settings.accumulated_batches
    with recorder, _readable():
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
    return together(calls)


class _Step:
    """A training step of rank 0, with those hooks of ours and of Lightning that exchange something, in their order."""

    def __init__(self, model: _Model, strategy: str) -> None:
        self.model, self.nonfinite = model, skipping.NonFinite(10)
        self.checkpoints = Checkpoints(model.settings, StopSignals())
        self.parallel: nn.Module = model
        if strategy == "ddp":
            exclude_from_ddp(model)
            self.parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, init_sync=False)
            self.parallel.register_comm_hook(None, _reduce_bucket)
        elif strategy == "fsdp2":
            ScalarsAsVectors(model)
            shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), OffloadPolicy())
        self.trainer = trainer = _trainer(self.parallel, model.device)
        model.trainer = trainer
        model.on_train_start()
        self.checkpoints.on_train_start(trainer, model)
        trainer.global_step = 1  # (at 0 no checkpoint can be due)

    def run_pass(self, batch: Batch, accumulates: bool = False) -> None:
        """Forward and backward; DDP leaves the gradients where they are if the pass `accumulates`."""
        _TrainingEpochLoop._broadcast_sigterm_tensor(SimpleNamespace(trainer=self.trainer))  # type: ignore[arg-type]
        self.checkpoints.on_train_batch_start(self.trainer, self.model, batch, 0)
        ddp = self.parallel if isinstance(self.parallel, DistributedDataParallel) else None
        with ddp.no_sync() if ddp and accumulates else nullcontext():
            loss = ddp(batch) if ddp else self.model.train_on(batch)
            self.nonfinite.on_before_backward(self.trainer, self.model, loss)
            self.model.backward(loss)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()

    def finish(self) -> None:
        """What comes before the optimizer's update, which sends nothing."""
        optimizer: Any = SimpleNamespace(param_groups=self.model.parameter_groups())
        self.nonfinite.on_before_optimizer_step(self.trainer, self.model, optimizer)
        self.model.on_before_optimizer_step(optimizer)


def _trainer(model: nn.Module, device: torch.device) -> Any:
    """What the hooks see of Lightning's trainer."""
    strategy = SimpleNamespace(root_device=device)
    counters = {"current_epoch": 0, "global_step": 0, "accumulate_grad_batches": 1}
    return SimpleNamespace(model=model, strategy=strategy, training=True, **counters)


def _reduce_bucket(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook; it would wait for an answer that a fake group does not give."""
    dist.all_reduce(bucket.buffer())
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _batch(model: VLMo, size: int) -> Batch:
    """A batch of that size with texts of the greatest length, every number of it 1."""
    sizes = {"B": size, "S": model.image_size, "P": model.transformer.window**2, "T": model.max_text_len, "K": 10}
    fields: dict[str, Field] = {name: field for task in model.tasks for name, field in task.own_fields.items()}
    # (with `layout_invariant`, random numbers follow from those of the samples)
    batch: Any = {"images_are_bytes": True, "raw_index": torch.arange(size)}
    for name, field in fields.items():
        shape = [size, *(sizes[each] if isinstance(each, str) else each for each in field.shape)]
        batch[name] = [""] * size if field.dtype is None else torch.ones(shape, dtype=field.dtype)
    for task in model.tasks:
        batch |= task.derived(batch)
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
        Collective(f"all-reduce{COMPUTED}", "gradients", buckets * reduced, *ring("all-reduce", size, world, reduced)),
        Collective(f"all-gather{COMPUTED}", "weights", buckets, *ring("all-gather", size // world, world)),
    ]


@contextmanager
def _readable() -> Iterator[None]:
    """Within it, READERS work on real tensors of the shapes that they are given."""
    with ExitStack() as patches:
        for module, name in READERS:
            patches.enter_context(mock.patch.object(module, name, _on_real_tensors(getattr(module, name))))
        yield


def _on_real_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any) -> Any:
        return function(*tree_map_only(FakeTensor, lambda each: torch.zeros(each.shape, dtype=each.dtype), args))

    return called
