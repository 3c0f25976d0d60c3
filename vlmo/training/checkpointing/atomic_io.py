"""Writes Lightning's checkpoints so that a kill or a full disk never costs one that was there, and training goes on
meanwhile.

A state that is whole in one process becomes a file, one that is shared out among processes a folder
(`vlmo.checkpoints.sharded`). Both are written under a name for what is unfinished, and renamed.
"""

import errno
import logging
import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from vlmo.checkpoints import sharded
from vlmo.checkpoints.files import TRAINED, to_train
from vlmo.files import UNFINISHED, atomic_write, sync
from vlmo.training.checkpointing.background import BackgroundWork, CopyOfGPU, copied_to_cpu
from vlmo.training.checkpointing.files import remove
from vlmo.training.preparation import existing_folder

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints appear complete or not at all, by default while training goes on from a copy in the CPU's memory.

    What cannot be written is reported, not raised: others wait for who writes.

    Attributes:
        copied: set when the weights and the state of the optimizer may change.
        failure: why the last one was not written, None if it was; known once `wait` has returned.
    """

    def __init__(self, background: bool = True, written: Callable[[Path], None] | None = None) -> None:
        """
        Args:
            background: False: training waits, without a copy in memory.
            written: called by the first process with the path of each checkpoint when it is complete.
        """
        self.failure: str | None = None
        self._written = written
        self._work = BackgroundWork() if background else None
        self._mesh: DeviceMesh | None = None
        self.copied = threading.Event()
        self.copied.set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Waits for the one before first. A state that is shared out must be given by all its processes."""
        self.wait()
        self.failure = None
        shared = any(isinstance(tensor, DTensor) for tensor in checkpoint[sharded.WEIGHTS].values())
        if shared and self._mesh is None:  # (apart from training: its exchanges happen at the same time)
            self._mesh = DeviceMesh.from_group(dist.new_group(backend="gloo"), "cpu")  # type: ignore[arg-type]
        write = self._write_folder if shared else self._write_file
        if not self._work:
            write(checkpoint, Path(path))
            return
        large = (sharded.WEIGHTS, sharded.OPTIMIZERS, TRAINED)  # these change in the step of the optimizer alone
        now = {name: value if name in large else copied_to_cpu(value) for name, value in checkpoint.items()}
        self.copied.clear()
        self._work.start(partial(self._copy_and_write, now, Path(path), write, CopyOfGPU()))

    def wait(self) -> None:
        """Until the last one is complete, or has failed."""
        if self._work:
            self._work.wait()

    def _copy_and_write(self, checkpoint: Any, path: Path, write: Callable[..., None], copied: CopyOfGPU) -> None:
        try:
            checkpoint = copied(checkpoint, self._mesh)
        finally:
            self.copied.set()
        write(checkpoint, path)

    def load_checkpoint(self, path: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Tensors and plain values alone: a file cannot name code to be run."""
        if sharded.is_sharded(Path(path)):
            return sharded.put_together(sharded.read_rest(Path(path)), sharded.read_whole(Path(path)))
        return to_train(super().load_checkpoint(path, *arguments, **(options | {"weights_only": True})))

    def _write_file(self, checkpoint: dict[str, Any], path: Path) -> None:
        try:
            with atomic_write(path) as file:
                _save(checkpoint, file)
        except OSError as error:
            self._report(path, checkpoint, error)
        else:
            self._complete(path)

    def _write_folder(self, checkpoint: dict[str, Any], path: Path) -> None:
        assert self._mesh is not None
        group, first = self._mesh.get_group(), self._mesh.get_rank() == 0
        rest, tensors = sharded.take_apart(checkpoint)
        unfinished = path.with_name(path.name + UNFINISHED)
        if first:
            with suppress(OSError):  # of a run that was killed; what stays of it is in nobody's way
                remove(unfinished)
        dist.barrier(group)
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(unfinished), process_group=group)
            if first:
                with (unfinished / sharded.REST).open("wb") as file:
                    _save(rest, file)
                sync(unfinished / sharded.REST)
                sync(unfinished)
                _replace(path, unfinished)
        except (OSError, dcp.CheckpointException) as error:
            reasons = (
                [each for each, _ in error.failures.values()] if isinstance(error, dcp.CheckpointException) else []
            )
            self._report(path, checkpoint, (reasons or [error])[0])
            if first:
                remove(unfinished)
        else:
            if first:
                self._complete(path)

    def _complete(self, path: Path) -> None:
        if self._written:
            self._written(path)

    def _report(self, path: Path, checkpoint: dict[str, Any], error: BaseException) -> None:
        room, full = "", (errno.ENOSPC, errno.EDQUOT)
        needed, free = tensor_bytes(checkpoint), shutil.disk_usage(existing_folder(path.parent)).free
        if getattr(error, "errno", None) in full or (not isinstance(error, OSError) and free < needed):
            room = f": it needs {needed / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free there"
        why = (error.strerror if isinstance(error, OSError) else None) or error
        self.failure = f"{path} could not be written ({why}){room}; older checkpoints are as they were"
        log.error(self.failure)


def _replace(path: Path, complete: Path) -> None:
    """Gives a folder its name, in place of one that has it (folders cannot be exchanged at once)."""
    old = path.with_name(f"{path.name}.old{UNFINISHED}")
    remove(old)
    if path.exists():
        path.rename(old)
    complete.rename(path)
    sync(path.parent)
    remove(old)


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
