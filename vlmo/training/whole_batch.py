"""An optimizer step that is given all of a process's samples at once, and computes them in chunks.

With `contrast_cache`, the contrast spans all of them with the memory of a chunk (GradCache, arXiv 2101.06983). First
pass: the features of every chunk, without a graph. Then the contrast of all of them, and its gradient at every feature.
Second pass, chunk by chunk: the features once more, now with a graph, into which that gradient is fed; random numbers
are drawn as in the first pass, so that dropout and stochastic depth leave out the same. The parameters get the gradient
of one pass over the whole batch.

The other losses are computed chunk by chunk in the second pass. Their means count every item of the batch alike, and
the negatives of matching come from all that the contrast saw.

With `layout_invariant`, these means count the items of all processes, the contrast's gradient is the exact one, and
every random number follows from seed, step, sample and layer: what is learnt does not depend on how the samples were
dealt out to processes and chunks. Without a contrast there is the second pass alone.

The step, as Lightning takes it: `VLMo.training_step` calls `first_pass`, whose loss goes, scaled as the precision
demands, to `VLMo.backward`, which calls `second_pass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from vlmo.distributed.collectives import gather_numbers, mean_gradients
from vlmo.distributed.wire_format import with_pixels
from vlmo.modules.random import fold_in
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


class WholeBatch:
    """Takes a model's training steps.

    Args:
        model: `VLMo` with at most one contrastive task.
        chunk_size: samples that are encoded at a time; they alone are moved to the model's device.
        seed: what random numbers follow from, with the step and the sample; None: they come from the global generator.
    """

    def __init__(self, model: Any, chunk_size: int, seed: int | None = None) -> None:
        self.model, self.chunk_size, self.seed = model, chunk_size, seed
        self.contrast = next((task for task in model.tasks if isinstance(task, ContrastTask)), None)
        self.others: list[Task] = [task for task in model.tasks if task is not self.contrast]
        self.first: FirstPass | None = None  # (Lightning hands a loss alone from one hook to the next)

    def first_pass(self, batch: Mapping[str, Any], step: int) -> dict[str, TaskOutput]:
        """Gives the contrast of the whole batch, by its name; its weighted loss has a graph down to the features.

        Without a contrast, it gives a loss of 0 in the name of another task, whose own comes in the second pass.

        Args:
            step: number of the optimizer step.
        """
        device = self.model.device
        whole = dict(batch)
        if self.seed is not None:
            numbers = batch.get("raw_index", torch.empty(0, dtype=torch.int64)).cpu()
            whole["random_keys"] = fold_in(fold_in(numbers, self.seed), step)
        dtype, enabled = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        autocast = torch.autocast(device.type, dtype, enabled)
        unit = torch.zeros((), device=device, requires_grad=True)
        sizes = BatchSize.of_all_processes(whole)  # type: ignore[arg-type]
        if self.contrast is None:
            self.first = FirstPass(whole, sizes, {}, [], unit, autocast)
            return {self.others[0].name: TaskOutput(unit)}
        states: list[list[Tensor]] = []
        found: list[Features] = []
        for chunk in self._chunks(whole, sizes):
            states.append(_random_state(device))
            with torch.no_grad():
                found.append(self._features(self.contrast, chunk))
        features = {name: torch.cat([each[name].float() for each in found]).requires_grad_() for name in found[0]}
        output = self.contrast.compare(self._step(whole, sizes), features)
        provided = {self.contrast.provides: output}
        for task in self.others:
            whole |= task.prepare(self._step(whole, sizes, provided))
        self.first = FirstPass(whole, sizes, features, states, unit, autocast)
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
        shares = self._shares(first)
        start = 0
        for number, chunk in enumerate(self._chunks(first.batch, first.sizes)):
            end = start + num_samples(chunk)
            with first.autocast:
                fed = []
                if self.contrast is not None:
                    # (with keys the same random numbers are drawn anyway)
                    state = first.states[number]
                    with _replayed(state, self.model.device) if self.seed is None else nullcontext():
                        features = self._features(self.contrast, chunk)
                    leaves = first.features.items()
                    fed = [(features[name].float() * _gradient(leaf)[start:end]).sum() for name, leaf in leaves]
                outputs = compute_tasks(self.model, self.others, chunk, first.sizes)  # type: ignore[arg-type]
                for name, output in outputs.items():
                    weight = shares[name][number] * self.model.settings.loss_names[name]
                    fed.append(output.loss * weight * _gradient(first.unit))
            torch.stack(fed).sum().backward()
            if num_samples(chunk):
                measure(outputs)
            start = end
        if not isinstance(self.model, FSDPModule):  # (whose gradients become the mean in each backward pass)
            mean_gradients(self.model.parameters())

    def _shares(self, first: FirstPass) -> dict[str, list[float]]:
        """Gives, by task, what each chunk's loss counts in the mean over the whole batch.

        That is the batch of this process; with `layout_invariant` that of all: the gradients become their mean over the
        processes, so each is multiplied by how many there are.
        """
        parts = list(self._parts(first.batch, first.sizes))
        items = [[int(task.num_items(task.samples(part))) for part in parts] for task in self.others]  # type: ignore[arg-type]
        totals, processes = [sum(each) for each in items], 1
        if self.seed is not None:
            everywhere = gather_numbers(totals)
            totals, processes = [sum(each) for each in zip(*everywhere, strict=True)], len(everywhere)
        return {
            task.name: [processes * item / max(total, 1) for item in each]
            for task, each, total in zip(self.others, items, totals, strict=True)
        }

    def _step(
        self, batch: Mapping[str, Any], sizes: list[BatchSize], provided: Mapping[str, TaskOutput] | None = None
    ) -> Step:
        return Step(batch, self.model.heads, True, provided or {}, sizes)  # type: ignore[arg-type]

    def _features(self, contrast: ContrastTask, chunk: Mapping[str, Any]) -> Features:
        step = self._step(chunk, [])
        return contrast.features(step, self.model.encode(step.requests(contrast)))

    def _parts(self, batch: Mapping[str, Any], sizes: list[BatchSize]) -> Iterator[dict[str, Any]]:
        """As many in each process, the last perhaps empty: weights that are shared out are gathered by all together."""
        return chunks(batch, self.chunk_size, max(size.samples for size in sizes))

    def _chunks(self, batch: Mapping[str, Any], sizes: list[BatchSize]) -> Iterator[dict[str, Any]]:
        for chunk in self._parts(batch, sizes):
            for task in self.others:  # (on the CPU, where the chunk still lies)
                chunk |= task.derived(chunk)  # type: ignore[arg-type]
            moved = {n: v.to(self.model.device) if isinstance(v, Tensor) else v for n, v in chunk.items()}
            yield with_pixels(moved)


def chunks(batch: Mapping[str, Any], size: int, most: int = 1) -> Iterator[dict[str, Any]]:
    """The batch in parts of `size` samples, in order; texts are cut to the longest of their part.

    Fields that are not one entry a sample are left out.

    Args:
        most: samples that a batch has whose parts are as many; those beyond the own samples are empty.
    """
    number = num_samples(batch)
    for start in range(0, max(number, most), size):
        part = {n: v[start : start + size] for n, v in batch.items() if hasattr(v, "__len__") and len(v) == number}
        # those of the samples, of negatives ("negative_text_"), of a task's own data ("textmlm.text_")
        for prefix in [name.removesuffix("masks") for name in part if name.endswith("text_masks")]:
            # (on a GPU, where negatives are, texts stay as long as they are: to know better one would wait for it)
            if part[prefix + "masks"].device.type == "cpu":
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
