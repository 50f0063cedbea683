"""ASGI's types, and the one call that all parts of the bridge work on."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from fleet_server.bridge.errors import Header, error_reply
from fleet_server.domain.errors import FleetError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

ABORT_EXTENSION = "fleet.connection.abort"
"""Scope extension with a callable that drops the connection at once; used for clients that take nothing, if there."""

REPLY_EXTENSION = "fleet.reply"
"""Scope extension with an async callable (status, headers, body) that sends a complete reply in one piece; used in
place of two messages to `send`, if there. Content-Length is among the headers: a list, or their lines as bytes. A
middleware that wraps `send` must wrap or drop it."""

BODY_EXTENSION = "fleet.body"
"""Scope extension with a callable that takes the body where all of it has come, else None; asked before the first
`receive`, if there."""

LINE_EXTENSION = "fleet.line"
"""Scope extension with the KnownLine that the request's method, path and query were taken from, where they came before.
A middleware that changes one of them must drop it."""

HEAD_EXTENSION = "fleet.head"
"""Scope extension with the `KnownHead` of a header section that came before, if it did. A middleware that changes the
scope's headers must drop it."""


_PLAIN = b"content-type: %b\r\nx-request-id: %b\r\ncontent-length: %d\r\n"


class ClientStuckError(Exception):
    """The client took nothing for too long."""


class ClientGoneError(Exception):
    """The connection is no more."""


@dataclass(slots=True)
class Call:
    """One HTTP request or WebSocket handshake, as it came."""

    scope: Scope
    receive: Receive
    send: Send
    headers: Mapping[bytes, bytes]
    request_id: str
    started: bool = False
    """Whether the reply's head was sent, or the WebSocket accepted."""

    @property
    def is_head(self) -> bool:
        """Whether only the reply's head is wanted."""
        return self.scope.get("method") == "HEAD"

    async def reply(self, status: int, headers: list[Header], body: bytes) -> None:
        """Send a complete reply; Content-Length and X-Request-Id are added, a HEAD's body is left out."""
        self.started = True
        headers.append((b"x-request-id", self.request_id.encode()))
        if status == 304:
            body = b""
        else:
            headers.append((b"content-length", b"%d" % len(body)))
        if self.is_head:
            body = b""
        whole = (self.scope.get("extensions") or {}).get(REPLY_EXTENSION)
        if whole is not None:
            await whole(status, headers, body)
            return
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def reply_plain(self, content_type: bytes, body: bytes) -> Awaitable[None]:
        """`reply` with 200 and no header but those that there must be: what most calls end with, in fewer steps."""
        whole = (self.scope.get("extensions") or {}).get(REPLY_EXTENSION)
        if whole is None or self.is_head:
            return self.reply(200, [(b"content-type", content_type)], body)
        self.started = True
        lines = (content_type, self.request_id.encode(), len(body))
        sending: Awaitable[None] = whole(200, _PLAIN % lines, body)
        return sending

    def body_at_hand(self) -> bytes | None:
        """The whole body where it has come already, taken out; else None, and it is to be received."""
        take = (self.scope.get("extensions") or {}).get(BODY_EXTENSION)
        return None if take is None else take()

    async def fail(self, error: FleetError) -> None:
        """Send an error as a complete reply."""
        status, body, headers = error_reply(error, self.request_id)
        await self.reply(status, headers, body)

    async def send_within(self, message: MutableMapping[str, Any], seconds: float) -> None:
        """Send one message. Raises ClientStuckError when the client takes nothing for so long, ClientGoneError when
        it left."""
        try:
            async with asyncio.timeout(seconds):
                await self.send(message)
        except TimeoutError:
            raise ClientStuckError from None
        except OSError:
            raise ClientGoneError from None

    def abort(self) -> None:
        """Drop the connection of a stuck client, where the server lets us."""
        abort = (self.scope.get("extensions") or {}).get(ABORT_EXTENSION)
        if callable(abort):
            abort()
