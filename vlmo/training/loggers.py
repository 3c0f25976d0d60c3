"""Loggers by name (`vlmo.registry.LOGGERS`): `loggers=` picks them, and a plugin may register more.

A builder gets the settings and the run's folder, and returns a Lightning logger. Packages that not everybody has are
imported when their logger is built. What CSV and TensorBoard cannot write, on a full disk, is reported and lost; the
run goes on.
"""

import importlib.util
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import CometLogger, CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from vlmo.errors import VLMoError
from vlmo.registry import LOGGERS
from vlmo.settings import Settings

log = logging.getLogger(__name__)

PROJECT = "vlmo"  # where nobody says another
PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "comet": "comet_ml", "trackio": "trackio"}  # that loggers need


def check_loggers(names: Iterable[str]) -> None:
    """Raises VLMoError with a line for each name that is unknown, and for each package that is missing."""
    names = list(names)
    LOGGERS.require(names, "loggers")
    missing = [name for name in names if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None]
    problems = [f"loggers: {name} needs a package that is not here: pip install {PACKAGES[name]}" for name in missing]
    if problems:
        raise VLMoError("\n".join(problems))


def build_loggers(settings: Settings, folder: Path) -> list[Any]:
    """The loggers of a run, in the order of `settings.loggers`.

    Raises:
        VLMoError: as `check_loggers` does, and if one cannot be set up (no account, no server).
    """
    check_loggers(settings.loggers)
    built = []
    for name in settings.loggers:
        try:
            built.append(LOGGERS[name](settings, folder))
        except Exception as error:  # each service has errors of its own
            reason = " ".join(str(error).split())
            raise VLMoError(f"loggers: {name} cannot be set up ({reason}); see docs/loggers.md") from error
    return built


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
                log.error(f"{where}: numbers could not be logged ({why}); training continues")
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
            self._experiment = None  # (Lightning's; the next use of `experiment` makes a new one)

    def save(self) -> None:
        self._try(super().save)


class Trackio(Logger):
    """Trackio, for which Lightning has no logger; it keeps its numbers in the folder TRACKIO_DIR of this machine."""

    def __init__(self, project: str, name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self._project, self._name, self._config = project, name, dict(config)
        self._run: Any = None

    @property
    def name(self) -> str:
        return self._project

    @property
    def version(self) -> str:
        return self._name

    @rank_zero_only
    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        """Nothing: the run has its config already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        import trackio

        if self._run is None:
            # it ends with the process: a validation after the training belongs to the same run
            self._run = trackio.init(project=self._project, name=self._name, config=self._config)
        self._run.log(dict(metrics), step=step)


# --- builders, by name ------------------------------------------------------------------------------------------------


def _place(folder: Path) -> dict[str, Any]:
    """The arguments by which Lightning's loggers write to this very folder."""
    return {"save_dir": str(folder.parent.parent), "name": folder.parent.name, "version": folder.name}


def _run_name(folder: Path) -> str:
    return f"{folder.parent.name}/{folder.name}"


def _make(folder: Path) -> None:
    """For those that want it to be there; on the other processes a run's folder is not the one that is used."""
    rank_zero_only(folder.mkdir)(parents=True, exist_ok=True)


@LOGGERS.register("tensorboard")
def tensorboard(settings: Settings, folder: Path) -> Any:
    return TensorBoard(**_place(folder), default_hp_metric=False)


@LOGGERS.register("csv")
def csv(settings: Settings, folder: Path) -> Any:
    return CSV(**_place(folder), flush_logs_every_n_steps=settings.log_every_n_steps)


@LOGGERS.register("wandb")
def wandb(settings: Settings, folder: Path) -> Any:
    """Weights & Biases; its variables say where to: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE."""
    project = os.environ.get("WANDB_PROJECT", PROJECT)
    return WandbLogger(name=_run_name(folder), project=project, save_dir=str(folder))


@LOGGERS.register("mlflow")
def mlflow(settings: Settings, folder: Path) -> Any:
    """MLflow; without MLFLOW_TRACKING_URI, into the file `mlflow.db` of `log_dir`."""
    log_dir = folder.parent.parent.absolute()
    _make(log_dir)
    uri = os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{log_dir}/mlflow.db")
    return MLFlowLogger(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), _run_name(folder), tracking_uri=uri)


@LOGGERS.register("comet")
def comet(settings: Settings, folder: Path) -> Any:
    """Comet; with COMET_START_ONLINE=0 into the run's folder, to be uploaded later."""
    _make(folder)
    project = os.environ.get("COMET_PROJECT_NAME", PROJECT)
    return CometLogger(project=project, name=_run_name(folder), offline_directory=str(folder))


@LOGGERS.register("trackio")
def trackio(settings: Settings, folder: Path) -> Any:
    return Trackio(os.environ.get("TRACKIO_PROJECT", PROJECT), _run_name(folder), settings.model_dump(mode="json"))
