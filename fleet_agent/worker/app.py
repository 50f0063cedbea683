"""The HTTP face: POST for a picture, GET /health; errors are `{"detail": ...}` as everywhere."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fleet_agent import __version__
from fleet_agent.worker.painter import Painter
from fleet_agent.worker.requests import RequestError, read_picture

DEFAULT_PATH = "/api/fleet/generate"
_MOST_BYTES = 1 << 20
_CODES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED"}
_CLIENT_CLOSED = 499


def worker_app(painter: Painter, path: str = DEFAULT_PATH) -> Starlette:
    """The ASGI app over an opened painter."""

    async def generate(request: Request) -> Response:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "UNSUPPORTED_MEDIA_TYPE", "the body must be application/json")
        payload = read_picture(await _body(request))
        trouble = painter.trouble()
        if trouble is not None:
            raise RequestError(503, "NO_NODE", trouble)
        painting = asyncio.create_task(painter.paint(payload))
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait({painting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not painting.done():
                return Response(status_code=_CLIENT_CLOSED)
            picture = painting.result()
        finally:
            # A caller who leaves stops the engine.
            painting.cancel()
            leaving.cancel()
            await asyncio.gather(painting, leaving, return_exceptions=True)
        headers = {"X-Seed": str(picture.seed), "X-Filename": picture.filename}
        return Response(picture.data, media_type=picture.content_type, headers=headers)

    async def health(request: Request) -> Response:
        trouble = painter.trouble()
        if trouble is not None:
            raise RequestError(503, "NO_NODE", trouble)
        return _json({"status": "ok", "version": __version__})

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await painter.open()
        watching = asyncio.create_task(painter.watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            await painter.close()

    return Starlette(
        routes=[Route(path, generate, methods=["POST"]), Route("/health", health, methods=["GET"])],
        exception_handlers={RequestError: _refused, HTTPException: _not_there},
        lifespan=lifespan,
    )


async def _body(request: Request) -> bytes:
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > _MOST_BYTES:
                raise RequestError(413, "BODY_TOO_LARGE", f"the body has more than {_MOST_BYTES:,} bytes")
    except ClientDisconnect:
        raise RequestError(_CLIENT_CLOSED, "CLIENT_CLOSED", "the caller has left") from None
    return bytes(body)


async def _left(request: Request) -> None:
    """Returns when the caller has hung up."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _json(body: Mapping[str, object], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps(body), status, dict(headers or {}), "application/json")


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    body = {
        "detail": error.detail,
        "code": _CODES.get(error.status, "INTERNAL"),
        "reason": error.reason,
        "violations": [],
    }
    return _json(body, error.status, {"Retry-After": "1"} if error.status == 503 else None)


def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = "METHOD_NOT_ALLOWED" if error.status_code == 405 else "ROUTE_NOT_FOUND"
    words = f"{request.method} {request.url.path} is not served by a worker; see GET /health"
    return _json({"detail": words, "code": "NOT_FOUND", "reason": reason}, error.status_code, error.headers)
