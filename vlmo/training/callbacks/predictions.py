"""What a test run predicted, as files in `log_dir` named after the checkpoint; each task says what and how."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.distributed.collectives import gather_objects, rank
from vlmo.tasks.base import PredictionFiles

log = logging.getLogger(__name__)


class Predictions(Callback):
    """Collects the rows of `Task.predictions` over all batches and processes, and has them written.

    Attributes:
        written: the files.
    """

    def __init__(self, folder: Path, checkpoint: str, label_names: Sequence[str] | None) -> None:
        """
        Args:
            checkpoint: name of the evaluated file.
            label_names: of the classes, where they have names.
        """
        self.folder, self.checkpoint, self.label_names = folder, checkpoint, label_names
        self.rows: dict[str, list[Any]] = defaultdict(list)  # by task
        self.written: list[Path] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for task in pl_module.tasks:
            self.rows[task.name] += task.predictions(batch, outputs.get(task.name), self.label_names)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        for task in pl_module.tasks:
            rows = gather_objects(self.rows.pop(task.name, []))
            before = set(self.folder.glob("*"))
            files = task.write_predictions(rows, self.folder, self.checkpoint) if rank() == 0 else None
            for path in before & set(files.paths if files else ()):
                log.warning(f"{path}: was there, of this or another checkpoint of that name, and has been replaced")
            self._report(files or PredictionFiles(), pl_module)

    def _report(self, files: PredictionFiles, pl_module: LightningModule) -> None:
        self.written += files.paths
        for warning in files.warnings:
            log.warning(warning)
        for tag, value in gather_objects(list(files.metrics.items())):  # so that all processes have logged the same
            pl_module.log(tag, value)
