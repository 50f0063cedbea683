"""The documentation: /openapi.json and, made from it in the browser, /docs. Nothing is loaded from
elsewhere.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import gzip
import hashlib
import importlib.resources
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson

from fleet_server.bridge.asgi import Receive, Scope, Send
from fleet_server.bridge.special import SpecialRoute

_SCRIPT: Final = re.compile(rb"<script>(.*?)</script>", re.DOTALL)
_GZIP: Final = re.compile(rb"(?:^|,)\s*gzip\s*(?:;\s*q\s*=\s*(?:1|0?\.\d*[1-9]\d*)[\d.]*\s*)?(?:,|$)", re.IGNORECASE)


def docs_routes(document: Callable[[], Mapping[str, Any]]) -> tuple[SpecialRoute, SpecialRoute]:
    """The routes of an OpenAPI document and of the page that shows it. Both have an ETag.

    `document` is called once, in a thread, when somebody first asks: it takes longer than much of a server's start.
    """
    page = importlib.resources.files(__package__).joinpath("docs.html").read_bytes()
    return (
        _route(
            "/openapi.json",
            "The OpenAPI document of this server",
            b"application/json",
            lambda: orjson.dumps(document()),
        ),
        _route("/docs", "The documentation as a page", b"text/html; charset=utf-8", lambda: page, _policy(page)),
    )


def _policy(page: bytes) -> bytes:
    """A content security policy under which this page's own script runs and no other."""
    hashes = [base64.b64encode(hashlib.sha256(script).digest()) for script in _SCRIPT.findall(page)]
    scripts = b" ".join(b"'sha256-" + digest + b"'" for digest in hashes)
    return (
        b"default-src 'none'; script-src " + scripts + b"; style-src 'unsafe-inline'; connect-src 'self'; "
        b"img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _route(
    path: str, reason: str, media_type: bytes, make: Callable[[], bytes], policy: bytes = b"default-src 'none'"
) -> SpecialRoute:
    fixed = [
        (b"content-type", media_type),
        (b"cache-control", b"no-cache"),
        (b"vary", b"accept-encoding"),
        (b"content-security-policy", policy),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
    ]
    made = functools.cache(make)
    packed = functools.cache(lambda: gzip.compress(made(), mtime=0))
    making = asyncio.Lock()

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        async with making:
            body = await asyncio.to_thread(made)
        etag = b'"' + hashlib.sha256(body).hexdigest()[:32].encode() + b'"'
        headers = [*fixed, (b"etag", etag)]
        asked = {name: value for name, value in scope["headers"] if name in (b"if-none-match", b"accept-encoding")}
        if _matches(asked.get(b"if-none-match", b""), etag):
            await send({"type": "http.response.start", "status": 304, "headers": headers})
            await send({"type": "http.response.body", "body": b""})
            return
        small = _GZIP.search(asked.get(b"accept-encoding", b"")) is not None
        content = packed() if small else body
        more = [(b"content-encoding", b"gzip")] if small else []
        length = (b"content-length", str(len(content)).encode())
        await send({"type": "http.response.start", "status": 200, "headers": [*headers, *more, length]})
        await send({"type": "http.response.body", "body": content})

    return SpecialRoute("GET", path, serve, reason)


def _matches(header: bytes, etag: bytes) -> bool:
    tags = [tag.strip().removeprefix(b"W/") for tag in header.split(b",")]
    return etag in tags or b"*" in tags
