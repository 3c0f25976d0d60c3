"""What a run does when it is told to stop: save, say how to go on, exit."""

import logging
import os
import shutil
import signal
import subprocess
from types import FrameType
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.distributed.collectives import all_reduce_any, rank
from vlmo.errors import Stopped
from vlmo.settings import Settings
from vlmo.training.checkpointing.checkpoints import Checkpoints

log = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals(Callback):
    """Ctrl-C, SIGTERM and SIGUSR1 (SLURM's notice before the end of a job): all processes save and stop after the batch
    they are in. A second Ctrl-C stops at once. In an evaluation there is nothing to save, and the first stops it.

    Takes the place of Lightning's handlers, which save to the working directory in the middle of whatever the process
    is doing, and on SIGTERM talk to the other processes from within the handler.
    """

    def __init__(self, settings: Settings, checkpoints: Checkpoints | None) -> None:
        """
        Args:
            checkpoints: None in a trial (`fast_dev_run`), which saves nothing.
        """
        self.settings, self.checkpoints = settings, checkpoints
        self.received: signal.Signals | None = None
        self._training = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = True
        self._listen()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._training = False
            self._listen()

    def _listen(self) -> None:
        if self.received and not self._training:  # in the last moments of training, which has saved
            raise Stopped(f"evaluation stopped by {self.received.name}", self.received)
        for number in HANDLED:  # Lightning puts back what was there before, at the end
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._training:
            raise Stopped(f"evaluation stopped by {signal.Signals(number).name}", number)
        self.received = self.received or signal.Signals(number)

    # after each batch, when its numbers are logged; the checkpoint is written by all processes together, so all stop at
    # the same batch, whichever of them was told to

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_if_told(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._training:  # (all processes have as many batches)
            self._stop_if_told(trainer)

    def _stop_if_told(self, trainer: Trainer) -> None:
        if not all_reduce_any(self.received is not None, trainer.strategy.root_device):
            return
        number = self.received or signal.SIGTERM  # (others may have been told, not this one)
        message = f"stopped by {number.name} at step {trainer.global_step}; "
        if self.checkpoints is None:
            raise Stopped(f"{message}a trial saves nothing", number)
        path = self.checkpoints.save(trainer)
        if number == signal.SIGUSR1 and rank() == 0:
            self._requeue()
        message += self.checkpoints.io.failure or (
            f"saved {path}; to go on, give the same command with resume_during_training=True, or resume_from={path}"
        )
        raise Stopped(message if rank() == 0 else "", number)

    def _requeue(self) -> None:
        """Puts the SLURM job back into the queue, if this is one."""
        job = os.environ.get("SLURM_JOB_ID")
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        if job is None or shutil.which("scontrol") is None:
            return
        if not self.settings.resume_during_training:
            log.warning(
                f"job {job} is not put back into the queue: without resume_during_training=True it would start anew"
            )
            return
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        answer = f"failed: {done.stderr.strip()}" if done.returncode else "done"
        log.warning(f"scontrol requeue {job}: {answer}")
