"""The memory of a device in training, by part, and the largest `per_gpu_batchsize` that it has room for.

The step itself is measured, on tensors without data (`step.py`). What sharding leaves of weights, gradients and
optimizer, and the buffers that it exchanges them in, is computed:

    ddp                nothing is shared out; the gradients lie in the buckets that are exchanged
    fsdp2              each process keeps its part of weights, gradients and optimizer. At a time there are, whole: what
                       lies outside the blocks; the weights of two blocks, and the buffer that a third arrives in; and
                       the gradients of the largest unit, with their copy in the order in which they are exchanged
    deepspeed_stage_1  16-bit weights and gradients whole; 32-bit weights and optimizer in parts; two buckets
    deepspeed_stage_2  and the gradients in parts (ZeRO: arXiv 1910.02054, section 5)

Where all processes' features, texts and images are gathered, they count as exchange buffers too.
"""

from bisect import bisect
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property

import torch

from vlmo.errors import VLMoError
from vlmo.modules import VLMo
from vlmo.modules.block import Block
from vlmo.planning.communication import STRATEGIES, ZERO_BUCKET, Collective
from vlmo.planning.step import StepCost, autocast_type, step_cost
from vlmo.settings import Settings
from vlmo.training.optimizer import state_share
from vlmo.training.unused_parameters import unused_parameters

SMALLEST, LARGEST = 2, 1 << 16  # samples of a measured pass (matching needs two), and more than any device has room for
FSDP2_BLOCKS, FSDP2_GRADIENTS = 3, 2  # copies of a unit's weights and gradients, see above


