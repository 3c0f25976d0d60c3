"""Files behind http(s), s3, gs and whatever else fsspec knows: fetched in blocks, which the cache on the disk keeps."""

import importlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

from vlmo.errors import VLMoError
from vlmo.sources.cache import DiskCache
from vlmo.sources.options import SourceOptions

BLOCK_BYTES = 4 << 20
BUFFER_BYTES = 1 << 20  # of a connection
ATTEMPTS = 6
FIRST_WAIT = 0.5  # seconds; doubled each time
CONNECT_SECONDS, SILENT_SECONDS = 30, 60  # that a server may take to answer, and may say nothing
PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
REFUSED, GONE = (401, 403), (404, 410)  # of HTTP
NO_LOGIN = ("NoCredentialsError", "PartialCredentialsError", "TokenRetrievalError", "RefreshError")
AWS = "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; a public bucket: FSSPEC_S3_ANON=true"
GOOGLE = "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
LOGINS = {"s3": f" ({AWS})", "s3a": f" ({AWS})", "gs": f" ({GOOGLE})", "gcs": f" ({GOOGLE})"}

_filesystems: dict[tuple[int, str], Any] = {}  # by process: a forked one cannot use its parent's connections
_lock = threading.Lock()


class Remote:
    """The files of other machines."""

    def __init__(self, options: SourceOptions) -> None:
        self.cache = DiskCache(options.cache, options.cache_bytes)

    def find(self, patterns: Sequence[str], endings: tuple[str, ...]) -> list[str]:
        """The files of patterns, in order; http has none but those that are named."""
        found: list[str] = []
        for pattern in patterns:
            scheme = pattern.partition("://")[0]
            if "*" not in pattern and pattern.endswith(endings):
                found.append(pattern)
                continue
            pattern = pattern if "*" in pattern else f"{pattern.rstrip('/')}/*{endings[0]}"
            names = _attempt(pattern, partial(_glob, pattern))
            found += sorted(name if "://" in name else f"{scheme}://{name}" for name in names)
        return found

    def identity(self, path: str) -> dict[str, Any]:
        """Its size, and what the server calls this version of it."""
        info = _attempt(path, lambda: _filesystem(path).info(path))
        if not info.get("size"):
            raise VLMoError(f"{path}: the server does not say how large it is; it cannot be read by place")
        tag = next((info[name] for name in ("ETag", "etag", "md5Hash", "LastModified") if info.get(name)), "")
        return {"size": info["size"], "etag": str(tag)}

    def open(self, path: str, identity: Mapping[str, Any]) -> "RemoteFile":
        return RemoteFile(path, identity, self.cache)

    def published_index(self, path: str, name: str) -> bytes | None:
        """The index that lies beside a file on the server, if there is one."""
        url = path.rpartition("/")[0] + "/" + name
        try:
            return _attempt(url, lambda: _filesystem(url).cat_file(url))
        except VLMoError:  # (some servers refuse what is not there)
            return None


def _glob(pattern: str) -> list[str]:
    return _filesystem(pattern).glob(pattern)


class RemoteFile:
    """A file of another machine, read in blocks."""

    def __init__(self, path: str, identity: Mapping[str, Any], cache: DiskCache) -> None:
        self.path, self.size, self.cache = path, identity["size"], cache
        self.key = json.dumps([path, identity])
        self._last: tuple[int, BinaryIO | None] = (-1, None)

    def read(self, offset: int, size: int) -> bytes:
        end = min(offset + size, self.size)
        parts = []
        while offset < end:
            block, start = divmod(offset, BLOCK_BYTES)
            length = min(BLOCK_BYTES - start, end - offset)
            parts.append(_read(self._block(block), start, length))
            offset += length
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_once(self, offset: int, size: int) -> bytes:
        """As `read`, of the server alone: for who keeps what he makes of it."""
        return _attempt(self.path, partial(self._ask, offset, min(offset + size, self.size)))

    def fetch(self, block: int) -> None:
        """Brings a block into the cache."""
        self._open(block).close()

    def _block(self, block: int) -> BinaryIO:
        number, file = self._last
        if number != block or file is None:
            file = self._open(block)
            self._last = (block, file)
        return file

    def _open(self, block: int) -> BinaryIO:
        start = block * BLOCK_BYTES
        return self.cache.open(f"{self.key} {block}", lambda: self.read_once(start, BLOCK_BYTES))

    def _ask(self, start: int, stop: int) -> bytes:
        content = _filesystem(self.path).cat_file(self.path, start=start, end=stop)
        if len(content) > stop - start:
            raise VLMoError(f"{self.path}: the server knows no ranges: it sends whole files; keep a copy on a disk")
        if len(content) < stop - start:
            raise OSError(f"{len(content)} bytes came for {stop - start}")
        return content


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    """Without moving the position: forked processes share it."""
    if hasattr(file, "getbuffer"):
        return bytes(file.getbuffer()[offset : offset + size])
    return os.pread(file.fileno(), size, offset)


def _filesystem(path: str) -> Any:
    """fsspec's file system for an address. Raises VLMoError if a package is missing."""
    scheme = path.partition("://")[0]
    key = (os.getpid(), scheme)
    with _lock:
        if key not in _filesystems:
            try:
                fsspec: Any = importlib.import_module("fsspec")
                _filesystems[key] = fsspec.filesystem(scheme, skip_instance_cache=True, **_patience(scheme))
            except ImportError as error:
                package = PACKAGES.get(scheme, "fsspec")
                raise VLMoError(f"{path}: needs the package {package}: pip install 'vlmo[remote]'") from error
            except ValueError as error:
                raise VLMoError(f"{path}: {scheme}:// is unknown to fsspec ({error})") from error
        return _filesystems[key]


def _patience(scheme: str) -> dict[str, Any]:
    """How long to wait for a server."""
    if scheme in ("http", "https"):
        aiohttp: Any = importlib.import_module("aiohttp")
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=SILENT_SECONDS)
        # (of its 64 KB at a time, putting a block together takes half as long again)
        return {"client_kwargs": {"timeout": timeout, "read_bufsize": BUFFER_BYTES}}
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": SILENT_SECONDS}}
    return {}


def _attempt(path: str, call: Callable[[], Any]) -> Any:
    """What `call` gives, tried again where another time may help.

    Raises:
        VLMoError: if the file is missing, the login is refused, or nothing has helped.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            return call()
        except VLMoError:
            raise
        except Exception as problem:  # (each service raises its own)
            error = _true_cause(problem)
            status = getattr(error, "status", None) or getattr(error, "code", None)  # of aiohttp; of gcsfs
            if isinstance(error, FileNotFoundError) or status in GONE:
                raise VLMoError(f"{path}: is missing on the server") from error
            # (gcsfs calls 403 an OSError)
            refused = isinstance(error, PermissionError) or status in REFUSED or str(error).startswith("Forbidden")
            if refused or type(error).__name__ in NO_LOGIN:
                login = LOGINS.get(path.partition("://")[0], "")
                raise VLMoError(
                    f"{path}: the server refuses ({_line(error)}); log in as its own tools do{login}"
                ) from error
            last = error
    raise VLMoError(f"{path}: cannot be read after {ATTEMPTS} attempts; the last: {_line(last)}") from last


def _true_cause(error: Exception) -> Exception:
    """Of fsspec, which says of whatever happens behind http that the file is missing."""
    cause = error.__cause__
    is_hidden = isinstance(error, FileNotFoundError) and type(cause).__module__.startswith("aiohttp")
    return cause if is_hidden and isinstance(cause, Exception) else error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
