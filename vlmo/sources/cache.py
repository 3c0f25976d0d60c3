"""A bounded folder on a local disk, shared by the processes of a node, for what is expensive to read again."""

import fcntl
import hashlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from vlmo.files import UNFINISHED

log = logging.getLogger(__name__)

KEPT = 0.9  # of the limit, when room is made
LOOKS = 500  # times that a process looks at the size while it writes as much as the limit


class DiskCache:
    """Files by key, each made by one process while the others that want it wait.

    What was used longest ago is removed first. Nothing of another name than a hash is written, and nothing outside of
    the folder. A disk that is full or refuses is no reason to stop: what is read is then kept in memory, once for each
    who asks, and a warning says so.
    """

    _warned = False

    def __init__(self, folder: Path, limit: int) -> None:
        """
        Args:
            limit: bytes.
        """
        self.folder, self.limit = folder, limit
        self._unseen = limit  # bytes written since the size was last looked at: at first by others

    def open(self, key: str, make: Callable[[], bytes]) -> BinaryIO:
        """What `key` stands for, made if it is not there; to be closed by the caller, after which it may be removed."""
        name = hashlib.sha256(key.encode()).hexdigest()[:40]
        path = f"{self.folder}/blocks/{name[:2]}/{name}"
        if file := _open(path):
            return file
        with self._lock(name):
            if file := _open(path):
                return file
            data = make()
            return self._write(Path(path), data) or io.BytesIO(data)

    def _write(self, path: Path, data: bytes) -> BinaryIO | None:
        for attempt in range(2):
            unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{UNFINISHED}")
            try:
                self._make_room(len(data), self.limit if not attempt else self.limit // 2)
                path.parent.mkdir(parents=True, exist_ok=True)
                unfinished.write_bytes(data)
                file = unfinished.open("rb")
                unfinished.replace(path)
                return file
            except OSError as error:
                with suppress(OSError):
                    unfinished.unlink(missing_ok=True)
                problem = error
                self._unseen = self.limit
        if not DiskCache._warned:
            DiskCache._warned = True
            log.warning(f"data_cache={self.folder}: cannot be written ({problem.strerror}); reading goes on without it")
        return None

    def _make_room(self, size: int, limit: int) -> None:
        """Removes what was used longest ago, where it is time to look."""
        self._unseen += size
        if self._unseen < limit / LOOKS:
            return
        self._unseen = 0
        files: list[tuple[int, int, str]] = []  # (pathlib takes nearly twice as long)
        with suppress(FileNotFoundError):
            for folder in os.scandir(self.folder / "blocks"):
                for entry in os.scandir(folder):
                    with suppress(FileNotFoundError):  # (another process removes too)
                        found = entry.stat()
                        files.append((found.st_mtime_ns, found.st_size, entry.path))
        files.sort()
        excess = sum(file[1] for file in files) + size - limit
        if excess > 0:
            excess += int((1 - KEPT) * limit)
        for _, length, path in files:
            if excess <= 0:
                break
            with suppress(FileNotFoundError):
                os.unlink(path)
            excess -= length

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Lets one in at a time; where the disk has no locks, all."""
        file = None
        try:
            (self.folder / "locks").mkdir(parents=True, exist_ok=True)
            file = (self.folder / "locks" / name[:3]).open("w")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            log.debug("no lock in %s", self.folder)
        try:
            yield
        finally:
            if file:
                file.close()


def _open(path: str) -> BinaryIO | None:
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (read by place, and closed by who asked for it)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        os.utime(file.fileno())  # (the time of the last use: many disks keep none)
    return file
