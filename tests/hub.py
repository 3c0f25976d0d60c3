"""A stand-in of the Hugging Face hub on this machine: what pushing and loading a model asks of it.

As on the hub, weights do not travel within the commit: LFS's batch API (docs/api/batch.md of git-lfs) says where to put
them, a commit then names their SHA-256, and who loads them is sent on to another address.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = ".safetensors"  # the hub's .gitattributes have these files as large ones, of whatever size


class Hub:
    """Runs in a thread until it is closed.

    Attributes:
        url, storage: of the hub, and of its large files, elsewhere by name.
        files: (content, whether it is a large file) by repository and path.
        objects: content of the large files that were uploaded, by SHA-256.
        refused: kind of request ("create", "preupload", "batch", "commit") -> status that it is answered with.
        interrupted: how many of the next transfers of large files break off half way.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, tuple[bytes, bool]]] = {}
        self.objects: dict[str, bytes] = {}
        self.refused: dict[str, int] = {}
        self.interrupted = 0
        outer = self

        class Handler(_Handler):
            hub = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = f"http://localhost:{self._server.server_port}/storage"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def content(self, repository: str, path: str) -> bytes:
        return self.files[repository][path][0]

    def large(self, repository: str) -> set[str]:
        """Names of the files that came by LFS."""
        return {path for path, (_, large) in self.files[repository].items() if large}

    def breaks_off(self) -> bool:
        self.interrupted -= 1
        return self.interrupted >= 0

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = self.path.strip("/").split("?")[0].split("/")
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer({"errors": [], "warnings": []})
        batch = parts[-3:] == ["lfs", "objects", "batch"]  # owner/name.git/info/lfs/objects/batch
        name = "/".join(parts[:2]).removesuffix(".git") if batch else "/".join(parts[2:4])
        if name not in self.hub.files:
            return self.not_found("Repo", "Repository not found")
        kind = "batch" if batch else parts[4]
        if self.refuses(kind):
            return None
        if batch:
            return self.batch(json.loads(body))
        if kind == "preupload":
            modes = {True: "lfs", False: "regular"}
            names = [each["path"] for each in json.loads(body)["files"]]
            files = [{"path": p, "uploadMode": modes[p.endswith(LARGE)], "shouldIgnore": False} for p in names]
            return self.answer({"files": files})
        return self.commit(name, [json.loads(line) for line in body.decode().splitlines()])

    def create(self, asked: dict[str, Any]) -> None:
        if not self.refuses("create"):
            name = f"{asked['organization']}/{asked['name']}"
            self.hub.files.setdefault(name, {})
            self.answer({"url": f"{self.hub.url}/{name}", "name": name})

    def batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            if each["oid"] not in self.hub.objects:  # (what is there already need not come again)
                each["actions"] = {"upload": {"href": f"{self.hub.storage}/{each['oid']}"}}
            objects.append(each)
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        new: dict[str, tuple[bytes, bool]] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"]), False
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    return self.answer({"error": f"{value['path']} was not uploaded"}, 400)
                new[value["path"]] = self.hub.objects[value["oid"]], True
        self.hub.files[name].update(new)
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{name}/commit/{COMMIT}"})

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.hub.breaks_off():
            self.rfile.read(size // 2)
            return self.hang_up()
        data = self.rfile.read(size)
        if hashlib.sha256(data).hexdigest() != self.path.split("/")[-1]:
            return self.answer({"error": "the content is not what was announced"}, 400)
        self.hub.objects[self.path.split("/")[-1]] = data
        return self.answer({})

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[0] == "storage":
            return self.stored(self.hub.objects[parts[1]])
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        if name not in self.hub.files:
            return self.not_found("Repo", "Repository not found")
        files = self.hub.files[name]
        if parts[0] != "api":  # owner/name/resolve/commit/file
            path = "/".join(parts[4:])
            return self.resolve(*files[path]) if path in files else self.not_found("Entry", "Entry not found")
        if len(parts) > 4 and parts[4] == "tree":
            return self.answer([_listed(path, *each) for path, each in files.items()])
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings}
        return self.answer(about)

    do_HEAD = do_GET

    def resolve(self, data: bytes, large: bool) -> None:
        if not large:
            return self.answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        oid = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
        return self.answer(b"", 302, linked | {"Location": f"{self.hub.storage}/{oid}"})

    def stored(self, data: bytes) -> None:
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        wanted = data[int(start[1]) :] if start else data
        headers = {"Content-Range": f"bytes {start[1]}-{len(data) - 1}/{len(data)}"} if start else {}
        if not self.hub.breaks_off():
            return self.answer(wanted, 206 if start else 200, headers)
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(wanted))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(wanted[: len(wanted) // 2])
        self.hang_up()

    def refuses(self, kind: str) -> bool:
        status = self.hub.refused.get(kind)
        if status:
            self.answer({"error": "no"}, status, {"X-Error-Message": "no"})
        return bool(status)

    def not_found(self, kind: str, message: str) -> None:
        self.answer({"error": message}, 404, {"X-Error-Code": f"{kind}NotFound"})

    def hang_up(self) -> None:
        self.close_connection = True

    def answer(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        always = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        for key, value in (always | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


def _listed(path: str, data: bytes, large: bool) -> dict[str, Any]:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return entry | ({"lfs": lfs} if large else {})
