"""The HTTP application: an endpoint for each thing that the model can be used for, /health and /metrics."""

import asyncio
import base64
import binascii
import io
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlmo import __version__
from vlmo.errors import InputError, VLMoError
from vlmo.inference.io import load_image, plain
from vlmo.inference.predictor import Predictor
from vlmo.inference.uses import uses_of
from vlmo.serve.batching import Batcher, Busy

log = logging.getLogger(__name__)

MAX_TEXT = 10_000  # characters
MAX_OPTION = 1000


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body: bytes of a request.
        pixels: of an image.
        queue: requests that wait.
        batch_size, wait: of `Batcher`.
    """

    body: int = 16 << 20
    pixels: int = 50_000_000
    queue: int = 64
    batch_size: int = 16
    wait: float = 0.005


@dataclass(frozen=True)
class Endpoint:
    """One method of the predictor.

    Attributes:
        columns, optional: inputs; those that begin with "image" are images in base64, the others texts.
        options: further ones with their defaults.
        result: key of the result.
    """

    method: str
    columns: tuple[str, ...]
    result: str
    optional: tuple[str, ...] = ()
    options: Mapping[str, Any] | None = None

    def compute(self, predictor: Predictor, options: tuple[tuple[str, Any], ...], rows: list[Any]) -> list[Any]:
        """Gives the result of each row; all have the same columns."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        if self.method.startswith("embed_"):
            return getattr(predictor, self.method)(*columns.values()).tolist()
        return [plain(result) for result in getattr(predictor, self.method)(**columns, **dict(options))]


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def endpoints(predictor: Predictor) -> dict[str, Endpoint]:
    """Gives what the predictor offers, by path."""
    sides = {
        "embed_images": ("embed/image", Endpoint("embed_images", ("image",), "embedding")),
        "embed_texts": ("embed/text", Endpoint("embed_texts", ("text",), "embedding")),
    }
    uses = uses_of(predictor.model)
    found = dict(sides[name] for name in predictor.offers if name in sides)
    for name in predictor.offers:
        if name in uses:
            use = uses[name]
            found[name] = Endpoint(name, use.columns, use.result, use.optional, use.options)
    return found


def parse(endpoint: Endpoint, body: bytes, max_pixels: int, decoding: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Gives a row, images decoded, and the options that are not as by default.

    Raises:
        Refused: if it is not what the endpoint takes.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "the body is not JSON") from error
    if not isinstance(given, dict):
        raise Refused(400, "the body must be a JSON object")
    options = endpoint.options or {}
    known = (*endpoint.columns, *endpoint.optional, *options)
    if unknown := [name for name in given if name not in known]:
        raise Refused(400, f"{unknown[0]}: is not known here; there are {', '.join(known)}")
    if missing := [name for name in endpoint.columns if name not in given]:
        raise Refused(400, f"{missing[0]}: is missing; needed are {', '.join(endpoint.columns)}")
    row = {name: given[name] for name in known if name in given and name not in options}
    for name, value in row.items():
        if not isinstance(value, str) or not value.strip():
            raise Refused(400, f"{name}: must be {'an image in base64' if name.startswith('image') else 'a text'}")
        if name.startswith("image"):
            row[name] = _image(name, value, max_pixels, decoding)
        elif len(value) > MAX_TEXT:
            raise Refused(413, f"{name}: is longer than {MAX_TEXT} characters")
    for name in options:
        value = given.get(name, options[name])
        if type(value) is not type(options[name]) or (type(value) is int and not 0 < value <= MAX_OPTION):
            raise Refused(400, f"{name}: must be like {options[name]!r}")
    return row, {name: given.get(name, default) for name, default in options.items()}


def _image(name: str, value: str, max_pixels: int, decoding: str) -> Image.Image:
    try:
        data = base64.b64decode(value.split(",", 1)[1] if value.startswith("data:") else value, validate=True)
        width, height = Image.open(io.BytesIO(data)).size  # (reads the head alone)
    except (binascii.Error, IndexError) as error:
        raise Refused(400, f"{name}: is not base64") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Refused(413, f"{name}: has too many pixels; {max_pixels} at most") from error
    except Exception as error:  # a damaged file can raise anything
        raise Refused(400, f"{name}: is no image that can be decoded") from error
    if width * height > max_pixels:
        raise Refused(413, f"{name}: has {width} x {height} pixels; {max_pixels} at most")
    try:
        return load_image(data, decoding)
    except InputError as error:
        raise Refused(400, f"{name}: is no image that can be decoded") from error


