"""What is measured in the steps: every metric of every objective, for each phase, summed over the processes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from vlmo.distributed.collectives import sum_over_processes, world_size
from vlmo.metrics import Mean
from vlmo.tasks import Objective, ObjectiveOutput

STEP = "step"  # since the last optimizer step; the other phases are what they are called, over an epoch
PHASES = ("train", "val", "test")


class Metrics(nn.Module):
    """Means that are weighted by the samples behind them, over all passes, batches and processes."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        super().__init__()
        self.metrics = nn.ModuleDict(
            {
                f"{phase}/{objective.name}/{key}": metric()
                for phase in (STEP, *PHASES)
                for objective in objectives
                for key, metric in objective.metrics.items()
            }
        )

    def _of(self, phase: str) -> Iterator[tuple[str, str, Mean]]:
        """Objective, key and metric."""
        for name, metric in self.metrics.items():
            of, objective, key = name.split("/", 2)
            if of == phase:
                yield objective, key, cast(Mean, metric)

    def update(self, phase: str, outputs: Mapping[str, ObjectiveOutput]) -> None:
        """Adds a batch, by objective."""
        for name, output in outputs.items():
            for key, arguments in output.updates.items():
                for of in (phase, STEP) if phase == "train" else (phase,):
                    cast(Mean, self.metrics[f"{of}/{name}/{key}"]).update(*arguments)

    def compute_step(self) -> dict[str, Tensor]:
        """By log tag, what was measured in training since the last call; all processes must call it.

        One exchange for all numbers, and no wait for the device. What this process did not measure itself is left out.
        """
        metrics = {f"{name}/train/{key}": metric for name, key, metric in self._of(STEP)}
        totals = torch.stack([torch.stack([metric.total, metric.count]) for metric in metrics.values()])
        totals = sum_over_processes(totals)
        means = {
            tag: (total / count).float()
            for (tag, metric), (total, count) in zip(metrics.items(), totals, strict=True)
            if metric.update_called
        }
        for metric in metrics.values():
            metric.reset()
        return means

    def compute_epoch(self, phase: str) -> dict[tuple[str, str], Tensor]:
        """By objective and key, what was measured since the last call; all processes must call it."""
        values = {}
        for name, key, metric in self._of(phase):
            if not (metric.update_called or world_size() > 1):
                continue  # (computing is collective: every process takes part, also one that saw no sample)
            value = metric.compute()
            if metric.update_called or not value.isnan():
                values[name, key] = value
            metric.reset()
        return values
