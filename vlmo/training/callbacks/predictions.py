"""What a test run predicted, as files in `log_dir` named after the checkpoint; and what only all predictions tell."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.distributed.collectives import gather_objects, rank
from vlmo.evaluation.predictions import Statement, consistency, nlvr2_csv, vqa_json
from vlmo.files import atomic_write

log = logging.getLogger(__name__)


class VQAPredictions(Callback):
    """Writes the answers as the VQA server takes them, every question once: `vqa_submit_{checkpoint}.json`.

    A question whose image cannot be decoded gets the empty answer, with a warning.
    """

    def __init__(self, path: Path, answers: list[str]) -> None:
        self.path = path
        self.answers = answers
        self.predictions: list[tuple[int, str]] = []  # question, answer
        self.unread: list[int] = []
        self.written: list[Path] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.unread += [targets["qid"] for targets in batch["skipped_targets"]]
        if "vqa" in outputs:
            # a model may have room for more answers than there are
            best = outputs["vqa"].outputs["logits"][:, : len(self.answers)].argmax(-1).tolist()
            answers = [self.answers[answer] for answer in best]
            self.predictions += zip(batch["qid"].tolist(), answers, strict=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        predictions, unread = gather_objects(self.predictions), gather_objects(self.unread)
        self.predictions, self.unread = [], []
        if rank() != 0:
            return
        with atomic_write(self.path) as file:
            file.write(vqa_json(predictions + [(question, "") for question in unread]).encode())
        self.written = [self.path]
        if unread:
            log.warning(
                f"{self.path}: {len(unread)} of {len(predictions) + len(unread)} answers are empty, as the images of "
                "these questions cannot be decoded; the server counts them as wrong"
            )


class NLVR2Predictions(Callback):
    """Writes `{table}_{checkpoint}.csv` for each table, and logs `nlvr2/{dev,test}/consistency`.

    A sentence with an image that cannot be decoded gets an empty prediction, with a warning.
    """

    def __init__(self, folder: Path, checkpoint: str) -> None:
        self.folder = folder
        self.checkpoint = checkpoint
        self.statements: list[Statement] = []
        self.written: list[Path] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        for targets in batch["skipped_targets"]:
            self._add(targets["table_name"], targets["identifier"], targets["sentence"], targets["answers"], None)
        if "nlvr2" in outputs:
            predicted = (outputs["nlvr2"].outputs["logits"].argmax(-1) == 1).tolist()
            columns = batch["table_name"], batch["identifier"], batch["sentence"], batch["answers"].tolist(), predicted
            for row in zip(*columns, strict=True):
                self._add(*row)

    def _add(self, *row: Any) -> None:
        self.statements.append(Statement(*row))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tables: dict[str, list[Statement]] = defaultdict(list)
        for statement in gather_objects(self.statements):
            tables[statement.table].append(statement)
        self.statements = []
        for table, statements in sorted(tables.items()):
            share = consistency(statements)
            if share is not None:
                pl_module.log(f"nlvr2/{'dev' if 'dev' in table else 'test'}/consistency", share)
            if rank() == 0:
                self._write(table, statements)

    def _write(self, table: str, statements: list[Statement]) -> None:
        path = self.folder / f"{table}_{self.checkpoint}.csv"
        with atomic_write(path) as file:
            file.write(nlvr2_csv(statements).encode())
        self.written.append(path)
        unread = sum(statement.prediction is None for statement in statements)
        if unread:
            log.warning(
                f"{path}: {unread} of {len(statements)} predictions are empty, as an image of these pairs cannot be "
                "decoded; the official script counts them as wrong"
            )