class Metrics:
    """Counts, in Prometheus's text format."""

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.requests: Counter[tuple[str, int]] = Counter()
        self.seconds: Counter[str] = Counter()

    def add(self, path: str, status: int, seconds: float) -> None:
        self.requests[path, status] += 1
        self.seconds[path] += seconds  # type: ignore[assignment]

    def text(self) -> str:
        sizes = dict(self.batcher.sizes)
        lines = ["# TYPE vlmo_requests_total counter"]
        lines += [
            f'vlmo_requests_total{{path="/{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(self.requests.items())
        ]
        lines += ["# TYPE vlmo_request_seconds summary"]
        for path, seconds in sorted(self.seconds.items()):
            count = sum(number for (each, _), number in self.requests.items() if each == path)
            lines += [f'vlmo_request_seconds_sum{{path="/{path}"}} {seconds:.6f}']
            lines += [f'vlmo_request_seconds_count{{path="/{path}"}} {count}']
        lines += ["# TYPE vlmo_batches_total counter", f"vlmo_batches_total {sum(sizes.values())}"]
        lines += ["# TYPE vlmo_batched_rows_total counter"]
        lines += [f"vlmo_batched_rows_total {sum(size * count for size, count in sizes.items())}"]
        lines += ["# TYPE vlmo_queue_length gauge", f"vlmo_queue_length {len(self.batcher)}"]
        return "\n".join(lines) + "\n"


def create_app(predictor: Predictor, limits: Limits = Limits()) -> Any:  # noqa: B008  (it is frozen)
    """Builds the FastAPI application; its batches are computed in a thread of their own.

    Raises:
        VLMoError: if FastAPI is not installed.
    """
    try:
        from fastapi import FastAPI, Request
        from fastapi.responses import JSONResponse, PlainTextResponse
        from starlette.requests import ClientDisconnect
    except ModuleNotFoundError as error:
        raise VLMoError('serving needs FastAPI, which is not installed: pip install "vlmo[serve]"') from error

    offered = endpoints(predictor)
    batcher = Batcher(
        lambda kind, rows: offered[kind[0]].compute(predictor, kind[1], rows),
        limits.batch_size,
        limits.wait,
        limits.queue,
    )
    metrics = Metrics(batcher)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    # (the pages of documentation load their scripts from elsewhere)
    app = FastAPI(title="VLMo", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)

    async def answer(path: str, request: Request) -> Any:
        if len(batcher) >= limits.queue:  # before the image is read and decoded
            raise Busy
        body = await _body(request, limits.body)
        endpoint = offered[path]
        row, options = await asyncio.to_thread(parse, endpoint, body, limits.pixels, predictor.image_decoding)
        kind = path, tuple(options.items()), tuple(row)
        computed = asyncio.wrap_future(batcher.submit(kind, row))
        gone = asyncio.ensure_future(request.receive())  # (after the body comes nothing but that the client has gone)
        try:
            await asyncio.wait((computed, gone), return_when=asyncio.FIRST_COMPLETED)
            if not computed.done():
                raise ClientDisconnect
            return {endpoint.result: computed.result()}
        finally:
            gone.cancel()
            computed.cancel()

    async def handle(request: Request) -> JSONResponse:
        path, start = request.url.path.strip("/"), time.perf_counter()
        try:
            response = JSONResponse(await answer(path, request))
        except Refused as error:
            response = JSONResponse({"error": str(error)}, error.status)
        except Busy:
            said = {"error": f"{limits.queue} requests wait already; try again"}
            response = JSONResponse(said, 429, {"Retry-After": "1"})
        except VLMoError as error:
            response = JSONResponse({"error": str(error)}, 400)
        except ClientDisconnect:  # nobody reads it; it is counted, under the number that proxies use
            response = JSONResponse({"error": "the client has gone"}, 499)
        except Exception:
            log.exception(f"/{path}")
            response = JSONResponse({"error": "the server failed; its log says why"}, 500)
        metrics.add(path, response.status_code, time.perf_counter() - start)
        return response

    for path, endpoint in offered.items():
        app.add_api_route(f"/{path}", handle, methods=["POST"], name=path, openapi_extra=_schema(endpoint))

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def not_found(_: Request, error: Any) -> JSONResponse:
        there = ", ".join(f"POST /{path}" for path in offered)
        return JSONResponse(
            {"error": f"{error.detail}; there are {there}, GET /health, GET /metrics"}, error.status_code
        )

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "version": __version__, "endpoints": [f"/{path}" for path in offered]}

    @app.get("/metrics")
    async def counted() -> PlainTextResponse:
        return PlainTextResponse(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


async def _body(request: Any, limit: int) -> bytes:
    """Reads the body, no more of it than is allowed."""
    parts, size = [], 0
    async for part in request.stream():
        parts.append(part)
        size += len(part)
        if size > limit:
            raise Refused(413, f"the body is longer than {limit} bytes")
    return b"".join(parts)


def _schema(endpoint: Endpoint) -> dict[str, Any]:
    properties: dict[str, Any] = {
        name: {"type": "string"} | ({"contentEncoding": "base64"} if name.startswith("image") else {})
        for name in (*endpoint.columns, *endpoint.optional)
    }
    properties |= {name: {"default": default} for name, default in (endpoint.options or {}).items()}
    schema = {"type": "object", "required": list(endpoint.columns), "properties": properties}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
