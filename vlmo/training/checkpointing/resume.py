"""Going on from a checkpoint as if nothing had happened, also in the middle of an epoch: capture and restore of state.

Why not torchdata's StatefulDataLoader: here the samples of a batch follow from (seed, epoch, place in the order) alone,
so the place is one number, which the trainer knows exactly: the batches that it has *trained* on, whatever the workers
have made ahead. The stateful loader keeps a state for each worker besides, and refuses another number of them.
"""

import json
import logging
import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from vlmo.datamodules.samplers import SeenSamples
from vlmo.distributed.collectives import gather_objects, rank, world_size
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.training.metrics import Ratio

log = logging.getLogger(__name__)

KEY = "vlmo_resume"  # in Lightning's checkpoints
ORDER = ("samples", "seed", "grouped", "weights", "order")  # of a layout, what the order of an epoch follows from


class Position(NamedTuple):
    """How far training has come: what a checkpoint goes on from.

    Attributes:
        epoch: number of the current one.
        batches: passes of each process in this epoch that are finished.
        total: finished passes over all epochs.
        validated: whether no validation is to come before the next batch.
    """

    epoch: int = 0
    batches: int = 0
    total: int = 0
    validated: bool = True  # there is nothing to validate before the first batch


class RunState(NamedTuple):
    """What a process has to know, besides Lightning's state, to be as it was at `position`."""

    position: Position
    random: dict[str, Any]
    metrics: dict[str, tuple[torch.Tensor, int]]


def capture(position: Position, model: VLMo) -> RunState:
    """The state of this moment."""
    metrics = {name: (metric.sums(), metric.update_count) for name, metric in _metrics(model).items()}
    return RunState(position, random_states(), metrics)


def layout_of(settings: Settings, num_samples: int, order: int | None = None) -> dict[str, int | bool | str]:
    """How samples are dealt out: with the same layout, a run goes on bit for bit.

    With `layout_invariant` it is the same whatever the number of processes: that of a single one.

    Args:
        order: tells a windowed order from others.
    """
    invariant = settings.layout_invariant
    layout: dict[str, int | bool | str] = {
        "world": 1 if invariant else world_size(),
        "batch": settings.joint_batch if invariant else settings.training_batch,
        "accumulation": settings.accumulated_batches,
        "samples": num_samples,
        "seed": settings.seed,
        "grouped": settings.group_by_length,
        **({"order": order} if order is not None else {}),
    }
    if settings.dataset_weights:
        layout["weights"] = json.dumps(settings.dataset_weights, sort_keys=True)
    if settings.beside:
        layout["beside"] = json.dumps(settings.beside, sort_keys=True)
    return layout


def to_checkpoint(state: RunState, layout: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The state of all processes as plain values and tensors; all must call it."""
    metrics = {name: (sums.cpu(), updates) for name, (sums, updates) in state.metrics.items()}
    processes = gather_objects([{"random": state.random, "metrics": metrics}])
    return {**state.position._asdict(), "step": step, **layout, "processes": processes}


def position_here(
    saved: Mapping[str, Any], layout: Mapping[str, Any], epoch_length: int
) -> tuple[Position, SeenSamples]:
    """Where this run goes on from what `to_checkpoint` gave, as its own layout counts; says so where it is another.

    Args:
        epoch_length: batches of each process in a whole epoch.

    Returns:
        the position, and which samples of the epoch are done.
    """
    epoch, validated = saved["epoch"], saved["validated"]
    if changed := [name for name in ORDER if layout.get(name) != saved.get(name)]:
        if rank() == 0:
            what = ", ".join(f"{name} {layout.get(name)} for {saved.get(name)}" for name in changed)
            log.warning(f"resumed with training data in another order ({what}): epoch {epoch} starts over")
        return Position(epoch, 0, epoch * epoch_length, validated), SeenSamples(epoch, 0, 1, 1)
    number = min(saved["batches"] * saved["batch"] * saved["world"], layout["samples"])
    seen = SeenSamples(epoch, number, saved["world"], saved["batch"])
    if is_exact(saved, layout):
        return Position(epoch, saved["batches"], saved["total"], validated), seen
    if rank() == 0:
        then, now = (f"{x['world']} x {x['batch']} x {x['accumulation']}" for x in (saved, layout))
        log.warning(
            f"resumed with another split of the batch ({now} for {then} processes x samples x passes): each sample "
            "of the epoch is still seen once, but the numbers are not bit for bit those of an uninterrupted run"
        )
    left = (layout["samples"] - number) // layout["world"] // layout["batch"]
    batches = epoch_length - left
    return Position(epoch, batches, epoch * epoch_length + batches, validated), seen


def is_exact(saved: Mapping[str, Any], layout: Mapping[str, Any]) -> bool:
    """Whether a run of this layout goes on bit for bit."""
    return layout.items() <= saved.items()


def restore(saved: Mapping[str, Any], layout: Mapping[str, Any], step: int, model: VLMo) -> None:
    """Puts back the random states and the sums of the metrics, after everything that draws to begin with."""
    processes = saved["processes"]
    exact = is_exact(saved, layout) and len(processes) == world_size()
    if exact:
        set_random_states(processes[rank()]["random"])
    else:
        torch.manual_seed(int(np.random.SeedSequence([layout["seed"], step, rank()]).generate_state(1)[0]))
    for name, metric in _metrics(model).items():
        own = [processes[rank()]] if exact else processes if rank() == 0 else []
        found = [process["metrics"][name] for process in own if name in process["metrics"]]
        if found:
            metric.restore(sum(sums for sums, _ in found), sum(updates for _, updates in found))


def _metrics(model: VLMo) -> dict[str, Ratio]:
    """Gives those of the epoch; the others are empty whenever a checkpoint is written."""
    return {name: ratio for name, ratio in model.metrics.ratios.items() if name.startswith("train/")}


def random_states() -> dict[str, Any]:
    """Returns the random states of Python, numpy, torch and this process's GPU, as tensors and plain values."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "python": (version, torch.tensor(numbers), gauss),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Puts back what `random_states` gave; a GPU's is left out where there is none."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers.tolist()), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
