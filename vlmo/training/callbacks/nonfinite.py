"""Steps whose loss or gradient is no number: skipped, counted, and told."""

import logging
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from vlmo.distributed.collectives import all_reduce_any, rank
from vlmo.errors import VLMoError
from vlmo.files import append_lines

log = logging.getLogger(__name__)

FILE = "nonfinite_steps.txt"
SHOWN = 8  # sample numbers that the console shows


class NonFinite(Callback):
    """Skips an optimizer step, on all processes alike, if the loss of any of its passes or any gradient is inf or NaN.

    Each is written to `nonfinite_steps.txt` in the run's folder with the numbers (`raw_index`) of the samples; too many
    in a row stop the run. With fp16, a gradient that overflows only because the loss was scaled up is the scaler's
    affair: it skips the step and halves the scale, and nothing is counted.

    Attributes:
        skipped: steps of this run so far.
    """

    def __init__(self, max_nonfinite: int) -> None:
        """
        Args:
            max_nonfinite: steps in a row after which the run stops.
        """
        self.max_nonfinite = max_nonfinite
        self.skipped = self._in_a_row = 0
        self._passes: list[tuple[Tensor, Tensor]] = []  # loss and sample numbers, since the last step
        self._samples = torch.empty(0)
        self._folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._folder = Path(str(trainer.log_dir)) if trainer.loggers else None  # (asking for it is collective)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = batch.get("raw_index", torch.empty(0))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._passes.append((loss.detach(), self._samples))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        passes, self._passes = self._passes, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        # inf or NaN if any is, or is so large (1e19) that its square is none; ten times as fast as the maximum on a CPU
        device = trainer.strategy.root_device
        norm = get_total_norm([p.grad for p in parameters]).to(device)
        losses = torch.stack([norm, *(loss.float() for loss, _ in passes)]).isfinite()
        if not all_reduce_any(~losses.all(), device):  # on a GPU, the one time a step that it is waited for
            self._in_a_row = 0
            return
        bad = [samples for finite, (_, samples) in zip(losses[1:].tolist(), passes, strict=True) if not finite]
        if not all_reduce_any(bool(bad), device) and _scale(trainer) > 1:
            return
        for parameter in parameters:
            parameter.grad = None  # which every optimizer passes over
        self.skipped += 1
        self._in_a_row += 1
        self._tell(trainer, "loss" if bad else "gradient", bad or [samples for _, samples in passes])
        if self._in_a_row >= self.max_nonfinite:
            raise VLMoError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is no number (max_nonfinite="
                f"{self.max_nonfinite}): lower learning_rate, set gradient_clip_val or precision=bf16, or look at the "
                f"samples that {FILE} names; the checkpoints are of before"
            )

    def _tell(self, trainer: Trainer, what: str, samples: list[Tensor]) -> None:
        numbers = [number for part in samples for number in part.tolist()]
        line = f"step {trainer.global_step}, rank {rank()}: the {what} is no number, the step is skipped; samples "
        shown = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
        log.warning(f"{line}{shown} ({self.skipped} skipped so far)")
        if self._folder:
            append_lines(self._folder / FILE, [line + ", ".join(map(str, numbers))])


def _scale(trainer: Trainer) -> float:
    """What fp16 multiplies the loss by; 1 for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler else 1.0
