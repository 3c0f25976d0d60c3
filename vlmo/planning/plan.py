"""The plan of a run: memory, operations, bytes, disk and hours, and the table that shows them."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmo.errors import VLMoError
from vlmo.planning.communication import STRATEGIES, Collective, ledger
from vlmo.planning.compute import hours
from vlmo.planning.devices import DEVICES, Device
from vlmo.planning.memory import Memory, Planner, gathered_bytes, strategy_of
from vlmo.planning.step import autocast_type, on_gpu, quick
from vlmo.settings import Settings
from vlmo.training.disk_usage import checkpoint_size, num_checkpoints
from vlmo.training.run_length import RunLength

MFU = 0.35  # share of a device's peak that a run reaches, unless one is given


@dataclass(frozen=True)
class Variant:
    """A way to train in less memory: how processes share their work out, and whether blocks are computed twice."""

    strategy: str
    checkpointing: bool


@dataclass(frozen=True)
class Plan:
    """What a training run will take.

    Attributes:
        devices: in question; without a peak where the memory alone is known.
        memory: of a device at the peak of a step, by variant; the run's own is `own`.
        largest: `per_gpu_batchsize` that fits, by device's name and variant.
        flops: operations of a device in a step, as torch's FlopCounterMode counts them.
        collectives: what the processes send each other in a step.
        weights_file, checkpoint: bytes of a file of weights, and of one that a run goes on from.
        checkpoints: that there are at the end of the run; None: unknown without the number of samples.
        steps: of the run; None: likewise.
        hours: by device's name.
        mfu: the share of the peak that they are for.
    """

    settings: Settings
    devices: tuple[Device, ...]
    own: Variant
    memory: dict[Variant, Memory]
    largest: dict[str, dict[Variant, int]]
    flops: int
    collectives: list[Collective]
    weights_file: int
    checkpoint: int
    checkpoints: int | None
    steps: int | None
    hours: dict[str, float]
    mfu: float

    @property
    def world(self) -> int:
        return self.settings.devices * self.settings.num_nodes

    @property
    def bytes_sent(self) -> int:
        """By the busiest process in a step; it receives as many."""
        return sum(each.sent for each in self.collectives)

    def __str__(self) -> str:
        return "\n".join([*self._heading(), "", *self._memory(), "", *self._devices(), "", *self._rest()])

    def _heading(self) -> list[str]:
        s, own = self.settings, self.own
        how = own.strategy if self.world > 1 else "one process"
        how += ", activation checkpointing" if own.checkpointing else ""
        dtype = autocast_type(s)
        numbers = f"{dtype} and 32 bits".removeprefix("torch.") if dtype else "32 bits"
        return [
            f"{s.exp_name}: {s.model_arch}, {s.image_size} px, texts of {s.max_text_len} tokens, {numbers}",
            f"{self.world:,} device{'s' * (self.world > 1)} ({how}): batch of {s.batch_size:,} = {s.accumulation:,} "
            f"pass{'es' * (s.accumulation > 1)} of {s.per_gpu_batchsize} a device",
        ]

    def _memory(self) -> list[str]:
        names = list(self.memory[self.own].parts)
        rows = [["memory a device, GB", *names, "together"]]
        for variant, memory in self.memory.items():
            numbers = [*memory.parts.values(), memory.total]
            rows.append([self._name(variant), *(f"{number / 1e9:,.2f}" for number in numbers)])
        return _table(rows)

    def _devices(self) -> list[str]:
        variants = list(self.memory)
        rows = [["largest per_gpu_batchsize", "GB", *(self._name(variant) for variant in variants)]]
        for device in self.devices:
            found = self.largest[device.name]
            rows.append([device.name, f"{device.memory:g}", *(str(found[variant] or "none") for variant in variants)])
        s, share = self.settings, self.settings.batch_size // self.world
        even = ", ".join(str(number) for number in range(1, share + 1) if share % number == 0)
        shared = [f"batch_size={s.batch_size} over {self.world} is shared evenly by per_gpu_batchsize {even}"]
        return _table(rows) + ([] if s.layout_invariant else shared)

    def _rest(self) -> list[str]:
        steps = f"{self.steps:,} steps" if self.steps else "unknown, give --samples N (of an epoch)"
        kept = f"{self.settings.keep_last or 'all'} kept"
        if self.checkpoints:
            number = f"{self.checkpoints:,} at the end ({kept}): {self.checkpoints * self.checkpoint / 1e9:,.1f} GB"
        else:
            number = f"one a validation ({kept}); --samples N counts them"
        lines = [
            f"a step   {self.flops / 1e12:,.2f} TFLOP a device; {self.bytes_sent / 1e6:,.1f} MB sent by each",
            f"disk     {self.weights_file / 1e9:,.2f} GB a weights file, {self.checkpoint / 1e9:,.2f} a checkpoint; "
            f"{number}",
            f"the run  {steps}",
        ]
        if not self.hours:
            return lines
        rows = [[f"at {self.mfu:.0%} of the peak", "TFLOP/s", "s a step", "hours", "device hours"]]
        for device in self.devices:
            if device.name in self.hours and self.steps:
                each = self.hours[device.name]
                seconds = each * 3600 / self.steps
                numbers = [f"{seconds:,.3f}", f"{each:,.1f}", f"{each * self.world:,.0f}"]
                rows.append([device.name, f"{device.teraflops:g}", *numbers])
        return [*lines, "", *_table(rows)]

    def _name(self, variant: Variant) -> str:
        name = variant.strategy.replace("deepspeed_stage_", "zero ") if self.world > 1 else "as it is"
        if variant.checkpointing:
            name = f"{name} + ckpt" if self.world > 1 else "ckpt"
        return f"{name} *" if variant == self.own else name


def plan_run(
    settings: Settings,
    devices: Sequence[Device] = tuple(DEVICES.values()),
    mfu: float = MFU,
    samples: int | None = None,
) -> Plan:
    """Plans a training run without computing anything of it: in seconds, and in no memory to speak of.

    Args:
        devices: to find the largest batch for, and the hours.
        mfu: share of their peaks that the operations of a step reach, whatever is computed twice included.
        samples: that the run trains on in an epoch, for what depends on them.

    Raises:
        VLMoError: if the run is an evaluation, or its strategy is not known here.
    """
    if settings.test_only:
        raise VLMoError("test_only=True: a plan is one of training; drop it")
    world, strategy = settings.devices * settings.num_nodes, strategy_of(settings)
    with quick():
        collectives = ledger(settings, world, strategy)
    planner = Planner(settings, gathered_bytes(collectives, settings))
    flops = planner.flops  # (first: the step that is counted is the one whose memory is measured)
    own = Variant(strategy, bool(settings.activation_checkpointing))
    strategies = STRATEGIES if world > 1 and on_gpu(settings) else (strategy,)
    variants = [Variant(each, checkpointing) for each in strategies for checkpointing in (False, True)]
    memory = {each: planner.memory(None, each.checkpointing, each.strategy) for each in variants}
    largest: dict[str, dict[Variant, int]] = {each.name: {} for each in devices}
    for device in sorted(
        devices, key=lambda each: -each.memory
    ):  # (the largest room is measured, the others lie below)
        for each in reversed(variants):
            room = device.memory * 1e9
            largest[device.name][each] = planner.largest(room, each.checkpointing, each.strategy)
    steps = settings.max_steps or (RunLength.of(settings, samples).steps if samples else None)
    needed = {
        each.name: hours(steps, flops, each.teraflops * 1e12, mfu)
        for each in devices
        if steps and each.teraflops and on_gpu(settings)
    }
    return Plan(
        settings,
        tuple(devices),
        own,
        memory,
        largest,
        flops,
        collectives,
        sum(tensor.nbytes for tensor in planner.model.state_dict().values()),
        checkpoint_size(planner.model, settings.optim_type),
        num_checkpoints(settings, {"train": samples, "val": 1}) if samples else None,
        steps,
        needed,
        mfu,
    )


def _table(rows: list[list[str]]) -> list[str]:
    """Lines of columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines
