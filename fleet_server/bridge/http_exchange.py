"""One HTTP request and its reply, with short ways for a body and a reply that are at hand as a whole."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from fleet_server.bridge.errors import Header

_JOINED_BYTES = 64 * 1024  # larger bodies are not copied to go out together with their head
_LOG = logging.getLogger("uvicorn.error")


class Connection:
    """The transport, as the requests of a connection see it: `close` is the protocol's own way to end it."""

    __slots__ = ("close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.is_closing = transport.is_closing
        self.write = transport.write
        self.close = close


class _Signal:
    """An asyncio.Event that is made when somebody waits for it: most requests come whole, and nobody does."""

    __slots__ = ("_event", "_is_set")

    def __init__(self) -> None:
        self._is_set = False
        self._event: asyncio.Event | None = None

    def set(self) -> None:
        self._is_set = True
        if self._event is not None:
            self._event.set()

    def clear(self) -> None:
        self._is_set = False
        if self._event is not None:
            self._event.clear()

    async def wait(self) -> None:
        if not self._is_set:
            if self._event is None:
                self._event = asyncio.Event()
            await self._event.wait()


class HttpExchange(RequestResponseCycle):
    """uvicorn's cycle, lighter to make, with two short ways that the bridge finds in the scope's extensions.

    uvicorn writes head and body one after the other, which makes two packets and wakes the client twice, and waits for
    a body through an event even where it has come. `reply` and `take_body` do neither.
    """

    logger = access_logger = _LOG
    access_log = False
    disconnected = False
    more_body = True
    response_started = False
    response_complete = False
    chunked_encoding = None
    expected_content_length = 0

    def __init__(
        self,
        scope: Any,
        connection: Connection,
        flow: FlowControl,
        *,
        default_headers: list[Header],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
    ) -> None:
        # Not super().__init__(): what is the same for every request stands above.
        self.scope = scope
        self.transport = connection  # type: ignore[assignment]
        self.flow = flow
        self.default_headers = default_headers
        self.waiting_for_100_continue = expect_100_continue
        self.keep_alive = keep_alive
        self.on_response = on_response
        self.body = bytearray()
        self.message_event = _Signal()  # type: ignore[assignment]

    def take_body(self) -> bytes | None:
        """The body, where all of it has come and none of it was taken; else None."""
        if self.more_body or self.disconnected or self.response_complete:
            return None
        body, self.body = bytes(self.body), bytearray()
        self.message_event.clear()
        self.flow.resume_reading()
        return body

    async def reply(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a complete reply; nothing where the client has gone, as uvicorn's own `send` does.

        Raises RuntimeError where a reply was begun already or a header holds a line break.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_started:
            raise RuntimeError("a reply was begun already")
        lines = [name + b": " + value for name, value in self.default_headers]
        lines += [name + b": " + value for name, value in headers]
        if not self.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
            raise RuntimeError("a header of the reply holds a line break")
        head = STATUS_LINE[status] + head + b"\r\n\r\n"
        self.response_started = self.response_complete = True
        self.message_event.set()
        if len(body) < _JOINED_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
