"""A run writes down what its report needs, and at its end, however it ends, the report."""

import json
import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.files import atomic_write
from vlmo.modules.vlmo_module import VLMo
from vlmo.settings import Settings
from vlmo.training.environment import SHARDED, Environment
from vlmo.training.run_report import facts
from vlmo.training.run_report.history import RECORD, History
from vlmo.training.run_report.page import REPORT, write_report
from vlmo.training.run_report.samples import sample_predictions
from vlmo.training.run_report.warnings_heard import WarningsHeard

log = logging.getLogger(__name__)


class RunRecord(Callback):
    """Keeps `record.json` in the run's folder: begun when the run begins, so that one that is killed has it too.

    Whatever goes wrong with it is one line of the log: no run fails for its report.
    """

    def __init__(
        self,
        settings: Settings,
        environment: Environment,
        datamodule: MTDataModule,
        model: VLMo,
        heard: WarningsHeard | None = None,
        resumed_from: Path | None = None,
        start: str = "",
    ) -> None:
        """
        Args:
            heard: the warnings.
            start: fingerprint of the weights at `load_path`.
        """
        self.settings, self.environment, self.datamodule, self.model = settings, environment, datamodule, model
        self.heard, self.resumed_from, self.start = heard or WarningsHeard(), resumed_from, start
        self.values: dict[str, Any] = {}
        self._began = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin(trainer)

    def _begin(self, trainer: Trainer) -> None:
        if self.values or not _writes(trainer):
            return
        self.values = {
            "status": "running",
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "resumed_from": str(self.resumed_from.absolute()) if self.resumed_from else None,
            "resumed_at": trainer.global_step if self.resumed_from else None,
            "weights_at_start": self.start,
        }
        folder = Path(trainer.default_root_dir)
        self._try(lambda: self._gather(folder))

    def _gather(self, folder: Path) -> None:
        total = sum(p.numel() for p in self.model.parameters())
        trained = 0 if self.settings.test_only else sum(p.numel() for _, p in self.model.trained_parameters())
        self.values |= {
            "settings": self.settings.model_dump(mode="json"),
            "code": facts.code(),
            "environment": facts.environment(self.settings, self.environment),
            "data": facts.data_files(self.datamodule.opened_files()),
            "parameters": {"all": total, "trained": trained},
        }
        self._write(folder)

    def end(self, trainer: Trainer, status: str, metrics: Mapping[str, float] | None = None) -> None:
        """Writes the record and the report; with samples, unless the run has failed (`metrics` is None then).

        Args:
            status: how it ended, for people.
            metrics: the last numbers by log tag.
        """
        if not _writes(trainer):
            return
        folder = Path(trainer.default_root_dir)
        self.values |= {
            "status": status,
            "ended": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - self._began, 1),
            "steps": trainer.global_step,
            "metrics": {name: value for name, value in (metrics or {}).items() if value == value},
            "warnings": dict(self.heard.counts),
        }
        self._try(lambda: self.values.update(data=facts.data_files(self.datamodule.opened_files())))
        self._try(lambda: self.values.update(memory=facts.memory()))
        self._try(lambda: self._write(folder, with_report=True))  # before the samples, which take longer
        if metrics is not None and self.environment.strategy not in SHARDED:
            self._try(lambda: self._add_samples(folder))

    def _add_samples(self, folder: Path) -> None:
        splits = ("test", "val") if self.settings.test_only else ("val", "test", "train")
        self.values["samples"] = sample_predictions(self.model, self.datamodule, splits)
        if self.values["samples"]:
            self._write(folder, with_report=True)

    def _write(self, folder: Path, with_report: bool = False) -> None:
        with atomic_write(folder / RECORD) as file:
            file.write((json.dumps(self.values, indent=1) + "\n").encode("utf-8", "backslashreplace"))
        if with_report:
            write_report(History.read(folder), folder / REPORT)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # (no run fails for its report)
            reason = " ".join(str(error).split()) or type(error).__name__
            log.error(f"the report of this run is not complete: {type(error).__name__}: {reason}")


def _writes(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
