"""Loggers that a full disk does not end a run with: what they could not write is told and lost."""

import logging
from collections.abc import Callable
from typing import Any

from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from vlmo.settings import Settings

log = logging.getLogger(__name__)


class _IgnoreWriteErrors:
    """For a Lightning logger: reports what cannot be written, once until it can be again."""

    _failed = False

    def _try(self, write: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
            self._failed = False
        except (OSError, ValueError) as error:
            cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning's TensorBoard wraps all
            if not isinstance(cause, OSError):
                raise
            if not self._failed:
                where, why = self.log_dir, cause.strerror or cause  # type: ignore[attr-defined]
                log.error(f"{where}: numbers could not be logged ({why}); training goes on")
            self._failed = True


class CSV(_IgnoreWriteErrors, CSVLogger):
    """metrics.csv; rows that could not be written stay in memory and come with the next."""

    def save(self) -> None:
        self._try(super().save)


class TensorBoard(_IgnoreWriteErrors, TensorBoardLogger):
    """Event files; after a failure a new one is begun, as the writer of the old one has ended."""

    def log_metrics(self, *arguments: Any, **named: Any) -> None:
        self._try(super().log_metrics, *arguments, **named)
        if self._failed:
            self._experiment = None

    def save(self) -> None:
        self._try(super().save)


def build_loggers(settings: Settings) -> list[Any]:
    """Both, in the run's next free folder `version_k`."""
    tensorboard = TensorBoard(settings.log_dir, name=settings.run_name, default_hp_metric=False)
    csv = CSV(
        settings.log_dir,
        name=settings.run_name,
        version=tensorboard.version,
        flush_logs_every_n_steps=settings.log_every_n_steps,
    )
    return [tensorboard, csv]
