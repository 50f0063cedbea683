"""The embedded S3 as an ASGI application: who may do what, and everything else refused.

Anybody may GET and HEAD objects of the public bucket by name. Everything else needs a signature (version 4). A method,
sub-resource, parameter or header that is not known here is answered 501, never overlooked: a server that took
`PUT key?tagging` for a put would lose the object.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from typing import Any

from fleet_server.embedded.s3_answers import Answer, Refusal, not_implemented, refused
from fleet_server.embedded.s3_buckets import LIST_PARAMETERS, Buckets
from fleet_server.embedded.s3_objects import OVERRIDES, Objects
from fleet_server.embedded.s3_request import Call, body_of

_PIECE = 1 << 20
_PRESIGNED = frozenset(
    f"X-Amz-{name}"
    for name in ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature", "Content-Sha256")
)
_ALWAYS = _PRESIGNED | {"x-id"}
_METHODS = frozenset({"GET", "HEAD", "PUT", "POST", "DELETE"})
_log = logging.getLogger("fleet.s3")


class Gate:
    """Checks each call, then hands it on. `keys` are secrets by access key."""

    def __init__(self, buckets: Buckets, objects: Objects, keys: Mapping[str, str], public: frozenset[str]) -> None:
        self._buckets = buckets
        self._objects = objects
        self._keys = dict(keys)
        self._public = public

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        try:
            answer = await self._answer(Call.of(scope), receive)
        except Refusal as refusal:
            answer = refused(refusal, path)
        except Exception:
            _log.exception("a call failed: %s %s", scope["method"], path)
            answer = refused(Refusal(500, "InternalError", "the server failed: see its log"), path)
        await _send(answer, scope["method"], send)

    async def _answer(self, call: Call, receive: Any) -> Answer:
        if call.method not in _METHODS:
            raise Refusal(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
        if not call.signed:
            return await self._anonymous(call)
        verified = call.verify(self._keys)
        call.refuse_unknown_headers()
        body = body_of(call, receive, verified)
        if not call.bucket:
            _only(call, frozenset(), "GET", "HEAD")
            return await self._buckets.all()
        return await (self._object(call, body) if call.key else self._bucket(call, body))

    async def _anonymous(self, call: Call) -> Answer:
        allowed = call.method in ("GET", "HEAD") and call.bucket in self._public and call.key and not call.query
        if not allowed:
            raise Refusal(403, "AccessDenied", "Access Denied.")
        call.refuse_unknown_headers()
        return await self._objects.get(call, signed=False)

    async def _bucket(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        names = set(call.query) - _ALWAYS
        if call.method in ("GET", "PUT", "DELETE") and names == {"policy"}:
            return await self._buckets.policy(call, body)
        if call.method == "GET" and names == {"location"}:
            return await self._buckets.location(call)
        if call.method == "GET" and "uploads" in names and names <= {"uploads", *LIST_PARAMETERS, "max-uploads"}:
            return await self._buckets.uploads(call)
        if call.method == "POST" and names == {"delete"}:
            return await self._buckets.delete_many(call, body)
        if call.method == "GET":
            _only(call, LIST_PARAMETERS, "GET")
            return await self._buckets.list(call)
        _only(call, frozenset(), "HEAD", "PUT", "DELETE")
        return await self._buckets.itself(call)

    async def _object(self, call: Call, body: AsyncIterator[bytes]) -> Answer:
        names = frozenset(call.query) - _ALWAYS
        objects = self._objects
        if "x-amz-copy-source" in call.headers:
            if call.method != "PUT" or names:
                raise not_implemented("copying into a part")
            return await objects.copy(call)
        match call.method:
            case "GET" | "HEAD" if names <= OVERRIDES:
                return await objects.get(call, signed=True)
            case "GET" if names <= {"uploadId", "max-parts", "part-number-marker"} and "uploadId" in names:
                return await objects.list_parts(call)
            case "PUT" if not names:
                return await objects.put(call, body)
            case "PUT" if names == {"uploadId", "partNumber"}:
                return await objects.add_part(call, body)
            case "POST" if names == {"uploads"}:
                return await objects.begin(call)
            case "POST" if names == {"uploadId"}:
                return await objects.complete(call, body)
            case "DELETE" if not names:
                return await objects.delete(call)
            case "DELETE" if names == {"uploadId"}:
                return await objects.abort(call)
        raise not_implemented(f"{call.method} of an object with {' '.join(sorted(names)) or 'no parameter'}")


def _only(call: Call, known: frozenset[str], *methods: str) -> None:
    """Raises a 501 for parameters that are not known, a 405 for methods."""
    unknown = sorted(set(call.query) - known - _ALWAYS)
    if unknown:
        raise not_implemented(f"{call.method} with {' '.join(unknown)}")
    if call.method not in methods:
        raise Refusal(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")


async def _send(answer: Answer, method: str, send: Any) -> None:
    headers = {"Server": "fleet-s3", **answer.headers}
    if answer.blob is None and answer.status not in (204, 304):
        headers.setdefault("Content-Length", str(len(answer.body)))
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1", "replace")) for name, value in headers.items()]
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        if answer.blob is None:
            body = b"" if method == "HEAD" else answer.body
            await send({"type": "http.response.body", "body": body})
            return
        at, end = answer.start, answer.start + answer.length
        while at < end:
            piece = await asyncio.to_thread(os.pread, answer.blob, min(_PIECE, end - at), at)
            if not piece:
                # Fewer bytes than were announced: the connection is closed, and the caller sees that it is cut.
                return
            at += len(piece)
            await send({"type": "http.response.body", "body": piece, "more_body": at < end})
        if answer.length == 0:
            await send({"type": "http.response.body", "body": b""})
    finally:
        if answer.blob is not None:
            os.close(answer.blob)
