"""uvicorn's HTTP/1.1 protocol with the limits that it lacks: size and time of the header section,
connections, pipelining.

uvicorn with httptools reads a header of any size for any time. Here a header section, request line
included, must end within `max_header_bytes` and `header_seconds`, else 431 or 408; a connection beyond
`max_connections` gets 429. Every refusal is the JSON error object of the REST contract, sent only when the
replies before it are out, and followed by a lingering close: our side of the connection ends at once, and
what the peer still sends is thrown away for a bounded time and amount, since closing with unread bytes
would make the kernel reset the connection and the reply would be lost.

Trailer fields are dropped (RFC 9112, 7.1.2 allows it): uvicorn would add them to the headers that the
application has already judged. Limits of bodies are not here: they belong to each method.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from typing import Any, ClassVar

import httptools
import uuid_utils
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from fleet_server.bridge.asgi import ABORT_EXTENSION
from fleet_server.bridge.errors import error_reply
from fleet_server.bridge.http_known import KnownHeads
from fleet_server.bridge.http_protocol import LeanHttpProtocol
from fleet_server.domain.errors import FleetError

MAX_HEADER_BYTES = 16 * 1024
HEADER_SECONDS = 10.0
MAX_CONNECTIONS = 2_000
MAX_PIPELINED = 128

_LINGER_BYTES = 8 << 20
_LINGER_SECONDS = 2.0

_logger = logging.getLogger(__name__)


class _Phase(enum.Enum):
    """What the next byte of the peer belongs to."""

    IDLE = enum.auto()
    """Nothing, or the next request."""
    HEAD = enum.auto()
    """A request line or header section."""
    BODY = enum.auto()
    """A body, chunk framing and trailers included."""
    OVER = enum.auto()
    """Nothing that matters: the connection is being closed."""


# Reading a member from its class takes a call, and these are read a dozen times for each request.
_IDLE, _HEAD, _BODY, _OVER = _Phase


class _RefusalError(Exception):
    """Stops the parser from within a callback."""

    def __init__(self, error: FleetError) -> None:
        super().__init__(error.detail)
        self.error = error


class LimitedHttpProtocol(LeanHttpProtocol):
    """HTTP/1.1 with bounded headers; `limited_protocol` makes classes for `uvicorn.Config(http=...)`."""

    max_header_bytes: ClassVar[int] = MAX_HEADER_BYTES
    header_seconds: ClassVar[float] = HEADER_SECONDS
    max_connections: ClassVar[int] = MAX_CONNECTIONS
    known_heads: ClassVar[KnownHeads] = KnownHeads(MAX_HEADER_BYTES)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._phase = _IDLE
        self._head_bytes = 0  # fed to the parser for the header section that has not ended
        self._head_size = 0  # of the complete lines of that section
        self._idle_bytes = 0  # of a body's framing since the last byte of content
        self._drained = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._refusal: FleetError | None = None
        self._begun = b""  # what came first of a request whose header section has not ended
        self._closing = False

    # The connection.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        count = len(self.connections)
        if count > self.max_connections + max(64, self.max_connections // 10):
            self._phase = _OVER
            transport.abort()  # even polite refusals have an end
        elif count > self.max_connections:
            detail = f"this server takes {self.max_connections} connections; close idle ones or try again later"
            self._refuse(FleetError("TOO_MANY_CONNECTIONS", detail, retry_after_seconds=1))
        else:
            self._head_timer = self.loop.call_later(self.header_seconds, self._on_head_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        self._phase = _OVER
        self._cancel_timers()
        super().connection_lost(exc)
        active = self._active  # uvicorn tells only the newest of pipelined requests
        if active is not None and not active.response_complete:
            active.disconnected = True
            active.message_event.set()

    def handle_websocket_upgrade(self) -> None:
        self._phase = _OVER
        self._cancel_timers()
        super().handle_websocket_upgrade()

    def close_after_reply(self) -> None:
        """Closes once all that was written is out; lingers when the peer may still be sending."""
        if self._phase in (_HEAD, _BODY):
            self._close_lingering()
        else:
            self._phase = _OVER
            self.transport.close()

    def _close_lingering(self) -> None:
        self._phase = _OVER
        self._closing = True
        self._linger()
        if self.transport.can_write_eof():
            self.transport.write_eof()

    # Bytes in.

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._phase is _IDLE:
            request = self.known_heads.recognize(data) if self._is_quiet() else None
            if request is not None:
                self._open_known(*request)
                return
            self._begun = data
        while data and not self.transport.is_closing():
            if self._phase is _OVER:
                self._throw_away(len(data))
                return
            if self._phase is _BODY:
                piece, data = data, b""
                self._feed_body(piece)
            else:
                room = self.max_header_bytes - self._head_bytes
                piece, data = data[:room], data[room:]
                self._feed_head(piece)

    def _is_quiet(self) -> bool:
        """Whether nothing is under way: no request, no clock of a header section, no end."""
        cycle = self.cycle
        return (
            (cycle is None or cycle.response_complete)
            and self._head_timer is None
            and self._linger_timer is None
            and not self.transport.is_closing()
        )

    def _feed_head(self, piece: bytes) -> None:
        self._phase = _HEAD
        self._head_bytes += len(piece)
        self._feed(piece)
        if self._phase is not _HEAD:
            return
        if self._head_bytes >= self.max_header_bytes:
            self._refuse(self._too_large())
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_seconds, self._on_head_timeout)

    def _feed_body(self, piece: bytes) -> None:
        if self.cycle is not None and self.cycle.response_complete:
            self._throw_away(len(piece))  # answered already: finds the end of the body, within bounds
        self._idle_bytes += len(piece)
        self._feed(piece)
        if self._phase is _BODY and self._idle_bytes > self.max_header_bytes:
            self._refuse(self._too_large())  # endless trailers or chunk extensions
        elif self._phase is _HEAD and self._head_timer is None:
            self._head_timer = self.loop.call_later(self.header_seconds, self._on_head_timeout)

    def _feed(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            if self._should_upgrade():
                self.handle_websocket_upgrade()
            elif self.cycle is not None:
                self.cycle.keep_alive = False  # an unknown upgrade may be ignored: answered as HTTP/1.1
        except httptools.HttpParserError as error:
            refused = error.__context__
            if isinstance(refused, _RefusalError):
                self._refuse(refused.error)
            else:
                detail = "request: is not valid HTTP/1.1; check its request line and headers"
                self._refuse(FleetError("INVALID_PATH", detail))

    def _throw_away(self, count: int) -> None:
        self._drained += count
        if self._drained > _LINGER_BYTES:
            self.transport.abort()

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        self._phase = _HEAD
        self._head_size = len(" HTTP/1.1\r\n")
        self.url = b""
        self.headers = []
        self.expect_100_continue = False

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._head_size += len(url)
        if self._head_size > self.max_header_bytes:
            raise _RefusalError(self._too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is not _HEAD:
            return  # a trailer
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._head_size += len(name) + len(value) + 4  # ": " and the line's end
        if self._head_size > self.max_header_bytes:
            raise _RefusalError(self._too_large())

    def on_headers_complete(self) -> None:
        if self._begun:
            self.known_heads.learn(self._begun, self.headers)
            self._begun = b""
        if len(self.pipeline) >= MAX_PIPELINED:
            detail = f"at most {MAX_PIPELINED} pipelined requests may wait; read replies before sending more"
            raise _RefusalError(FleetError("RATE_LIMITED", detail))
        self._phase = _BODY
        self._head_bytes = self._idle_bytes = self._drained = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._open_request()

    def on_body(self, body: bytes) -> None:
        self._idle_bytes = 0
        self._take_in(body)

    def on_message_complete(self) -> None:
        self._phase = _IDLE
        self._head_bytes = self._drained = 0
        if self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None
        self._end_request()

    # Replies.

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self._closing or self.transport.is_closing():
            return
        was_last = not self.pipeline
        self._go_on()
        if not was_last:
            return
        if self._refusal is not None:
            self._send_refusal(self._refusal)
        elif self._phase is _HEAD:
            self._unset_keepalive_if_required()  # the header's own clock runs
        elif self._phase is _BODY:
            self._linger()  # the reply did not wait for the whole body

    def _too_large(self) -> FleetError:
        limit = self.max_header_bytes
        detail = f"the request line and headers may take {limit} bytes; send fewer or shorter headers"
        return FleetError("HEADERS_TOO_LARGE", detail)

    def _on_head_timeout(self) -> None:
        self._head_timer = None
        if self._phase is _OVER or self.transport.is_closing():
            return
        if self.flow.read_paused:  # we do not read: the peer cannot be late
            self._head_timer = self.loop.call_later(self.header_seconds, self._on_head_timeout)
        elif self._phase is _HEAD:
            detail = f"the headers did not end within {self.header_seconds:g} s; send them faster"
            self._refuse(FleetError("REQUEST_TIMEOUT", detail))
        else:
            self.transport.close()  # never sent a byte: nobody waits for a reply

    def _refuse(self, error: FleetError) -> None:
        """Ends the connection with `error`, after the replies to earlier requests."""
        if self._refusal is not None:
            return
        broken_body = self._phase is _BODY
        self._refusal = error
        self._phase = _OVER
        self._drained = 0
        self._cancel_timers()
        if broken_body and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
        elif broken_body and self.cycle is not None:
            started = self.cycle.response_started
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if started:
                self.transport.close()
            else:
                self._send_refusal(error)
            return
        if self._active is None or self._active.response_complete:
            self._send_refusal(error)

    def _send_refusal(self, error: FleetError) -> None:
        request_id = str(uuid_utils.uuid7())
        status, body, headers = error_reply(error, request_id)
        headers += [(b"content-length", str(len(body)).encode()), (b"x-request-id", request_id.encode())]
        headers[:0] = self.server_state.default_headers
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        self.transport.write(b"".join([STATUS_LINE[status], *lines, b"connection: close\r\n\r\n", body]))
        _logger.debug("refused a connection's request: %s (request_id %s)", error.reason, request_id)
        self._close_lingering()

    def _linger(self) -> None:
        self.flow.resume_reading()
        if self._linger_timer is None:
            self._linger_timer = self.loop.call_later(_LINGER_SECONDS, self.transport.close)

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._linger_timer):
            if timer is not None:
                timer.cancel()
        self._head_timer = self._linger_timer = None


class LimitedWebSocketProtocol(WebSocketsSansIOProtocol):
    """WebSockets that the application can drop at once; give it to `uvicorn.Config(ws=...)`."""

    async def run_asgi(self) -> None:
        self.scope["extensions"][ABORT_EXTENSION] = self.transport.abort  # type: ignore[assignment]
        await super().run_asgi()


def limited_protocol(
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
    header_seconds: float = HEADER_SECONDS,
    max_connections: int = MAX_CONNECTIONS,
) -> type[LimitedHttpProtocol]:
    """A protocol class with these limits, for `uvicorn.Config(http=...)`.

    `header_seconds` runs from the connection, or from the first byte of a later request, to the end of its
    headers. WebSockets count as connections. Idle connections are closed quietly (`timeout_keep_alive` of
    uvicorn).
    """
    limits = {
        "max_header_bytes": max_header_bytes,
        "header_seconds": header_seconds,
        "max_connections": max_connections,
        "known_heads": KnownHeads(max_header_bytes),
    }
    return type("LimitedHttpProtocol", (LimitedHttpProtocol,), limits)
