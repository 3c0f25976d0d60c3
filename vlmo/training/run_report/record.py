"""A run writes down what its report needs, and at its end, however it ends, the report."""

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.errors import VLMoError
from vlmo.modules.vlmo_module import VLMo
from vlmo.settings import Settings
from vlmo.training.environment import Environment
from vlmo.training.run_report import facts
from vlmo.training.run_report.history import RUNNING, History, now, write_record
from vlmo.training.run_report.page import REPORT, write_report
from vlmo.training.run_report.process import this_process
from vlmo.training.run_report.samples import sample_predictions, splits_of
from vlmo.training.run_report.warnings_heard import WarningsHeard

log = logging.getLogger(__name__)

WHOLE = ("auto", "ddp")  # beginnings of strategies under which each process has the whole model


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
        self._begin(trainer, self.resumed_from)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin(trainer)

    def _begin(self, trainer: Trainer, resumed_from: Path | None = None) -> None:
        if self.values or not _writes(trainer):
            return
        self.values = {
            "status": RUNNING,
            "process": this_process(),
            "started": now(),
            "resumed_from": str(resumed_from.absolute()) if resumed_from else None,
            "resumed_at": trainer.global_step if resumed_from else None,
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
        self._begin(trainer)  # where the run ended before
        folder = Path(trainer.default_root_dir)
        self.values |= {
            "status": status,
            "ended": now(),
            "seconds": round(time.monotonic() - self._began, 1),
            "steps": trainer.global_step,
            "metrics": {name: value for name, value in (metrics or {}).items() if value == value},
            "warnings": dict(self.heard.counts),
        }
        whole = self.environment.strategy.startswith(WHOLE)
        if not whole:
            self.values["no_samples"] = f"no process has the whole model under strategy={self.environment.strategy}"
        self._try(lambda: self.values.update(data=facts.data_files(self.datamodule.opened_files())))
        self._try(lambda: self.values.update(memory=facts.memory()))
        self._try(lambda: self._write(folder, with_report=True))  # before the samples, which take longer
        if metrics is not None and whole:
            self._try(lambda: self._add_samples(folder))

    def _add_samples(self, folder: Path) -> None:
        splits = splits_of(self.settings)
        self.values["samples"] = sample_predictions(self.model, self.datamodule, splits)
        self._write(folder, with_report=True)

    def _write(self, folder: Path, with_report: bool = False) -> None:
        write_record(folder, self.values)
        if with_report:
            write_report(History.read(folder), folder / REPORT)

    def _try(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception as error:  # (no run fails for its report)
            reason = " ".join(str(error).split()) or type(error).__name__
            log.error(f"the report of this run is not complete: {type(error).__name__}: {reason}")


def how_it_failed(error: BaseException) -> str:
    """Gives an exception in a line: of a long message the first and the last, which is the cause where it has a
    traceback of another process in it."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
        return "interrupted by Ctrl-C"  # (which Lightning makes a SystemExit of)
    if isinstance(error, VLMoError):
        return f"failed: {error}"
    lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
    return f"failed: {lines[0]}" + (f" ... {lines[-1].strip()}" if len(lines) > 1 else "")


def _writes(trainer: Trainer) -> bool:
    return trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
