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

    __slots__ = ("_default_headers", "_default_lines", "close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.is_closing = transport.is_closing
        self.write = transport.write
        self.close = close
        self._default_headers: list[Header] = []
        self._default_lines = b""

    def default_lines(self, headers: list[Header]) -> bytes:
        """The lines of the headers that every reply has: a list that the server replaces once a second."""
        if headers is not self._default_headers:
            self._default_headers, self._default_lines = headers, _lines(headers)
        return self._default_lines


class _Signal:
    """An asyncio.Event that is made when somebody waits for it: most requests come whole, and nobody does."""

    _is_set = False
    _event: asyncio.Event | None = None

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


class HttpExchange(_Signal, RequestResponseCycle):
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
        default_headers: list[Header],
        expect_100_continue: bool,
        keep_alive: bool,
        on_response: Callable[[], None],
        body: bytes | bytearray,
        more_body: bool,
    ) -> None:
        # Not super().__init__(): what is the same for every request stands above.
        self.scope = scope
        self.transport = connection  # type: ignore[assignment]
        self.flow = flow
        self.default_headers = default_headers
        self.waiting_for_100_continue = expect_100_continue
        self.keep_alive = keep_alive
        self.on_response = on_response
        self.body = body  # type: ignore[assignment]  # bytes where no more will come
        if not more_body:
            self.more_body = False
            self._is_set = True

    @property
    def message_event(self) -> _Signal:  # type: ignore[override]
        """Itself: an object less for each request, and not held by itself."""
        return self

    def take_body(self) -> bytes | None:
        """The body, where all of it has come and none of it was taken; else None."""
        if self.more_body or self.disconnected or self.response_complete:
            return None
        body, self.body = bytes(self.body), b""  # type: ignore[assignment]
        self.clear()
        if self.flow.read_paused:
            self.flow.resume_reading()
        return body

    async def reply(self, status: int, headers: list[Header] | bytes, body: bytes) -> None:
        """Sends a complete reply; nothing where the client has gone, as uvicorn's own `send` does.

        `headers` may be their lines, each with its end. Raises RuntimeError where a reply was begun already or a header
        holds a line break.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_started:
            raise RuntimeError("a reply was begun already")
        given = headers if isinstance(headers, bytes) else _lines(headers)
        close = b"" if self.keep_alive else b"connection: close\r\n"
        transport: Any = self.transport
        head = [STATUS_LINE[status], transport.default_lines(self.default_headers), given, close, b"\r\n"]
        self.response_started = self.response_complete = True
        self.set()
        if len(body) < _JOINED_BYTES:
            head.append(body)
            transport.write(b"".join(head))
        else:
            transport.write(b"".join(head))
            transport.write(body)
        if not self.keep_alive:
            self.transport.close()
        self.on_response()


def _lines(headers: list[Header]) -> bytes:
    """The lines of headers, each with its end. Raises RuntimeError where one holds a line break."""
    lines = b"".join([b"%b: %b\r\n" % header for header in headers])
    if not lines.count(b"\n") == lines.count(b"\r") == len(headers):
        raise RuntimeError("a header of the reply holds a line break")
    return lines
