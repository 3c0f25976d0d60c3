"""A run ends as a whole: when one of its processes is gone, the others do not wait for it in an exchange."""

import os
import signal
import sys
import threading
import time
from subprocess import Popen
from typing import NoReturn

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.errors import VLMoError
from vlmo.training.callbacks.signals import HANDLED

STOPPED = {128 + number for number in HANDLED}  # exit statuses of processes that were told to stop: all of them are


class ProcessWatchdog(Callback):
    """Where Lightning has started the processes of a node, its first watches the others, and each of them the first.

    (torchrun, srun and mpirun watch those that they start; with them, each process watches torchrun alone.)
    """

    def __init__(self, interval: float = 1.0, patience: float = 5.0) -> None:
        """
        Args:
            interval: seconds between two looks.
            patience: seconds that a process takes at most to be seen as gone after its connections are.
        """
        self.interval, self.patience = interval, patience
        self.parent = os.getppid()
        self._started = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        children = _children(trainer)
        if self._started or not (children or "LOCAL_RANK" in os.environ):
            return
        self._started = True
        threading.Thread(target=self._watch, args=(children,), daemon=True, name="process-watch").start()

    def explain(self, error: Exception, trainer: Trainer) -> Exception:
        """The process that is gone, if that is why an exchange failed; else the error itself."""
        children = _children(trainer)
        if not (children or "LOCAL_RANK" in os.environ):
            return error
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            if reason := self._why_gone(children):
                return VLMoError(reason)
            time.sleep(0.1)
        return error

    def _watch(self, children: list[Popen]) -> None:
        while not (children and all(child.poll() == 0 for child in children)):
            if reason := self._why_gone(children):
                if children:  # where an exchange fails instead of waiting, the run ends by itself (see `explain`)
                    time.sleep(self.patience)
                for child in children:
                    child.kill()
                _end(reason)
            time.sleep(self.interval)

    def _why_gone(self, children: list[Popen]) -> str | None:
        """Which process is gone and how, for people; None if none is. A process without children looks for its own."""
        if children:
            return _first_failed(children)
        if os.getppid() == self.parent:
            return None
        return (
            f"the process that started this one (PID {self.parent}) is gone, and with it the run; what it said last "
            "says why"
        )


def _children(trainer: Trainer) -> list[Popen]:
    """The processes that this one has started."""
    return getattr(trainer.strategy.launcher, "procs", None) or []


def _first_failed(children: list[Popen]) -> str | None:
    """The child that failed first, as far as exit statuses tell: one ended by a signal before one that ended itself,
    which often did so because the other was gone."""
    failed = [(number, child, child.poll()) for number, child in enumerate(children, 1)]
    failed = [(number, child, code) for number, child, code in failed if code and code not in STOPPED]
    for number, child, code in failed:
        if code is not None and code < 0:
            hint = " (often the kernel, for lack of memory)" if -code == signal.SIGKILL else ""
            name = signal.Signals(-code).name
            return f"process {number} of this node (PID {child.pid}) was ended by signal {name}{hint}"
    for number, child, code in failed:
        return f"process {number} of this node (PID {child.pid}) failed with exit status {code}; what it said is above"
    return None


def _end(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # (an exchange that waits for ever hears no exception)
