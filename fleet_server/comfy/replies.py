"""Requests taken apart and replies in ComfyUI's forms."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from fleet_server.bridge.errors import status_of
from fleet_server.domain.comfy_check import refusal
from fleet_server.domain.errors import FleetError
from fleet_server.protojson import dumps_exact, loads_exact
from fleet_server.services.comfy_prompts import RefusedPromptError, Who

Json = Any
Handler = Callable[[Request], Awaitable[Response]]

_JSON = "application/json; charset=utf-8"
_BROKEN = "500 Internal Server Error\n\nServer got itself in trouble"


def json_reply(value: Json, status: int = 200) -> Response:
    """A value as JSON."""
    return json_bytes(dumps_exact(value).encode(), status)


def json_bytes(body: bytes, status: int = 200) -> Response:
    """A ready JSON text."""
    return Response(body, status, {"content-type": _JSON})


def empty(status: int = 200) -> Response:
    """ComfyUI's answer to what it has done."""
    return Response(b"", status)


def who_of(request: Request) -> Who:
    """The caller, as `posture` found out."""
    who: Who = request.scope["fleet_who"]
    return who


async def body_of(request: Request, limit: int) -> bytes:
    """The body. Raises BODY_TOO_LARGE as soon as that is known."""
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise _too_large(limit)
    parts, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        parts.append(chunk)
    return b"".join(parts)


async def json_of(request: Request, limit: int) -> Json:
    """The JSON of the body, {} where it is empty. Raises ValueError for what is no JSON, BODY_TOO_LARGE."""
    body = await body_of(request, limit)
    return loads_exact(body) if body.strip() else {}


def handled(handler: Handler) -> Handler:
    """The handler with its errors in ComfyUI's forms: what is no JSON is a 500 in plain text there."""

    async def answer(request: Request) -> Response:
        try:
            return await handler(request)
        except RefusedPromptError as error:
            return json_reply(error.body, 400)
        except FleetError as error:
            return refused(error)
        except ClientDisconnect:
            return empty(400)
        except ValueError:
            return PlainTextResponse(_BROKEN, 500)

    return answer


def refused(error: FleetError) -> Response:
    """One of our own errors, in the form of a ComfyUI error, with our fields beside it."""
    kind = refusal(error.reason.lower(), error.detail)
    reply = json_reply(
        {"error": kind, "node_errors": {}, "detail": error.detail, "reason": error.reason}, status_of(error)
    )
    if error.retry_after_seconds is not None:
        reply.headers["retry-after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    return reply


def _too_large(limit: int) -> FleetError:
    return FleetError("BODY_TOO_LARGE", f"at most {limit:,} bytes are taken here")
