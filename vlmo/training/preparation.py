"""What is settled before a run's model is built: the names of classes and tokens, and the folder that it writes to.

The names are the data's, which must be those that a loaded checkpoint was trained with. The folder is
`{log_dir}/{run_name}/version_{k}`, with logs, checkpoints and settings.
"""

import json
import logging
import tempfile
from pathlib import Path

from pytorch_lightning import Trainer

from vlmo.checkpoints.metadata import Metadata, incompatibilities
from vlmo.datamodules.multitask_datamodule import MTDataModule
from vlmo.distributed.first_process import is_first_process
from vlmo.errors import VLMoError
from vlmo.files import atomic_write
from vlmo.registry import TASKS
from vlmo.settings import Settings
from vlmo.text import vocabulary_of

log = logging.getLogger(__name__)


def resolve_label_names(
    settings: Settings, datamodule: MTDataModule, loaded: Metadata | None
) -> tuple[list[str] | None, list[str] | None]:
    """The names of the classes (None where no task has named classes, or nobody says); the tokenizer's tokens (None
    without text).

    Evaluation takes the names of the classes from the checkpoint, so that it needs no training data; training takes the
    data's.

    Args:
        loaded: what the file at `load_path` says of itself.

    Raises:
        VLMoError: in evaluation, if the file was trained with others. Training warns of another vocabulary, and starts
            the outputs of other classes new (`other_classes`).
    """
    tasks = [TASKS[name] for name in settings.active]
    vocabulary = vocabulary_of(datamodule.tokenizer) if any(task.has_text for task in tasks) else None
    if not any(task.named_classes for task in tasks):
        _compare(settings, loaded, None, vocabulary)
        return None, vocabulary
    names = datamodule.label_names()
    heads_are_kept = settings.test_only or settings.reset_heads is False  # (a head of other classes else starts new)
    _compare(settings, loaded, names if heads_are_kept else None, vocabulary)
    saved = loaded.answers if loaded and settings.reset_heads is not True else None
    names = saved or names if settings.test_only else names or saved
    if settings.test_only and not names:
        log.warning(
            f"{settings.load_path}: does not hold the names of its classes, and there is no file of them in data_root: "
            "no prediction file is written"
        )
    return names, vocabulary


def _compare(
    settings: Settings, loaded: Metadata | None, names: list[str] | None, vocabulary: list[str] | None
) -> None:
    names = names if settings.test_only else None
    problems = incompatibilities(loaded, names, vocabulary, settings.load_path) if loaded else []
    if problems and settings.test_only:
        raise VLMoError("\n".join(problems))
    for problem in problems:
        log.warning(problem)


def check_log_dir(settings: Settings) -> None:
    """Raises VLMoError if `log_dir` cannot be written to."""
    folder = existing_folder(settings.log_dir)
    try:
        with tempfile.TemporaryFile(dir=folder):  # (the permissions alone say nothing of read-only disks and quotas)
            pass
    except OSError as error:
        raise VLMoError(
            f"log_dir={settings.log_dir}: {folder} cannot be written to ({error.strerror}); give another log_dir"
        ) from error


def make_run_folder(settings: Settings) -> Path:
    """Makes the next `version_{k}`, for this run alone: of runs that start at the same moment each gets its own.

    The other processes of the run make none; they ask `run_folder`.

    Raises:
        VLMoError: if it cannot be made.
    """
    while True:
        folder = next_run_folder(settings)
        if settings.devices * settings.num_nodes > 1 and not is_first_process():
            return folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
            return folder
        except FileExistsError:
            continue  # another run was quicker
        except OSError as error:
            raise VLMoError(f"log_dir={settings.log_dir}: {folder} cannot be made ({error.strerror})") from error


def next_run_folder(settings: Settings) -> Path:
    """The first `version_{k}` after those that there are; it is not made."""
    runs = Path(settings.log_dir, settings.run_name)
    numbers = [path.name.removeprefix("version_") for path in runs.glob("version_*")]
    return runs / f"version_{max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1}"


def run_folder(trainer: Trainer) -> Path | None:
    """The first process's `next_run_folder`; None in a trial, which writes nothing. All processes must ask."""
    folder = trainer.strategy.broadcast(trainer.default_root_dir)
    return None if trainer.fast_dev_run else Path(folder)  # type: ignore[attr-defined]


def save_settings(settings: Settings, folder: Path) -> None:
    """Writes the resolved settings as JSON beside the checkpoints."""
    with atomic_write(folder / "settings.json") as file:
        file.write((json.dumps(settings.model_dump(mode="json"), indent=2) + "\n").encode())


def existing_folder(folder: str | Path) -> Path:
    """The folder, or the nearest above it that there is: where what will be written goes to."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder
