"""What happens around the steps: unreadable images, the last checkpoint."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from vlmo.distributed import world_size
from vlmo.errors import VLMoError

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.01  # of a data set's samples, in one pass over it
SHOWN = 5  # failed samples that are named one by one


class UnreadableImages(Callback):
    """Counts the samples that were left out because their image cannot be decoded; too many stop the run.

    Each is listed in `unreadable_images.txt` in the run's folder.
    """

    def __init__(self) -> None:
        self.failed: Counter[str] = Counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.failed.pop("train", None)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.failed.pop("val", None)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._count("train", batch, trainer.train_dataloader, trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count("val", batch, trainer.val_dataloaders, trainer)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._count("test", batch, trainer.test_dataloaders, trainer)

    def _count(self, phase: str, batch: Any, loader: Any, trainer: Trainer) -> None:
        skipped = batch.get("skipped")
        if not skipped:
            return
        for line in skipped[: max(SHOWN - self.failed[phase], 0)]:
            log.warning(f"left out: {line}")
        self.failed[phase] += len(skipped)
        if trainer.loggers:  # (without, Lightning's log_dir is the working directory)
            folder = Path(str(trainer.log_dir))
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "unreadable_images.txt").open("a") as listing:
                listing.writelines(f"{phase}: {line}\n" for line in skipped)
        failed, total = self.failed[phase], math.ceil(len(loader.dataset) / world_size())  # of this process
        if failed > MAX_FAILED_SHARE * total:
            raise VLMoError(
                f"{failed} of {total} {phase} samples have images that cannot be decoded, more than "
                f"{MAX_FAILED_SHARE:.0%}: the data set is damaged; make its Arrow files anew (DATA.md)"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("test")

    def _report(self, phase: str) -> None:
        if self.failed[phase]:
            log.warning(f"{phase}: {self.failed[phase]} samples left out, their images cannot be decoded")


class LastCheckpoint(Callback):
    """Saves `last.ckpt` at the end of training, wherever between two checkpoints that is."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = trainer.checkpoint_callback
        assert isinstance(checkpoints, ModelCheckpoint)
        path = Path(str(checkpoints.dirpath)) / "last.ckpt"
        if trainer.global_step != pl_module.validated_at or not path.exists():
            trainer.save_checkpoint(path)
            checkpoints.save_last = False  # where it has saved none itself, it would now write a second, last-v1.ckpt
