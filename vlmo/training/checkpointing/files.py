"""The checkpoint files of a run: their names, which one to resume from, and how old ones are removed."""

import logging
import os
import shutil
from pathlib import Path

from vlmo.checkpoints import loading as checkpoint
from vlmo.checkpoints import sharded
from vlmo.checkpoints.files import is_refused
from vlmo.errors import VLMoError
from vlmo.files import UNFINISHED
from vlmo.modules import VLMo
from vlmo.settings import Settings
from vlmo.training.checkpointing.saved_run import SavedRun

log = logging.getLogger(__name__)

LAST = "last.ckpt"
PATTERN = "epoch=*-step=*.ckpt"


def link_last(path: Path) -> None:
    """Gives the checkpoint the second name `last.ckpt`, in place of an older one, at once.

    It is a hard link, which takes no space and outlives the first name; where there are none, and for folders, a
    symbolic one.
    """
    name = path.with_name(LAST)
    new = name.with_name(name.name + UNFINISHED)
    if new.is_symlink() or new.exists():
        new.unlink()
    try:
        os.link(path, new)
    except OSError:
        new.symlink_to(path.name)
    new.replace(name)


def remove(path: Path) -> None:
    """Removes a checkpoint, file or folder (sharded), if it is there."""
    if path.is_dir() and not path.is_symlink():
        # (killed half-way, it must not leave the name of a checkpoint on a part of one)
        if path.suffix != UNFINISHED:
            path = path.rename(path.with_name(f"{path.name}.removed{UNFINISHED}"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left half written, in all versions of the run whose checkpoints are in `folder`."""
    for unfinished in folder.parent.parent.glob(f"version_*/checkpoints/*{UNFINISHED}"):
        remove(unfinished)


def checkpoints_beside(resumed_from: Path | None, settings: Settings) -> list[Path]:
    """Oldest first; only those in the folder of a run of this name, never what somebody else keeps elsewhere."""
    runs = Path(settings.log_dir, settings.run_name).resolve()
    if resumed_from is None or resumed_from.resolve().parent.parent.parent != runs:
        return []
    return sorted(resumed_from.parent.glob(PATTERN), key=lambda path: path.stat().st_mtime_ns)


def newest_intact(settings: Settings, start: str) -> Path | None:
    """The newest checkpoint of this run that can be read; damaged ones are passed over with a warning, and so are those
    of runs of the same name that were started from other weights.
    """
    runs = Path(settings.log_dir, settings.run_name)
    found = sorted(runs.glob("version_*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    damaged: set[int] = set()
    foreign: set[Path] = set()  # folders
    for path in found:
        if path.stat().st_ino in damaged or path.parent in foreign:
            continue  # the same under its second name, or of the same run
        try:
            if sharded.is_sharded(path):
                sharded.listing(path)
            elif path.is_file():  # (DeepSpeed's are its own to read)
                checkpoint.read(path)
            if not (other := SavedRun.read(path).other_start(settings, start)):
                return path
            foreign.add(path.parent)
            log.warning(f"{other}; it is not resumed")
        except VLMoError as error:
            if is_refused(error.__cause__):
                raise  # an older one would be gone on from although this one is whole
            damaged.add(path.stat().st_ino)
            log.warning(f"{str(error).split('; ')[0]}; continuing from the one before it")
    return None


def resume_path(settings: Settings, start: str = "") -> Path | None:
    """The checkpoint that training continues from, if any.

    Args:
        start: fingerprint of the weights at `load_path`.

    Raises:
        VLMoError: if it cannot be gone on from with these settings.
    """
    path = _resume_path(settings, start)
    if path:
        SavedRun.read(path).check(settings, start)
    return path


def _resume_path(settings: Settings, start: str) -> Path | None:
    if settings.test_only:
        return None
    if settings.resume_from:
        if not Path(settings.resume_from).exists():  # (DeepSpeed's are folders)
            raise VLMoError(f"resume_from={settings.resume_from}: there is no such file")
        return Path(settings.resume_from)
    return newest_intact(settings, start) if settings.resume_during_training else None


def check_resume(path: Path, model: VLMo) -> None:
    """Raises VLMoError if the checkpoint is of another model: resuming takes over the state of a run as a whole."""
    if sharded.is_sharded(path):
        saved = {name: size for name, (size, _) in sharded.weights(sharded.listing(path)).items()}
    elif path.is_dir():
        return  # DeepSpeed's
    else:
        found = checkpoint.read(path)
        saved = {name: t.shape for name, t in found.tensors.items()} if found.container == "state_dict" else {}
    if saved != {name: tensor.shape for name, tensor in model.state_dict().items()}:
        raise VLMoError(
            f"{path}: is not a checkpoint of this model and task that this project saved, so training cannot be "
            f"resumed from it; to start from its weights give it with load_path instead"
        )
