"""Reads files by name: those of this machine directly, all others by fsspec, through the cache on the disk."""

import glob
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from vlmo.errors import VLMoError
from vlmo.sources.names import expand_braces
from vlmo.sources.options import SourceOptions

THREADS = 16  # that ask for files at the same time


class ReadableFile(Protocol):
    """A file that is read by place."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Those bytes, fewer at the end of the file. Raises VLMoError if it cannot be read."""

    def read_once(self, offset: int, size: int) -> bytes:
        """The same; of a remote file, nothing is kept in the cache."""


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]*://", path) is not None


def find(location: str, endings: tuple[str, ...], options: SourceOptions) -> list[str]:
    """The files of a location: braces and * are expanded, of a folder those with one of the endings.

    Raises:
        VLMoError: if there is none, or one that is named is missing.
    """
    location = os.path.expanduser(location.removeprefix("file://"))
    patterns = expand_braces(location)
    if is_remote(location):
        from vlmo.sources.remote import Remote

        found = Remote(options).find(patterns, endings)
    else:
        found = [path for pattern in patterns for path in _find_local(pattern, endings)]
    if not found:
        raise VLMoError(
            f"{location}: there are no such files (expected: {' or '.join('*' + each for each in endings)})"
        )
    return list(dict.fromkeys(found))


def _find_local(pattern: str, endings: tuple[str, ...]) -> list[str]:
    if os.path.isdir(pattern):
        pattern = os.path.join(glob.escape(pattern), "*")
        return sorted(path for path in glob.glob(pattern) if path.endswith(endings))
    return sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]


def identities(files: Iterable[str], options: SourceOptions) -> list[dict[str, Any]]:
    """What tells each file from another of its name: its size, and its time or what the server calls it.

    Raises:
        VLMoError: with a line for each that is missing or refused.
    """
    files = list(files)
    if files and is_remote(files[0]):
        from vlmo.sources.remote import Remote

        identity = Remote(options).identity
        with ThreadPoolExecutor(THREADS) as pool:
            results = list(pool.map(lambda path: _or_error(identity, path), files))
    else:
        results = [_or_error(_local_identity, path) for path in files]
    if problems := [str(result) for result in results if isinstance(result, VLMoError)]:
        raise VLMoError("\n".join(problems))
    return [result for result in results if isinstance(result, dict)]


def _or_error(identity: Any, path: str) -> dict[str, Any] | VLMoError:
    try:
        return identity(path)
    except VLMoError as error:
        return error


def _local_identity(path: str) -> dict[str, Any]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise VLMoError(f"{path}: is missing") from None
    except OSError as error:
        raise VLMoError(f"{path}: cannot be read ({error.strerror})") from error
    return {"size": found.st_size, "mtime_ns": found.st_mtime_ns}


def is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two identities can be of the same file (an index that was copied to a server knows a time, not a tag)."""
    return all(one[name] == other[name] for name in one.keys() & other.keys())


def open_file(path: str, identity: Mapping[str, Any], options: SourceOptions) -> ReadableFile:
    """Opens a file for reading by place."""
    if is_remote(path):
        from vlmo.sources.remote import Remote

        return Remote(options).open(path, identity)
    return LocalFile(path)


class LocalFile:
    """A file of this machine. Reading has no position, so that forked processes can share it."""

    def __init__(self, path: str) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed with this object)
        except OSError as error:
            raise VLMoError(f"{path}: cannot be opened ({error.strerror})") from error
        self.path, self.size = path, os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, size: int) -> bytes:
        try:
            parts = [os.pread(self._file.fileno(), size, offset)]
            while parts[-1] and sum(map(len, parts)) < size:  # (a read gives at most 2 GiB)
                read = sum(map(len, parts))
                parts.append(os.pread(self._file.fileno(), size - read, offset + read))
        except OSError as error:
            raise VLMoError(f"{self.path}: cannot be read ({error.strerror}); the file itself may be whole") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    read_once = read
