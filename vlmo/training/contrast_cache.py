"""The contrast over a whole effective batch, with the memory of one of its chunks (GradCache, arXiv 2101.06983).

First pass: the features of every chunk, without a graph. Then the contrast of all of them, and its gradient at every
feature. Second pass, chunk by chunk: the features once more, now with a graph, into which that gradient is fed; random
numbers are drawn as in the first pass, so that dropout and stochastic depth leave out the same. The parameters get the
gradient of one pass over the whole batch.

The other losses of stage 3 are computed chunk by chunk in the second pass. Their means count every item of the batch
alike, and the negatives of matching come from all that the contrast saw.

The step, as Lightning takes it: `VLMo.training_step` calls `first_pass`, whose loss goes, scaled as the precision
demands, to `VLMo.backward`, which calls `second_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmo.distributed.collectives import mean_gradients
from vlmo.tasks.base import BatchSize, Step, Task, TaskOutput, compute_tasks, num_samples
from vlmo.tasks.itc import ContrastTask

Features = dict[str, Tensor]


@dataclass(frozen=True)
class FirstPass:
    """What the first pass of a step leaves for its second.

    Attributes:
        batch: with what the other tasks need of all of it, such as the negatives of matching.
        sizes: of the batches of all processes.
        features: (B, D) each, leaves of the contrast's graph.
        states: of the random numbers, before each chunk.
        unit: of value 0 in the loss: its gradient is the factor that the precision scales losses by.
        autocast: the precision's context.
    """

    batch: dict[str, Any]
    sizes: list[BatchSize]
    features: Features
    states: list[list[Tensor]]
    unit: Tensor
    autocast: torch.autocast


class ContrastCache:
    """Takes a model's training steps.

    Args:
        model: `VLMo` with one contrastive task.
        chunk_size: pairs that are encoded at a time; they alone are moved to the model's device.
    """

    def __init__(self, model: Any, chunk_size: int) -> None:
        self.model, self.chunk_size = model, chunk_size
        (self.contrast,) = (task for task in model.tasks if isinstance(task, ContrastTask))
        self.others: list[Task] = [task for task in model.tasks if task is not self.contrast]
        self.first: FirstPass | None = None  # (Lightning hands a loss alone from one hook to the next)

    def first_pass(self, batch: Mapping[str, Any]) -> dict[str, TaskOutput]:
        """Gives the contrast of the whole batch, by its name; its weighted loss has a graph down to the features."""
        device, heads = self.model.device, self.model.heads
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        states: list[list[Tensor]] = []
        found: list[Features] = []
        for chunk in self._chunks(batch):
            states.append(_random_state(device))
            with torch.no_grad():
                found.append(self._features(chunk))
        features = {name: torch.cat([each[name].float() for each in found]).requires_grad_() for name in found[0]}
        sizes = BatchSize.of_all_processes(batch)  # type: ignore[arg-type]
        step = Step(batch, heads, training=True, sizes=sizes)  # type: ignore[arg-type]
        output = self.contrast.compare(step, features)
        whole, provided = dict(batch), {self.contrast.provides: output}
        for task in self.others:
            whole |= task.prepare(Step(whole, heads, True, provided, sizes))  # type: ignore[arg-type]
        unit = torch.zeros((), device=device, requires_grad=True)
        self.first = FirstPass(whole, sizes, features, states, unit, torch.autocast(device.type, dtype, enabled))
        weight = self.model.settings.loss_names[self.contrast.name]
        return {self.contrast.name: replace(output, loss=output.loss * weight + unit)}

    def second_pass(self, loss: Tensor, measure: Callable[[dict[str, TaskOutput]], None]) -> None:
        """Adds the gradient of the whole batch to the parameters, as the mean over all processes.

        Args:
            loss: of the first pass, possibly multiplied.
            measure: called with the outputs of the other tasks in each chunk, by name; their tensors are as large as
                the chunk's, so nothing of them should be kept.
        """
        assert self.first is not None
        first, self.first = self.first, None
        loss.backward()
        items = {task.name: max(float(task.num_items(first.batch)), 1.0) for task in self.others}  # type: ignore
        start = 0
        for chunk, state in zip(self._chunks(first.batch), first.states, strict=True):
            end = start + num_samples(chunk)
            with first.autocast:
                with _replayed(state, self.model.device):
                    features = self._features(chunk)
                fed = [(features[n].float() * _gradient(leaf)[start:end]).sum() for n, leaf in first.features.items()]
                outputs = compute_tasks(self.model, self.others, chunk, first.sizes)  # type: ignore[arg-type]
                for task in self.others:
                    if task.name in outputs:
                        share = float(task.num_items(chunk)) / items[task.name]  # type: ignore[arg-type]
                        weight = share * self.model.settings.loss_names[task.name]
                        fed.append(outputs[task.name].loss * weight * _gradient(first.unit))
            torch.stack(fed).sum().backward()
            if num_samples(chunk):
                measure(outputs)
            start = end
        mean_gradients(self.model.parameters())

    def _features(self, chunk: Mapping[str, Any]) -> Features:
        step = Step(chunk, self.model.heads, training=True)  # type: ignore[arg-type]
        return self.contrast.features(step, self.model.encode(self.contrast.requests(step)))

    def _chunks(self, batch: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for chunk in chunks(batch, self.chunk_size):
            for task in self.others:  # (on the CPU, where the chunk still lies)
                chunk |= task.derive(chunk)  # type: ignore[arg-type]
            yield {n: v.to(self.model.device) if isinstance(v, Tensor) else v for n, v in chunk.items()}


def chunks(batch: Mapping[str, Any], size: int) -> Iterator[dict[str, Any]]:
    """The batch in parts of `size` samples, in order; texts are cut to the longest of their part.

    Fields that are not one entry a sample are left out.
    """
    number = num_samples(batch)
    for start in range(0, max(number, 1), size):  # (a batch without samples is one chunk: others wait for it)
        part = {n: v[start : start + size] for n, v in batch.items() if hasattr(v, "__len__") and len(v) == number}
        for prefix in ("text_", "negative_text_"):
            # (on a GPU, where negatives are, texts stay as long as they are: to know better one would wait for it)
            if prefix + "masks" in part and part[prefix + "masks"].device.type == "cpu":
                # to a multiple of 8, as the loader pads
                longest = max([8, *(-(-length // 8) * 8 for length in part[prefix + "masks"].sum(1).tolist())])
                names = [n for n, v in part.items() if n.startswith(prefix) and isinstance(v, Tensor)]
                part |= {name: part[name][:, :longest] for name in names}
        yield part


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _replayed(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Random numbers as at that state; afterwards they go on as if there had been none."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
