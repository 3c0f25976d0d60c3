"""Files that appear whole or not at all."""

import logging
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

UNFINISHED = ".part"  # suffix of a file that is being written; what a killed process leaves has it too


@contextmanager
def atomic_write(path: Path, by_several: bool = False) -> Iterator[BinaryIO]:
    """Opens `path` for writing; it appears, in place of an older one, when the block ends without an exception.

    Written beside it, synced to the disk, then renamed: a process killed at any moment leaves the older file or the
    new one. The folder is made if there is none.

    Args:
        by_several: processes may write it at the same time, each under a name of its own; the last stays.

    Raises:
        OSError: if it cannot be written (disk full, no permission); nothing is left of it then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    own = f".{uuid.uuid4().hex[:8]}" if by_several else ""
    unfinished = path.with_name(f"{path.name}{own}{UNFINISHED}")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync(path.parent)


def walk(root: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Gives each folder below `root` with the names of its files, in order.

    Links to folders are followed, and each folder is taken once, so that a circle of links ends. What macOS writes
    beside files (`._*`) is passed over.
    """
    taken: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_warn_of_folder):
        place = os.path.realpath(folder)
        folders[:] = sorted(folders) if place not in taken else []
        if place not in taken:
            taken.add(place)
            yield folder, sorted(name for name in names if not name.startswith("._"))


def _warn_of_folder(error: OSError) -> None:
    log.warning(f"{error.filename}: cannot be read ({error.strerror}); continuing without it")


def sync(path: str | Path) -> None:
    """Brings a file's content, or the names in a folder, to the disk: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """For lists of what went wrong: a disk that refuses them must not be the next thing; it is told instead."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", errors="backslashreplace") as listing:
            listing.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        log.error(f"{path} could not be written ({error.strerror or error})")
