"""What is counted around the steps: unreadable images."""

import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.distributed.collectives import rank, sum_over_processes, world_size
from vlmo.errors import VLMoError
from vlmo.files import append_lines

log = logging.getLogger(__name__)

MAX_FAILED_SHARE = 0.01  # of a data set's samples, in one pass over it
SHOWN = 5  # failed samples that are named one by one


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
        # here, as it takes all processes to ask for it; (without loggers it is the working directory)
        self.folder = Path(str(trainer.log_dir)) if trainer.loggers else None

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
        self._judge(phase, self.failed[phase], total)

    def _judge(self, phase: str, failed: int, total: int) -> None:
        if failed > MAX_FAILED_SHARE * total:
            raise VLMoError(
                f"{failed} of {total} {phase} samples have images that cannot be decoded, more than "
                f"{MAX_FAILED_SHARE:.0%}: the data set is damaged; make its Arrow files anew (DATA.md)"
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report("train", pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        failed = self._report("val", pl_module)
        if failed:
            self._judge("val", failed, len(trainer.val_dataloaders.dataset))  # type: ignore[union-attr]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        failed = self._report("test", pl_module)
        if failed:
            self._judge("test", failed, len(trainer.test_dataloaders.dataset))  # type: ignore[union-attr]

    def _report(self, phase: str, pl_module: LightningModule) -> int:
        """How many failed on all processes together."""
        failed = int(sum_over_processes(torch.tensor(self.failed[phase], device=pl_module.device)))
        if failed and rank() == 0:
            log.warning(f"{phase}: {failed} samples left out, their images cannot be decoded")
        return failed