@dataclass(frozen=True)
class Memory:
    """Bytes of a device at the peak of a training step.

    Attributes:
        activations: what is kept for the backward pass, its intermediate results, the batch, and 16-bit copies of the
            weights.
        exchange: buffers of what processes send each other, beside the gradients themselves.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    exchange: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def strategy_of(settings: Settings) -> str:
    """How the run shares its work out, as one of STRATEGIES.

    Raises:
        VLMoError: for a strategy whose memory is not known.
    """
    if settings.use_sharded_training:
        return "deepspeed_stage_1"
    if settings.strategy in ("auto", "ddp"):
        return "ddp"
    if settings.strategy == "fsdp2":
        return "fsdp2"
    if settings.strategy in STRATEGIES:
        return settings.strategy
    raise VLMoError(
        f"strategy={settings.strategy}: its memory is not known; plan with strategy=auto, fsdp2, deepspeed_stage_1 or "
        "deepspeed_stage_2"
    )


class Planner:
    """Works out the memory of a run's variants; what it has measured it measures no second time.

    Args:
        settings: of the run.
        gathered: bytes that a process holds of what all give, for each sample that it gives itself.
    """

    def __init__(self, settings: Settings, gathered: float = 0) -> None:
        self.settings, self.gathered = settings, gathered
        self.world = settings.devices * settings.num_nodes
        self.strategy = strategy_of(settings)
        self._steps: dict[tuple[bool, int], StepCost] = {}

    @cached_property
    def model(self) -> VLMo:
        """Shapes alone."""
        with torch.device("meta"):
            return VLMo(self.settings.model_copy(update={"load_path": "", "activation_checkpointing": False}))

    @property
    def _first(self) -> tuple[int, int]:
        """The numbers of samples to begin with."""
        return SMALLEST, max(self.settings.per_gpu_batchsize, 2 * SMALLEST)

    @cached_property
    def _state_share(self) -> float:
        return state_share(self.settings.optim_type)

    def step(self, batch: int, checkpointing: bool, flops: bool = False) -> StepCost:
        """Measures a step of so many samples a pass."""
        found = self._steps.get((checkpointing, batch))
        if found is None or (flops and not found.flops):
            run = self.settings.model_copy(update={"activation_checkpointing": checkpointing})
            found = self._steps[checkpointing, batch] = step_cost(run, batch, flops)
        return found

    @property
    def flops(self) -> int:
        """Floating-point operations of a device in a step of the run."""
        batch = max(self.settings.per_gpu_batchsize, SMALLEST)
        step = self.step(batch, bool(self.settings.activation_checkpointing), flops=True)
        return step.flops * self.settings.per_gpu_batchsize // batch

    def memory(
        self, batch: int | None = None, checkpointing: bool | None = None, strategy: str | None = None
    ) -> Memory:
        """What a device needs with so many samples a pass, measured; what is not given is as in the run."""
        batch = batch or self.settings.per_gpu_batchsize
        if checkpointing is None:
            checkpointing = bool(self.settings.activation_checkpointing)
        if batch >= SMALLEST:
            self.step(batch, checkpointing)
        return self._estimate(batch, checkpointing, strategy or self.strategy)

    def largest(self, room: float, checkpointing: bool, strategy: str) -> int:
        """Gives the largest number of samples a pass that needs at most `room` bytes; 0: there is none.

        Memory is next to a line of that number. Two numbers give the line, and where it says that the room ends beyond
        what was measured, is measured too, until that is between two that were: mostly once, for the largest room.
        """
        for each in self._first:
            self.step(each, checkpointing)
        while True:
            answer = self._solve(room, checkpointing, strategy)
            if answer <= max(batch for kind, batch in self._steps if kind == checkpointing):
                return answer
            self.step(answer, checkpointing)

    def _solve(self, room: float, checkpointing: bool, strategy: str) -> int:
        """The largest number that fits, by what has been measured."""
        below, above = 0, LARGEST
        while below < above:
            middle = (below + above + 1) // 2
            fits = self._estimate(middle, checkpointing, strategy).total <= room
            below, above = (middle, above) if fits else (below, middle - 1)
        return below

    def _estimate(self, batch: int, checkpointing: bool, strategy: str) -> Memory:
        """As measured, or else on the line through the nearest two that were."""
        measured = {each: step.activations for (kind, each), step in self._steps.items() if kind == checkpointing}
        if batch in measured:
            activations = measured[batch]
        else:
            for each in self._first:
                measured[each] = self.step(each, checkpointing).activations
            batches = sorted(measured)
            place = min(max(bisect(batches, batch), 1), len(batches) - 1)
            low, high = batches[place - 1], batches[place]
            slope = (measured[high] - measured[low]) / (high - low)
            activations = round(measured[low] + slope * (batch - low))
        kept = self._kept(strategy)
        return replace(kept, activations=activations, exchange=kept.exchange + round(self.gathered * batch))

    @cache  # noqa: B019 (a planner lives as long as its plan is made)
    def _kept(self, strategy: str) -> Memory:
        """What there is beside activations, at any batch."""
        unused = unused_parameters(self.model)
        weights = {name: parameter.nbytes for name, parameter in self.model.named_parameters()}
        trained = {name: parameter.nbytes for name, parameter in self.model.trained_parameters()}
        all_, gradients = sum(weights.values()), sum(trained.values())
        buffers = sum(buffer.nbytes for buffer in self.model.buffers())
        state = int(self._state_share * gradients)
        if self.world == 1 or strategy == "ddp":
            averages = gradients if self.settings.ema_decay else 0
            return Memory(all_ + buffers + averages, gradients, state, 0, 0)
        if strategy == "fsdp2":
            whole = sum(size for name, size in weights.items() if name in unused)
            parts = whole + -(-(all_ - whole) // self.world)
            return Memory(
                parts + buffers, gradients // self.world, state // self.world, 0, self._units(unused, trained)
            )
        width = 4 if autocast_type(self.settings) is None else 2
        masters = gradients if width == 2 else 0
        halved = gradients * width // 4
        kept_gradients = halved // self.world if strategy == "deepspeed_stage_2" else halved
        return Memory(
            all_ * width // 4 + buffers, kept_gradients, (masters + state) // self.world, 0, 2 * ZERO_BUCKET * width
        )

    def _units(self, unused: set[str], trained: dict[str, int]) -> int:
        """Bytes of what FSDP2 holds whole at a time."""
        units: dict[str, list[int]] = {"": [0, 0]}
        blocks = [name for name, module in self.model.named_modules() if isinstance(module, Block)]
        for name, parameter in self.model.named_parameters():
            if name not in unused:
                unit = units.setdefault(next((block for block in blocks if name.startswith(block + ".")), ""), [0, 0])
                unit[0] += parameter.nbytes
                unit[1] += trained.get(name, 0)
        outside, _ = units[""]
        largest = max((weights for unit, (weights, _) in units.items() if unit), default=0)
        return outside + FSDP2_BLOCKS * largest + FSDP2_GRADIENTS * max(gradients for _, gradients in units.values())


def gathered_bytes(collectives: list[Collective], settings: Settings) -> float:
    """Bytes of what a pass gathers of all processes, for each sample that a process gives; weights are not counted."""
    world = settings.devices * settings.num_nodes
    received = sum(each.received for each in collectives if each.operation == "all-gather" and each.what != "weights")
    samples = settings.training_batch * settings.accumulated_batches
    return received * world / max(world - 1, 1) / samples


def memory_of(settings: Settings, gathered: float = 0) -> Memory:
    """The memory of a device in a training step of the run, by part.

    Args:
        gathered: see `Planner`.
    """
    return Planner(settings, gathered).memory()
