"""The line of numbers that is printed while training."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from vlmo.tasks.base import num_samples


class ConsoleLine(Callback):
    """One line every `every` steps: the loss that is minimised and its parts, norm of the gradient, learning rate,
    throughput, memory, share of time waiting for data.

    Only with a line the device is waited for. The throughput is also logged, as `train/samples_per_sec`.
    """

    def __init__(self, every: int, weights: Mapping[str, float]) -> None:
        """
        Args:
            weights: by task, what its loss is multiplied by.
        """
        self.every, self.weights = every, weights
        # since the last line: seconds between the end of a batch and the start of the next, samples of this process
        self.waited, self.samples = 0.0, 0
        self.line_time = self.batch_end = time.perf_counter()
        self.printed_at = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start()  # evaluation is neither training nor waiting

    def _start(self) -> None:
        self.waited, self.samples = 0.0, 0
        self.line_time = self.batch_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_end = time.perf_counter()
        self.samples += num_samples(batch)
        step = trainer.global_step
        if step % self.every or step == self.printed_at or not trainer.is_global_zero:
            return
        self.printed_at = step
        tqdm.write(self._line(trainer, pl_module, step), file=sys.stdout)
        sys.stdout.flush()  # into a file, too, a line appears when it is written
        self._start()

    def _line(self, trainer: Trainer, pl_module: Any, step: int) -> str:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}  # (waits for the device)
        seconds = max(time.perf_counter() - self.line_time, 1e-9)
        speed = self.samples * trainer.world_size / seconds
        pl_module.log("train/samples_per_sec", speed, rank_zero_only=True)
        total = int(trainer.estimated_stepping_batches)
        losses = {name: logged[tag] for name in self.weights if (tag := f"{name}/train/loss") in logged}
        parts = [f"step {step:,}/{total:,}", f"loss {logged.get('train/loss', math.nan):.3f}"]
        if len(losses) > 1:
            parts[-1] += " = " + " + ".join(self._part(name, value) for name, value in losses.items())
        if "train/grad_norm" in logged:
            parts.append(f"grad {logged['train/grad_norm']:.3g}")
        parts.append(f"lr {trainer.optimizers[0].param_groups[0]['lr']:.1e}")
        parts += [f"{speed:,.1f} samples/s", memory(trainer), f"data {self.waited / seconds:.0%}"]
        return "  ".join(parts)

    def _part(self, name: str, loss: float) -> str:
        return (f"{self.weights[name]:g} x " if self.weights[name] != 1 else "") + f"{name} {loss:.3f}"


def memory(trainer: Trainer) -> str:
    """Memory in use: the peak of the GPU, or what this process holds of the machine's."""
    if trainer.strategy.root_device.type == "cuda":
        device = trainer.strategy.root_device
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used, there = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return f"mem {used / 2**30:.1f}/{there / 2**30:.0f} GiB"
