"""What happens around the steps: unreadable images, prediction files, the last checkpoint."""

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from vlmo.distributed import rank, world_size
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
        self.folder: Path | None = None

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
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "unreadable_images.txt").open("a") as listing:
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


class VQAPredictions(Callback):
    """Writes the predicted answers of a test run as the VQA server takes them: `log_dir/vqa_submit_<name>.json`."""

    def __init__(self, path: Path, answers: list[str]) -> None:
        self.path = path
        self.answers = answers
        self.predictions: list[dict[str, Any]] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if "vqa" in outputs:
            # a model may have room for more answers than there are
            best = outputs["vqa"].outputs["logits"][:, : len(self.answers)].argmax(-1).tolist()
            for question, answer in zip(batch["qid"].tolist(), best, strict=True):
                self.predictions.append({"question_id": question, "answer": self.answers[answer]})

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts: list[Any] = [self.predictions]
        if world_size() > 1:
            parts = [None] * world_size()
            dist.all_gather_object(parts, self.predictions)
        if rank() == 0:
            rows = sorted((row for part in parts for row in part), key=lambda row: row["question_id"])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".json.part")
            unfinished.write_text(json.dumps(rows))
            unfinished.replace(self.path)
            log.info(f"{len(rows)} answers written to {self.path}")
        self.predictions = []


class LastCheckpoint(Callback):
    """Saves `last.ckpt` at the end of training, wherever between two checkpoints that is."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = trainer.checkpoint_callback
        assert isinstance(checkpoints, ModelCheckpoint)
        path = Path(str(checkpoints.dirpath)) / "last.ckpt"
        # the first process decides for all: to save takes all, and another node may not see the file
        if trainer.strategy.broadcast(trainer.global_step != pl_module.validated_at or not path.exists()):
            trainer.save_checkpoint(path)
            checkpoints.save_last = False  # where it has saved none itself, it would now write a second, last-v1.ckpt
