"""What is skipped and counted: samples whose image cannot be decoded, steps whose loss or gradient is no number."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from vlmo.distributed.collectives import all_reduce_any, any_process, rank, sum_over_processes, world_size
from vlmo.errors import VLMoError
from vlmo.files import append_lines
from vlmo.training.preparation import run_folder

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.01  # of a data set's samples, in one pass over it
SHOWN = 5  # unreadable samples that are named one by one on the console
SHOWN_NUMBERS = 8  # numbers of samples of a skipped step, likewise


class UnreadableImages(Callback):
    """Counts the samples that were left out because their image cannot be decoded; too many stop the run.

    Each is listed in `unreadable_images.txt` in the run's folder.
    """

    def __init__(self) -> None:
        self.failed: Counter[str] = Counter()
        self.folder: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"train": self.failed["train"]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.failed["train"] = state_dict["train"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.failed.pop("train", None)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.failed.pop("val", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count("train", batch, trainer.train_dataloader)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count("val", batch, trainer.val_dataloaders)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count("test", batch, trainer.test_dataloaders)

    def _count(self, phase: str, batch: Any, loader: Any) -> None:
        skipped = batch.get("skipped")
        if not skipped:
            return
        for line in skipped[: max(SHOWN - self.failed[phase], 0)]:
            log.warning(f"left out: {line}")
        self.failed[phase] += len(skipped)
        if self.folder:
            append_lines(self.folder / "unreadable_images.txt", [f"{phase}: {line}" for line in skipped])
        total = len(loader.dataset)
        if phase == "train":  # each process has a share that is like the others'; of an evaluation, see below
            total = math.ceil(total / world_size())
        judge_unreadable(phase, self.failed[phase], total)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("train", pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        failed = self._report("val", pl_module)
        if failed:
            judge_unreadable("val", failed, len(trainer.val_dataloaders.dataset))  # type: ignore[union-attr]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        failed = self._report("test", pl_module)
        if failed:
            judge_unreadable("test", failed, len(trainer.test_dataloaders.dataset))  # type: ignore[union-attr]

    def _report(self, phase: str, pl_module: LightningModule) -> int:
        """How many failed on all processes together."""
        failed = int(sum_over_processes(torch.tensor(self.failed[phase], device=pl_module.device)))
        if failed and rank() == 0:
            log.warning(f"{phase}: {failed} samples left out, their images cannot be decoded")
        return failed


def judge_unreadable(phase: str, failed: int, total: int) -> None:
    """Raises VLMoError if so many of the samples of a phase cannot be decoded that the data set must be damaged."""
    if failed > MAX_FAILED_SHARE * total:
        raise VLMoError(
            f"{failed} of {total} {phase} samples have images that cannot be decoded, more than "
            f"{MAX_FAILED_SHARE:.0%}: the data set is damaged; re-create its Arrow files (DATA.md)"
        )


class NonFinite(Callback):
    """Skips an optimizer step, on all processes alike, if the loss of any of its passes or any gradient is inf or NaN.

    To skip it takes the gradients away, which every optimizer passes over. Each skipped step is written to
    `nonfinite_steps.txt` in the run's folder with the numbers (`raw_index`) of the samples; too many in a row stop the
    run. With fp16, a gradient that overflows only because the loss was scaled up is the scaler's affair: it skips the
    step and halves the scale, and nothing is counted. The schedule of the learning rate stands still for a skipped
    step, whoever skips it.

    Logs the norm of the gradient, before it is clipped, as `train/grad_norm` (not where DeepSpeed keeps the gradients).

    Attributes:
        skipped: steps of this run so far.
    """

    FILE = "nonfinite_steps.txt"

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
        self._folder = run_folder(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = batch.get("raw_index", torch.empty(0))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._passes.append((loss.detach(), self._samples))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
        passes, self._passes = self._passes, []
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = _gradient_norm(parameters, trainer)
        if parameters:
            pl_module.log("train/grad_norm", norm)
        finite = torch.stack([norm, *(loss.float() for loss, _ in passes)]).isfinite()
        # on a GPU, the one time a step that it is waited for
        step_is_finite = not all_reduce_any(~finite.all())
        pl_module.step_is_skipped = not (step_is_finite and passes)  # (no pass: no image of the batch could be decoded)
        if step_is_finite:
            self._in_a_row = 0
            return
        nonfinite_passes = [samples for ok, (_, samples) in zip(finite[1:].tolist(), passes, strict=True) if not ok]
        loss_is_finite = not any_process(bool(nonfinite_passes))
        scaler_will_skip = loss_is_finite and _loss_scale(trainer) > 1
        if scaler_will_skip:
            return
        for parameter in parameters:
            parameter.grad = None
        self.skipped += 1
        self._in_a_row += 1
        what, samples = ("loss", nonfinite_passes) if nonfinite_passes else ("gradient", [own for _, own in passes])
        self._report(trainer.global_step, what, [number for part in samples for number in part.tolist()])
        if self._in_a_row >= self.max_nonfinite:
            raise VLMoError(
                f"{self._in_a_row} steps in a row had a loss or gradient that is inf or NaN (max_nonfinite="
                f"{self.max_nonfinite}): lower learning_rate, set gradient_clip_val or precision=bf16, or look at the "
                f"samples that {self.FILE} names; the checkpoints are of before"
            )

    def _report(self, step: int, what: str, numbers: list[int]) -> None:
        line = f"step {step}, rank {rank()}: the {what} is inf or NaN, the step is skipped; samples "
        shown = ", ".join(map(str, numbers[:SHOWN_NUMBERS])) + (", ..." if len(numbers) > SHOWN_NUMBERS else "")
        log.warning(f"{line}{shown} ({self.skipped} skipped so far)")
        if self._folder:
            append_lines(self._folder / self.FILE, [line + ", ".join(map(str, numbers))])


def _gradient_norm(parameters: list[Tensor], trainer: Trainer) -> Tensor:
    """The norm of all gradients together, a scalar on the run's device.

    It is inf or NaN if any is, or is so large (1e19) that its square is none; on a CPU it takes a tenth of the time of
    the maximum.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):  # each process has a part of every gradient
        norm = norm.full_tensor()
    return norm.to(trainer.strategy.root_device)


def _loss_scale(trainer: Trainer) -> float:
    """What fp16 multiplies the loss by; 1 for other precisions."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler.get_scale() if scaler else 1.0
