"""What happens between two batches: a checkpoint is written if one is due, and the run stops if it was told to.

A checkpoint may be written at any batch, but it stands for the last optimizer step: what was accumulated since is not
in it and is computed again. So is a validation that was cut short.
"""

import logging
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.strategies import DeepSpeedStrategy

from vlmo.distributed.collectives import any_process, rank
from vlmo.errors import Stopped, VLMoError
from vlmo.settings import Settings
from vlmo.training.callbacks.signals import StopSignals, requeue
from vlmo.training.checkpointing import resume
from vlmo.training.checkpointing.atomic_io import AtomicCheckpointIO
from vlmo.training.checkpointing.files import LAST, checkpoints_beside, link_last, remove, remove_unfinished
from vlmo.training.checkpointing.loop_state import set_logged_step, set_loops
from vlmo.training.checkpointing.resume import Position, RunState
from vlmo.training.checkpointing.saved_run import apply_options, set_learning_rates
from vlmo.training.preparation import run_folder

log = logging.getLogger(__name__)


class Checkpoints(Callback):
    """Writes `epoch=E-step=S.ckpt` after each validation (each epoch, where there is none) and as often as the options
    say; `last.ckpt` is the newest of them under a second name, and at the end of training the state then. A trial
    (`fast_dev_run`) writes none.

    Attributes:
        io: how they are written, by default while training goes on, and whether the last one was.
        position: how far training has come.
        validated_at: step of the last validation; -1 before.
        resumed_at: step of the checkpoint that was gone on from; -1 without one.
    """

    def __init__(
        self,
        settings: Settings,
        stop: StopSignals,
        each_epoch: bool = False,
        resumed_from: Path | None = None,
        start: str = "",
    ) -> None:
        """
        Args:
            stop: hears the signals.
            each_epoch: there is no validation to write after.
            resumed_from: the checkpoint that this run goes on from; `keep_last` counts those beside it too.
            start: fingerprint of the weights at `load_path`.
        """
        self.settings, self.stop, self.each_epoch, self.start = settings, stop, each_epoch, start
        self.io = AtomicCheckpointIO(settings.checkpoint_in_background, self._written)
        self.position = Position()
        self.validated_at = self.resumed_at = -1
        self.folder: Path | None = None
        # the state at the last optimizer step, while passes are being accumulated since; else that of the moment
        self._step_state: RunState | None = None
        self._loaded: dict[str, Any] | None = None
        self._newest: Position | None = None  # of the newest checkpoint
        self._newest_step = -1
        self._written_at = 0.0
        self._kept = checkpoints_beside(resumed_from, settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        self.folder = folder / "checkpoints" if folder else None

    # --- following the run -------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """After everything that draws random numbers to begin with."""
        self._written_at = time.monotonic()
        self._newest_step = trainer.global_step
        if rank() == 0 and self.folder and self.settings.resume_during_training:
            remove_unfinished(self.folder)
        if self._loaded is None:
            return
        resume.restore(self._loaded, self._layout(trainer), trainer.global_step, pl_module)
        set_logged_step(trainer)
        for config in trainer.lr_scheduler_configs:
            set_learning_rates(config.scheduler)  # type: ignore[arg-type]
        self._loaded = None
        if rank() == 0:
            epoch, batches = self.position[:2]
            log.info(f"resumed at step {trainer.global_step}, epoch {epoch}, batch {batches} of each process")

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Here all of the step before is done: its numbers are logged, and a validation after it has been made."""
        self.position = Position(trainer.current_epoch, batch_idx, self.position.total, validated=True)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            accumulates = trainer.accumulate_grad_batches > 1
            self._step_state = resume.capture(self.position, pl_module) if accumulates else None
            if self._is_due(trainer):
                self.save(trainer)
        self._stop_if_told(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.position = Position(self.position.epoch, batch_idx + 1, self.position.total + 1, validated=False)
        if self.position.batches % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch:
            self._step_state = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        self.io.copied.wait()

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and self._step_state is None:
            self._step_state = resume.capture(self.position, pl_module)  # validation draws random numbers

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit":  # (all processes have as many batches)
            self._stop_if_told(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        self.validated_at = trainer.global_step
        self.position = self.position._replace(validated=True)
        if self._step_state and self._step_state.position.batches == self.position.batches:
            self._step_state = None
        self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # before the module logs and forgets the epoch's numbers: training may end here, in the middle of an epoch
        self._step_state = self._step_state or resume.capture(self.position, pl_module)
        if self.each_epoch:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`last.ckpt`, wherever between two checkpoints the end is."""
        if self.folder is None:
            return
        if self._newest_step == trainer.global_step and self._newest and not self._failed(trainer):
            return
        if rank() == 0 and (self.folder / LAST).is_symlink():
            (self.folder / LAST).unlink()  # what it points to stays as it is
        trainer.save_checkpoint(self.folder / LAST)
        if self._failed(trainer):
            raise VLMoError(
                f"{self.io.failure or 'the last checkpoint could not be written'}; free some space and repeat the last "
                "steps with resume_during_training=True"
            )

    # --- writing -----------------------------------------------------------------------------------------------------

    def _is_due(self, trainer: Trainer) -> bool:
        step, every = trainer.global_step, self.settings.checkpoint_every_n_steps
        if step == self._newest_step:
            return False
        due = every is not None and step % every == 0
        if (minutes := self.settings.checkpoint_every_n_minutes) is not None:
            late = time.monotonic() - self._written_at >= 60 * minutes
            due |= any_process(late)
        return due

    def save(self, trainer: Trainer) -> Path | None:
        """Has the checkpoint of this moment written unless it is there; one that cannot be written is reported.

        Returns:
            its path, which is there when `io.wait` returns; None in a trial.
        """
        if self.folder is None:
            return None
        position = self._step_state.position if self._step_state else self.position
        path = self.folder / f"epoch={position.epoch}-step={trainer.global_step}.ckpt"
        self._written_at, self._newest_step = time.monotonic(), trainer.global_step
        if self._newest == position:
            return path
        self._newest = position
        trainer.save_checkpoint(path)
        if rank() == 0 and isinstance(trainer.strategy, DeepSpeedStrategy):  # which writes itself, without `io`
            self._written(path)
        return path

    def _failed(self, trainer: Trainer) -> bool:
        """Whether any process could not write the last one; waits until that is known."""
        self.io.wait()
        return any_process(self.io.failure is not None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """What is being written is whole, whatever ends the run."""
        self.io.wait()

    def _written(self, path: Path) -> None:
        """Called in the thread that writes."""
        if path.name == LAST:
            return
        link_last(path)
        self._kept = [kept for kept in self._kept if kept != path] + [path]
        self._remove_old()

    def _remove_old(self) -> None:
        if self.settings.keep_last is None:
            return
        while len(self._kept) > self.settings.keep_last:
            oldest = self._kept.pop(0)
            remove(oldest)
            if oldest.parent != self.folder and not any(kept.parent == oldest.parent for kept in self._kept):
                remove(oldest.with_name(LAST))  # of the run that this one goes on from

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        state = self._step_state or resume.capture(self.position, pl_module)
        saved = resume.to_checkpoint(state, self._layout(trainer), trainer.global_step)
        checkpoint[resume.KEY] = saved | {"start": self.start}

    # --- going on ----------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Before Lightning reads its own state."""
        if trainer.state.fn != "fit":
            return
        self._loaded = checkpoint.get(resume.KEY)
        if self._loaded is None:
            raise VLMoError("the checkpoint to resume from is of an older version; start from it with load_path=FILE")
        self.resumed_at = checkpoint["global_step"]
        apply_options(checkpoint, self.settings, pl_module.parameter_groups())
        layout = self._layout(trainer)
        epoch_length = max(int(layout["samples"]) // int(layout["world"]) // int(layout["batch"]), 1)
        self.position, seen = resume.position_here(self._loaded, layout, epoch_length)
        trainer.datamodule.resume_from(seen)  # type: ignore[attr-defined]
        epoch, batches, total, validated = self.position
        set_loops(checkpoint, epoch, batches, total, is_last_batch=batches >= epoch_length, validated=validated)

    def _layout(self, trainer: Trainer) -> dict[str, int | bool | str]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        order = data.windowed_order.fingerprint if data.windowed_order else None
        return resume.layout_of(self.settings, data.epoch_samples, order)

    # --- stopping ----------------------------------------------------------------------------------------------------

    def _stop_if_told(self, trainer: Trainer) -> None:
        """Saves and raises Stopped: on all processes after the same batch, whichever of them was told to."""
        if not any_process(self.stop.received is not None):
            return
        number = self.stop.received or self.stop.default  # (others may have been told, not this one)
        message = f"stopped by {number.name} at step {trainer.global_step}; "
        path = self.save(trainer)
        self.io.wait()
        if path is None:
            raise Stopped(f"{message}a trial saves nothing", number)
        if rank() == 0:
            requeue(number, self.settings.resume_during_training)
        message += self.io.failure or (
            f"saved {path}; to continue, give the same command with resume_during_training=True, or resume_from={path}"
        )
        raise Stopped(message if rank() == 0 else "", number)
