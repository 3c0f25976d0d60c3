"""When checkpoints are written, which are kept, and which one a run goes on from."""

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.checkpoints import loading as checkpoint
from vlmo.distributed.collectives import all_reduce_any, rank
from vlmo.errors import VLMoError
from vlmo.files import UNFINISHED
from vlmo.settings import Settings
from vlmo.training.checkpointing.atomic_io import AtomicCheckpointIO
from vlmo.training.checkpointing.resume import Resume

log = logging.getLogger(__name__)

LAST = "last.ckpt"
PATTERN = "epoch=*-step=*.ckpt"


class Checkpoints(Callback):
    """Writes `epoch=E-step=S.ckpt` after each validation (each epoch, where there is none) and as often as the options
    say; `last.ckpt` is the newest of them under a second name, and at the end of training the state then.

    Attributes:
        io: how they are written, and whether the last one was.
    """

    def __init__(self, settings: Settings, resume: Resume, each_epoch: bool, resumed_from: Path | None) -> None:
        """
        Args:
            each_epoch: there is no validation to write after.
            resumed_from: the checkpoint that this run goes on from; `keep_last` counts those beside it too.
        """
        self.settings, self.resume, self.each_epoch = settings, resume, each_epoch
        self.io = AtomicCheckpointIO()
        self.folder = Path()
        self._written: tuple[int, int, bool] | None = None  # place of the newest
        self._newest_step = self._written_at = 0.0
        self._kept = _checkpoints_beside(resumed_from, settings)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(str(trainer.log_dir)) / "checkpoints"  # (asking for it is collective)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._written_at = time.monotonic()
        self._newest_step = trainer.global_step
        if rank() == 0 and self.settings.resume_during_training:  # what killed processes left unfinished
            for unfinished in self.folder.parent.parent.glob(f"version_*/checkpoints/*{UNFINISHED}"):
                remove(unfinished)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Here all of the step before is done: its numbers are logged, and a validation after it has been made."""
        step, every = trainer.global_step, self.settings.checkpoint_every_n_steps
        if batch_idx % trainer.accumulate_grad_batches or step == self._newest_step:
            return
        due = every is not None and step % every == 0
        if (minutes := self.settings.checkpoint_every_n_minutes) is not None:
            late = time.monotonic() - self._written_at >= 60 * minutes
            due |= all_reduce_any(late, trainer.strategy.root_device)
        if due:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.each_epoch:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """`last.ckpt`, wherever between two checkpoints the end is."""
        if self._newest_step == trainer.global_step and self._written and not self._failed(trainer):
            return
        if rank() == 0 and (self.folder / LAST).is_symlink():
            (self.folder / LAST).unlink()  # what it points to stays as it is
        trainer.save_checkpoint(self.folder / LAST)
        if self._failed(trainer):
            raise VLMoError(
                f"{self.io.failure or 'the last checkpoint could not be written'}; make room and take the last steps "
                "again with resume_during_training=True"
            )

    def save(self, trainer: Trainer) -> Path:
        """Writes the checkpoint of this moment unless it is there; one that could not be written has been reported."""
        path = self.folder / f"epoch={self.resume.place[0]}-step={trainer.global_step}.ckpt"
        self._written_at, self._newest_step = time.monotonic(), trainer.global_step
        if self._written == self.resume.place:
            return path
        self._written = self.resume.place
        trainer.save_checkpoint(path)
        if rank() == 0 and not self.io.failure:
            _give_second_name(path, path.with_name(LAST))
            self._kept = [kept for kept in self._kept if kept != path] + [path]
            self._remove_old()
        return path

    def _failed(self, trainer: Trainer) -> bool:
        return all_reduce_any(self.io.failure is not None, trainer.strategy.root_device)

    def _remove_old(self) -> None:
        if self.settings.keep_last is None:
            return
        while len(self._kept) > self.settings.keep_last:
            oldest = self._kept.pop(0)
            remove(oldest)
            if oldest.parent != self.folder and not any(kept.parent == oldest.parent for kept in self._kept):
                remove(oldest.with_name(LAST))  # of the run that this one goes on from


def _give_second_name(path: Path, name: Path) -> None:
    """A hard link, which takes no space and outlives the first name; where there are none, and for folders, a symbolic
    one. It replaces an older one at once."""
    new = name.with_name(name.name + UNFINISHED)
    if new.is_symlink() or new.exists():
        new.unlink()
    try:
        os.link(path, new)
    except OSError:
        new.symlink_to(path.name)
    new.replace(name)


def remove(path: Path) -> None:
    """A checkpoint, file or folder (sharded), if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _checkpoints_beside(resumed_from: Path | None, settings: Settings) -> list[Path]:
    """Oldest first; only those in the folder of a run of this name, never what somebody else keeps elsewhere."""
    runs = Path(settings.log_dir, settings.run_name).resolve()
    if resumed_from is None or resumed_from.resolve().parent.parent.parent != runs:
        return []
    return sorted(resumed_from.parent.glob(PATTERN), key=lambda path: path.stat().st_mtime_ns)


def newest_intact(settings: Settings) -> Path | None:
    """The newest checkpoint of this run that can be read; damaged ones are passed over with a warning."""
    runs = Path(settings.log_dir, settings.run_name)
    found = sorted(runs.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    damaged: set[int] = set()
    for path in found:
        if path.stat().st_ino in damaged:
            continue  # the same under its second name
        try:
            if path.is_file():  # sharded ones are Lightning's to read
                checkpoint.read(path)
            return path
        except VLMoError as error:
            damaged.add(path.stat().st_ino)
            log.warning(f"{str(error).split('; ')[0]}; going on from the one before it")
    return None
