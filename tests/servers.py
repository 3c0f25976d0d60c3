"""Loopback servers of files: HTTP with ranges, that can be slow or fail, S3, and Google's storage."""

import json
import logging
import re
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from urllib.request import Request, urlopen

import pytest

from vlmo.sources import remote


class FileServer:
    """Serves a folder from a thread.

    Attributes:
        url: of the folder.
        requests: (method, path, status) of each.
        fetched: (path, first byte, last byte) of each range that was sent.
        fail_every: every so many-th request is answered with 500; 0: none.
        delay: seconds before each answer.
        refuse: whether to answer with 403.
        ranges: whether it knows them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[tuple[str, str, int]] = []
        self.fetched: list[tuple[str, int, int]] = []
        self.fail_every, self.delay, self.refuse, self.ranges = 0, 0.0, False, True
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        time.sleep(self.delay)
        path = self.folder / request.path.lstrip("/")
        status, content = 404, b""
        headers: dict[str, str] = {}
        if self.fail_every and len(self.requests) % self.fail_every == self.fail_every - 1:
            status = 500
        elif self.refuse:
            status = 403
        elif path.is_file():
            status = 200
            headers = {"Accept-Ranges": "bytes", "ETag": f'"{path.stat().st_mtime_ns}"'}
            if self.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))):
                size = path.stat().st_size
                start, last = int(asked[1]), min(int(asked[2]), size - 1)
                headers["Content-Range"] = f"bytes {start}-{last}/{size}"
                with path.open("rb") as file:
                    file.seek(start)
                    status, content = 206, file.read(last + 1 - start)
                self.fetched.append((request.path, start, last))
            else:
                content = path.read_bytes()
        self.send(request, status, headers, content)

    def send(self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes) -> None:
        self.requests.append((request.command, request.path, status))
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            with suppress(ConnectionError):  # (a client may have learnt enough elsewhere)
                request.wfile.write(content)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.close()


class GoogleServer(FileServer):
    """A folder as a bucket of Google's storage: of its JSON API what gcsfs asks, lists, sizes and ranges of objects."""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        address = urlsplit(request.path)
        what, name = re.fullmatch(r"(/download)?/storage/v1/b/\w+/o/?(.*)", address.path).groups()  # type: ignore[union-attr]
        name = unquote(name)
        if what or self.refuse or not (self.folder / name).exists():
            request.path = name
            return super().answer(request)
        prefix = name or parse_qs(address.query)["prefix"][0]
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        objects = [
            {
                "name": str(path.relative_to(self.folder)),
                "size": path.stat().st_size,
                "etag": str(path.stat().st_mtime_ns),
            }
            for path in paths
        ]
        found = [each for each in objects if each["name"].startswith(prefix)]
        content = json.dumps(found[0] if name else {"items": found})
        self.send(request, 200, {"Content-Type": "application/json"}, content.encode())


@contextmanager
def google_bucket(folder: Path) -> Iterator[GoogleServer]:
    """A bucket `private` with the files of a folder, on a loopback server that the environment names.

    Skips the test where a package is missing.
    """
    pytest.importorskip("gcsfs", reason="needs gcsfs")
    server = GoogleServer(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", server.url)
            patch.setattr(remote, "_filesystems", {})  # (the address is that of the first use)
            yield server
    finally:
        server.close()


@contextmanager
def s3_bucket(files: Iterable[Path]) -> Iterator[str]:
    """A bucket with these files on a loopback S3 server, whose login is in the environment; gives its address.

    Skips the test where a package is missing.
    """
    moto = pytest.importorskip("moto.server", reason="needs moto[server]")
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    service = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    login = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    login["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{service.get_host_and_port()[1]}"
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in login.items():
                patch.setenv(name, value)
            patch.setattr(remote, "_filesystems", {})  # (the address is that of the first use)
            # (what earlier tests of this process have stored is still there)
            urlopen(Request(f"{login['AWS_ENDPOINT_URL']}/moto-api/reset", method="POST")).close()
            client = boto3.client("s3")
            client.create_bucket(Bucket="private")
            for path in files:
                client.upload_file(str(path), "private", f"pairs/{path.name}")
            yield "s3://private/pairs"
    finally:
        service.stop()
