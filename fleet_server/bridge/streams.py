"""Server streams over HTTP: SSE or NDJSON, and raw bytes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from google.protobuf.message import Message

from fleet_server.bridge.asgi import Call, ClientGoneError, ClientStuckError
from fleet_server.bridge.context import InProcContext
from fleet_server.bridge.errors import Header, error_body
from fleet_server.bridge.replies import ReplyEncoder, header_value, reply_head
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.supervise import LiveCalls, Stop, Stopper, disconnect_watcher, supervise
from fleet_server.domain.errors import FleetError

_LOG = logging.getLogger(__name__)

SSE_MEDIA_TYPE: Final = b"text/event-stream"
NDJSON_MEDIA_TYPE: Final = b"application/x-ndjson"
_KEEPALIVE: Final = b": \n\n"

Replies = AsyncGenerator[Message, None]


def wants_sse(accept: bytes | None) -> bool:
    """Whether `Accept` names text/event-stream, and NDJSON not with a higher q."""
    if accept is None or SSE_MEDIA_TYPE not in accept.lower():
        return False
    quality = {NDJSON_MEDIA_TYPE: 0.0, SSE_MEDIA_TYPE: 0.0}
    for item in accept.lower().split(b","):
        media, *parameters = (part.strip() for part in item.split(b";"))
        if media in quality:
            quality[media] = next((_q(text[2:]) for text in parameters if text.startswith(b"q=")), 1.0)
    return quality[SSE_MEDIA_TYPE] > 0 and quality[SSE_MEDIA_TYPE] >= quality[NDJSON_MEDIA_TYPE]


def _q(text: bytes) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


class StreamReply:
    """One server stream as one HTTP reply.

    The head goes out with the first message, when the servicer sends initial metadata (it should, once it is sure that
    the stream will come: then clients see it at once) or after `head_seconds`. An error before that is an ordinary
    reply; one after it is the last line (SSE: `event: error`), and breaks off the connection of a raw stream. The
    replies are closed when the client leaves or takes nothing, and a HEAD ends after the head.
    """

    def __init__(
        self,
        call: Call,
        context: InProcContext,
        replies: Replies,
        encoder: ReplyEncoder,
        settings: BridgeSettings,
    ) -> None:
        self._call = call
        self._context = context
        self._replies = replies
        self._encoder = encoder
        self._settings = settings
        self._sse = not encoder.raw and wants_sse(call.headers.get(b"accept"))
        self._lock = asyncio.Lock()
        self._sure = asyncio.Event()
        self._opened = False
        self._ended = False
        self._no_body = call.is_head

    async def run(self, live: LiveCalls) -> Stop | None:
        """Serve the stream to its end; why it was stopped, if it was.

        Raises FleetError, before anything was sent, for what is an ordinary error.
        """
        self._context.on_initial_metadata = self._sure.set
        helpers = [disconnect_watcher(self._call.receive)]
        main = self._bytes() if self._encoder.raw else self._objects()
        if not self._encoder.raw:
            helpers.append(self._tick)
        try:
            return await supervise(main, helpers, live=live, finish=self._finish)
        except (ClientStuckError, ClientGoneError):
            self._call.abort()
            return Stop.STUCK
        except FleetError as error:
            if not self._opened:
                raise
            # Bytes have no place for an error: an unfinished reply is the only honest sign.
            _LOG.error("stream of bytes broken off: %s (request %s)", error, self._call.request_id)
            return None

    async def _objects(self) -> None:
        try:
            async with aclosing(self._replies) as replies:
                async for reply in replies:
                    encoded = self._encoder.item(reply)
                    await self._write(encoded.event if self._sse else encoded.line)
                    if self._no_body:
                        return
            self._raise_failure()
            await self._open()
        except FleetError as error:
            await self._fail(error)

    async def _bytes(self) -> None:
        async with aclosing(self._replies) as replies:
            async for reply in replies:
                body = self._encoder.http_body(reply)
                if not self._opened:
                    await self._open(body.content_type)
                if self._no_body:
                    return
                if body.data:
                    await self._write(body.data)
        self._raise_failure()
        await self._open(empty=True)

    def _raise_failure(self) -> None:
        failure = self._context.failure()
        if failure is not None:
            raise failure

    async def _tick(self, stopper: Stopper) -> None:
        """Open the reply in time, then keep an SSE connection warm."""
        try:
            async with asyncio.timeout(self._settings.head_seconds):
                await self._sure.wait()
        except TimeoutError:
            pass
        await self._open()
        if self._no_body:
            stopper.stop(Stop.HEAD)
        while self._sse:
            await asyncio.sleep(self._settings.keepalive_seconds)
            await self._write(_KEEPALIVE)

    async def _open(self, content_type: str = "", *, empty: bool = False) -> None:
        async with self._lock:
            if not self._opened and not self._ended:
                await self._send_head(content_type, empty)

    async def _send_head(self, content_type: str, empty: bool) -> None:
        status, headers = reply_head(self._context.initial_metadata)
        given = {name for name, _ in headers}
        if not self._encoder.raw:
            headers = [(name, value) for name, value in headers if name not in (b"content-type", b"content-length")]
            headers.append((b"content-type", SSE_MEDIA_TYPE if self._sse else NDJSON_MEDIA_TYPE))
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        elif b"content-type" not in given and not (empty or status == 304):
            value = header_value("content-type", content_type) if content_type else b"application/octet-stream"
            headers.append((b"content-type", value))
        if status == 304:
            headers = [(name, value) for name, value in headers if name != b"content-length"]
            self._no_body = True
        elif self._encoder.raw and empty and b"content-length" not in given:
            headers.append((b"content-length", b"0"))
        self._opened = self._call.started = True
        await self._start(status, headers)

    async def _start(self, status: int, headers: list[Header]) -> None:
        headers.append((b"x-request-id", self._call.request_id.encode()))
        message = {"type": "http.response.start", "status": status, "headers": headers}
        await self._call.send_within(message, self._settings.send_seconds)

    async def _write(self, data: bytes) -> None:
        async with self._lock:
            if not self._opened and not self._ended:
                await self._send_head("", False)
            if not self._no_body and not self._ended:
                message = {"type": "http.response.body", "body": data, "more_body": True}
                await self._call.send_within(message, self._settings.send_seconds)

    async def _fail(self, error: FleetError) -> None:
        async with self._lock:
            if not self._opened:
                self._ended = True
                raise error
        body = error_body(error, self._call.request_id)
        await self._write(b"event: error\ndata: " + body + b"\n\n" if self._sse else body + b"\n")

    async def _finish(self, reason: Stop | None) -> None:
        if reason is Stop.STUCK:
            self._call.abort()
        if reason in (Stop.STUCK, Stop.GONE) or self._ended:
            return
        if reason is Stop.SHUTDOWN:
            error = FleetError("SHUTTING_DOWN", "the server is stopping; connect again")
            if self._encoder.raw and self._opened:
                return
            await self._fail(error)
        self._ended = True
        message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._call.send_within(message, self._settings.send_seconds)
