"""The transport as one HTTP request sees it, with short ways for a body and a reply that are at hand as a whole."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from fleet_server.bridge.errors import Header

_JOINED_BYTES = 64 * 1024  # larger bodies are not copied to go out together with their head


class HttpExchange:
    """Stands in for the transport of a request's cycle: `close` is the protocol's own way to end the connection.

    uvicorn writes head and body one after the other, which makes two packets and wakes the client twice, and waits for
    a body through an event even where it has come. `reply` and `take_body` do neither; the bridge finds them in the
    scope's extensions.
    """

    __slots__ = ("_cycle", "close", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, cycle: RequestResponseCycle, close: Callable[[], None]) -> None:
        self._cycle = cycle
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = close

    def take_body(self) -> bytes | None:
        """The body, where all of it has come and none of it was taken; else None."""
        cycle = self._cycle
        if cycle.more_body or cycle.disconnected or cycle.response_complete:
            return None
        body, cycle.body = bytes(cycle.body), bytearray()
        cycle.message_event.clear()
        cycle.flow.resume_reading()
        return body

    async def reply(self, status: int, headers: list[Header], body: bytes) -> None:
        """Sends a complete reply; nothing where the client has gone, as uvicorn's own `send` does.

        Raises RuntimeError where a reply was begun already or a header holds a line break.
        """
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if cycle.disconnected:
            return
        if cycle.response_started:
            raise RuntimeError("a reply was begun already")
        lines = [name + b": " + value for name, value in (*cycle.default_headers, *headers)]
        if not cycle.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines)
        if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
            raise RuntimeError("a header of the reply holds a line break")
        head = STATUS_LINE[status] + head + b"\r\n\r\n"
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        if len(body) < _JOINED_BYTES:
            self.write(head + body)
        else:
            self.write(head)
            self.write(body)
        if not cycle.keep_alive:
            self.close()
        cycle.on_response()
