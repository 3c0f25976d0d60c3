"""A run ends as a whole: when one of its processes is gone, the others do not wait for it in an exchange."""

import os
import signal
import sys
import threading
import time
from functools import partial
from subprocess import Popen
from typing import NoReturn

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.errors import VLMoError
from vlmo.training.callbacks.signals import HANDLED

INTERVAL = 1.0  # seconds between two looks
STOPPED = {128 + number for number in HANDLED}  # exit statuses of processes that were told to stop: all of them are
PATIENCE = 5.0  # seconds that a process takes at most to be seen as gone after its connections are


class ProcessWatchdog(Callback):
    """Where Lightning has started the processes of a node, its first watches the others, and each of them the first.

    (torchrun, srun and mpirun watch those that they start; with them, each process watches torchrun alone.)
    """

    def __init__(self) -> None:
        self.started = False
        self.parent = os.getppid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        children: list[Popen] = getattr(trainer.strategy.launcher, "procs", None) or []
        if self.started or not (children or "LOCAL_RANK" in os.environ):
            return
        self.started = True
        watch = partial(_watch_children, children) if children else partial(_watch_parent, self.parent)
        threading.Thread(target=watch, daemon=True, name="process-watch").start()


def explain(error: Exception, trainer: Trainer) -> Exception:
    """The process that is gone, if that is why an exchange failed; else the error itself."""
    children: list[Popen] = getattr(trainer.strategy.launcher, "procs", None) or []
    if not (children or "LOCAL_RANK" in os.environ):
        return error
    parent = next(callback.parent for callback in trainer.callbacks if isinstance(callback, ProcessWatchdog))  # type: ignore[attr-defined]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if reason := _first_gone(children) or (not children and _orphaned(parent)):
            return VLMoError(reason)
        time.sleep(0.1)
    return error


def _watch_children(children: list[Popen]) -> None:
    while not all(child.poll() == 0 for child in children):
        if reason := _first_gone(children):
            time.sleep(PATIENCE)  # where an exchange fails instead of waiting, the run ends by itself (see `explain`)
            for child in children:
                child.kill()
            _end(reason)
        time.sleep(INTERVAL)


def _watch_parent(parent: int) -> None:
    while not (reason := _orphaned(parent)):
        time.sleep(INTERVAL)
    _end(reason)


def _orphaned(parent: int) -> str | None:
    if os.getppid() == parent:
        return None
    return f"the process that started this one (PID {parent}) is gone, and with it the run; what it said last says why"


def _first_gone(children: list[Popen]) -> str | None:
    """Of those that failed, one that a signal ended before one that ended itself: often that was for lack of it."""
    codes = {number: code for number, child in enumerate(children, 1) if (code := child.poll())}
    codes = {number: code for number, code in codes.items() if code not in STOPPED}
    if not codes:
        return None
    number = min(codes, key=lambda each: (codes[each] >= 0, each))
    code, pid = codes[number], children[number - 1].pid
    if code > 0:
        return f"process {number} of this node (PID {pid}) failed with exit status {code}; what it said is above"
    hint = " (often the kernel, for lack of memory)" if -code == signal.SIGKILL else ""
    return f"process {number} of this node (PID {pid}) was ended by signal {signal.Signals(-code).name}{hint}"


def _end(reason: str) -> NoReturn:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # (an exchange that waits for ever hears no exception)
