"""Writes Lightning's checkpoints so that a kill or a full disk never costs one that was there."""

import errno
import logging
import shutil
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from vlmo.files import atomic_write
from vlmo.training.preparation import existing_folder

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear complete or not at all, without a second copy in memory (Lightning's own makes one).

    What cannot be written is reported, not raised: only one process writes, and the others wait for it.

    Attributes:
        failure: why the last one was not written, None if it was.
    """

    def __init__(self) -> None:
        self.failure: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.failure = None
        path = Path(path)
        try:
            with atomic_write(path) as file:
                _save(checkpoint, file)
        except OSError as error:
            room = ""
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                needed = tensor_bytes(checkpoint) / 2**30
                free = shutil.disk_usage(existing_folder(path.parent)).free / 2**30
                room = f": it needs {needed:.2f} GiB, and {free:.2f} GiB are free there"
            why = error.strerror or error
            self.failure = f"{path} could not be written ({why}){room}; older checkpoints are as they were"
            log.error(self.failure)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Tensors and plain values alone: a file cannot name code to be run."""
        return super().load_checkpoint(path, *arguments, **(options | {"weights_only": True}))


class _Watched:
    """A file whose error is kept: torch's writer replaces it by one that does not say what happened."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(checkpoint: dict[str, Any], file: BinaryIO) -> None:
    watched = _Watched(file)
    try:
        torch.save(checkpoint, watched)  # type: ignore[arg-type]
    except RuntimeError as error:
        raise watched.error or error from error


def tensor_bytes(content: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples: a checkpoint's size but for some kilobytes."""
    if isinstance(content, Tensor):
        return content.nbytes
    if isinstance(content, dict):
        return sum(map(tensor_bytes, content.values()))
    return sum(map(tensor_bytes, content)) if isinstance(content, list | tuple) else 0
