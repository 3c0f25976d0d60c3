"""What is measured in the steps: every metric of every task as a sum and a count, by phase, over all processes."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from vlmo.distributed.collectives import sum_over_processes, world_size
from vlmo.tasks.base import Measured, Task, TaskOutput

STEP = "step"  # since the last optimizer step; the other phases are what they are called, over an epoch
PHASES = ("train", "val", "test")


class Ratio:
    """A mean: a sum over a count, both float64, so that sums over millions of samples stay exact.

    Attributes:
        update_count: updates since it was begun.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total: Tensor | None = None
        self.count: Tensor | float = 0.0
        self.update_count = 0

    def update(self, measured: Measured) -> None:
        total, count = measured[0].detach().double(), measured[1]
        self.total = total if self.total is None else self.total + total
        self.count = self.count + (count.detach().double() if isinstance(count, Tensor) else count)
        self.update_count += 1

    def sums(self, device: torch.device | None = None) -> Tensor:
        """(2,) float64: total and count so far, of this process alone; made on `device` if there are none."""
        if self.total is None:
            return torch.zeros(2, dtype=torch.float64, device=device)
        # (made on the device: one sent to it would be waited for)
        count = self.count if isinstance(self.count, Tensor) else self.total.new_full((), self.count)
        return torch.stack([self.total, count])

    def restore(self, sums: Tensor, updates: int) -> None:
        """Goes on from `sums` (those of several processes add up) after as many updates."""
        self.total, self.count = sums.double().unbind()
        self.update_count = updates


class Metrics:
    """Means that are weighted by the items behind them, over all passes, batches and processes.

    Attributes:
        ratios: by "phase/task/metric".
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.ratios = {
            f"{phase}/{task.name}/{key}": Ratio() for phase in (STEP, *PHASES) for task in tasks for key in task.metrics
        }

    def update(self, phase: str, outputs: Mapping[str, TaskOutput]) -> None:
        """Adds a batch, by task."""
        for name, output in outputs.items():
            for key, measured in output.measured.items():
                self.ratios[f"{phase}/{name}/{key}"].update(measured)
                if phase == "train":
                    self.ratios[f"{STEP}/{name}/{key}"].update(measured)

    def compute_step(self, device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Gives, by task and metric, what was measured in training since the last call; all processes must call it.

        One exchange for all numbers, and no wait for the device. What this process did not measure itself is left out.
        """
        return {key: mean for key, mean, ratio in self._compute(STEP, device) if ratio.update_count}

    def compute_epoch(self, phase: str, device: torch.device) -> dict[tuple[str, str], Tensor]:
        """Gives, by task and metric, what was measured since the last call; all processes must call it."""
        together = world_size() > 1
        return {
            key: mean
            for key, mean, ratio in self._compute(phase, device)
            if ratio.update_count or (together and not mean.isnan())
        }

    def _compute(self, phase: str, device: torch.device) -> Iterator[tuple[tuple[str, str], Tensor, Ratio]]:
        """Gives task and metric, the mean over all processes, and this process's ratio, which begins anew after."""
        ratios = {name: ratio for name, ratio in self.ratios.items() if name.startswith(f"{phase}/")}
        sums = sum_over_processes(torch.stack([ratio.sums(device).to(device) for ratio in ratios.values()]))
        for (name, ratio), (total, count) in zip(ratios.items(), sums, strict=True):
            _, task, key = name.split("/", 2)
            yield (task, key), (total / count).float(), ratio
            ratio.reset()
