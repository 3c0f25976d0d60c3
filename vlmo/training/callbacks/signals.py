"""How a run hears that it shall stop; what it then does is `Checkpoints`' affair: save, say how to go on, exit."""

import logging
import os
import shutil
import signal
import subprocess
import threading
from types import FrameType

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.errors import Stopped

log = logging.getLogger(__name__)

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals(Callback):
    """Ctrl-C, SIGTERM and SIGUSR1 (SLURM's notice before the end of a job): all processes save and stop after the batch
    they are in. A second Ctrl-C stops at once. In an evaluation there is nothing to save, and the first stops it.

    Takes the place of Lightning's handlers, which save to the working directory in the middle of whatever the process
    is doing, and on SIGTERM talk to the other processes from within the handler.

    Attributes:
        received: the signal that came while training.
        default: what a process says that was told by another.
    """

    default = signal.SIGTERM

    def __init__(self) -> None:
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
        if threading.current_thread() is not threading.main_thread():
            log.info("this run is not in the main thread: no signal is answered, Ctrl-C does not save")
            return
        for number in HANDLED:  # Lightning puts back what was there before, at the end
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._training:
            raise Stopped(f"evaluation stopped by {signal.Signals(number).name}", number)
        self.received = self.received or signal.Signals(number)


def requeue(number: signal.Signals, resumes: bool) -> None:
    """Puts the SLURM job back into the queue, if this is one and `number` is SLURM's notice.

    Args:
        resumes: whether the job would go on from the checkpoint.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if number != signal.SIGUSR1 or job is None or shutil.which("scontrol") is None:
        return
    if not resumes:
        log.warning(
            f"job {job} is not put back into the queue: without resume_during_training=True it would start over"
        )
        return
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    answer = f"failed: {done.stderr.strip()}" if done.returncode else "done"
    log.warning(f"scontrol requeue {job}: {answer}")
