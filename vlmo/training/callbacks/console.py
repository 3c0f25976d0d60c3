"""The line of numbers that is printed while training."""

import math
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import psutil
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from tqdm import tqdm

from vlmo.settings import Settings
from vlmo.tasks.base import num_samples
from vlmo.training.utilisation import peak_teraflops, teraflops_per_sample


class ConsoleLine(Callback):
    """One line every `every` steps: the loss that is minimised and its parts, with chance where `LearningChecks` says
    it, norm of the gradient, learning rate, throughput, share of the device's peak (MFU), samples seen, memory, share
    of time waiting for data, time left.

    Only with a line the device is waited for. The throughput is also logged, as `train/samples_per_sec`, MFU as
    `train/mfu`, where the device's peak is known. The time left is that of the steps alone, at the pace of the last.
    """

    def __init__(self, every: int, weights: Mapping[str, float], settings: Settings | None = None) -> None:
        """
        Args:
            weights: by task, what its loss is multiplied by.
            settings: of the run; None: no MFU.
        """
        self.every, self.weights, self.settings = every, weights, settings
        # since the last line: seconds between the end of a batch and the start of the next, samples of this process
        self.waited, self.samples = 0.0, 0
        self.line_time = self.batch_end = time.perf_counter()
        self.printed_at = self.line_step = 0
        self.seen = 0  # samples of this process in the whole run
        self.peak: float | None = None  # of the device, in samples a second

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.settings and trainer.is_global_zero:
            peak = peak_teraflops(self.settings, trainer.strategy.root_device)
            cost = teraflops_per_sample(self.settings) if peak else None
            self.peak = peak / cost if peak and cost else None
        self._start(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer.global_step)  # evaluation is neither training nor waiting

    def _start(self, step: int) -> None:
        self.waited, self.samples, self.line_step = 0.0, 0, step
        self.line_time = self.batch_end = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.waited += time.perf_counter() - self.batch_end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batch_end = time.perf_counter()
        size = num_samples(batch)
        self.samples += size
        self.seen += size
        step = trainer.global_step
        if step % self.every or step == self.printed_at or not trainer.is_global_zero:
            return
        self.printed_at = step
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0  # (in a file a line stays one)
        tqdm.write(folded(self._parts(trainer, pl_module, step), columns), file=sys.stdout)
        sys.stdout.flush()  # into a file, too, a line appears when it is written
        self._start(step)

    def _parts(self, trainer: Trainer, pl_module: Any, step: int) -> list[str]:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}  # (waits for the device)
        seconds = max(time.perf_counter() - self.line_time, 1e-9)
        speed = self.samples * trainer.world_size / seconds
        pl_module.log("train/samples_per_sec", speed, rank_zero_only=True)
        total = int(trainer.estimated_stepping_batches)
        parts = [f"step {step:,}/{total:,}", *self._losses(logged)]
        if "train/grad_norm" in logged:
            parts.append(f"grad {logged['train/grad_norm']:.3g}")
        parts += [f"lr {trainer.optimizers[0].param_groups[0]['lr']:.1e}", f"{speed:,.1f} samples/s"]
        if self.peak:
            mfu = self.samples / seconds / self.peak
            pl_module.log("train/mfu", mfu, rank_zero_only=True)
            parts.append(f"MFU {mfu:.1%}")
        parts += [f"seen {short(self.seen * trainer.world_size)}", memory(trainer), f"data {self.waited / seconds:.0%}"]
        if step > self.line_step:
            left = (total - step) * seconds / (step - self.line_step)
            parts.append(f"left {timedelta(seconds=round(left))}")
        return parts

    def _losses(self, logged: Mapping[str, float]) -> list[str]:
        """The loss that is minimised, and what it is the sum of."""
        names = [name for name in self.weights if f"{name}/train/loss" in logged]
        whole = f"loss {logged.get('train/loss', math.nan):.3f}"
        if len(names) == 1:
            return [whole + self._chance(names[0], logged)]
        parts = [self._part(name, logged[f"{name}/train/loss"]) + self._chance(name, logged) for name in names]
        return [f"{whole} = {parts[0]}", *(f"+ {part}" for part in parts[1:])] if parts else [whole]

    def _part(self, name: str, loss: float) -> str:
        return (f"{self.weights[name]:g} x " if self.weights[name] != 1 else "") + f"{name} {loss:.3f}"

    def _chance(self, name: str, logged: Mapping[str, float]) -> str:
        expected = logged.get(f"{name}/train/loss_chance")
        return "" if expected is None else f" (chance {expected:.3f})"


def folded(parts: Sequence[str], columns: int) -> str:
    """Joins the parts of a line; where it is longer than a terminal is wide, it goes on in indented ones.

    Args:
        columns: of the terminal; 0: there is none.
    """
    lines = [parts[0]]
    for part in parts[1:]:
        gap = " " if part.startswith("+ ") else "  "  # (a sum stands closer)
        if columns and len(lines[-1]) + len(gap) + len(part) >= columns:
            lines.append(f"    {part}")
        else:
            lines[-1] += gap + part
    return "\n".join(lines)


def short(number: int) -> str:
    """12,345, 1.23M, 4.56G"""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{letter}"
    return f"{number:,}"


def memory(trainer: Trainer) -> str:
    """Memory in use: the peak of the GPU, or what this process holds of the machine's."""
    if trainer.strategy.root_device.type == "cuda":
        device = trainer.strategy.root_device
        used, there = torch.cuda.max_memory_allocated(device), torch.cuda.get_device_properties(device).total_memory
    else:
        used, there = psutil.Process().memory_info().rss, psutil.virtual_memory().total
    return f"mem {used / 2**30:.1f}/{there / 2**30:.0f} GiB"
