"""WebSockets: bidirectional methods, and server streams bound as custom kind WEBSOCKET.

One JSON object a text frame, both ways.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from google.protobuf.message import Message

from fleet_server.bridge.asgi import Call, ClientGoneError, ClientStuckError
from fleet_server.bridge.binding import RequestBinder
from fleet_server.bridge.context import InProcContext
from fleet_server.bridge.errors import error_body, error_reply, status_of
from fleet_server.bridge.invoker import Invoker
from fleet_server.bridge.replies import ReplyEncoder
from fleet_server.bridge.routes import Variables
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.bridge.supervise import LiveCalls, Stop, Stopper, supervise
from fleet_server.domain.errors import Code, FleetError

_LOG = logging.getLogger(__name__)

NORMAL: Final = 1000
GOING_AWAY: Final = 1001
NOT_TEXT: Final = 1003
BAD_PAYLOAD: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009
SERVER_FAULT: Final = 1011
TRY_AGAIN_LATER: Final = 1013

_CLOSE_BY_CODE: Final = {
    Code.UNAVAILABLE: TRY_AGAIN_LATER,
    Code.RESOURCE_EXHAUSTED: TRY_AGAIN_LATER,
}


def close_code(error: FleetError) -> int:
    """The close code of an error after the upgrade: 1001 at shutdown, 1013 for what passes, 1008 for the caller's fault
    (a withdrawn key among them), else 1011."""
    if error.reason == "SHUTTING_DOWN":
        return GOING_AWAY
    return _CLOSE_BY_CODE.get(error.code) or (POLICY if status_of(error) < 500 else SERVER_FAULT)


async def refuse(call: Call, error: FleetError) -> None:
    """Answer a handshake with an ordinary HTTP error."""
    if "websocket.http.response" not in (call.scope.get("extensions") or {}):
        await call.send({"type": "websocket.close", "code": POLICY, "reason": error.reason})
        return
    status, body, headers = error_reply(error, call.request_id)
    headers += [(b"x-request-id", call.request_id.encode()), (b"content-length", b"%d" % len(body))]
    await call.send({"type": "websocket.http.response.start", "status": status, "headers": headers})
    await call.send({"type": "websocket.http.response.body", "body": body})


class SocketCall:
    """One WebSocket as one call of a streaming method.

    The upgrade is answered when the servicer first reads, sends initial metadata or a message, at the latest after
    `head_seconds`; an error before that is an ordinary HTTP reply. The first frame's message also takes the fields of
    path and query. A frame that is no request is answered by the error object and 1007 (binary: 1003). Frames to a
    method that reads none are ignored. While the servicer takes no frames, at most `frame_queue` wait and the rest stay
    with the client, whose leaving is then noticed only when something is sent.
    """

    def __init__(
        self,
        call: Call,
        context: InProcContext,
        binder: RequestBinder,
        encoder: ReplyEncoder,
        settings: BridgeSettings,
        variables: Variables,
    ) -> None:
        self._call = call
        self._context = context
        self._binder = binder
        self._encoder = encoder
        self._settings = settings
        self._variables = variables
        self._query: bytes = call.scope.get("query_string", b"")
        self._lock = asyncio.Lock()
        self._sure = asyncio.Event()
        self._frames: asyncio.Queue[str | bytes] = asyncio.Queue(settings.frame_queue)
        self._accepted = False
        self._closed = False
        self._bad_frame: int | None = None

    async def run(self, invoker: Invoker, path: str, *, bidirectional: bool, live: LiveCalls) -> Stop | None:
        """Serve the socket to its end; why it was stopped, if it was.

        Raises FleetError, before the upgrade, for what is an ordinary error.
        """
        first = self._binder.bind_texts(self._variables, self._query)
        self._context.on_initial_metadata = self._sure.set
        request = self._requests() if bidirectional else first
        main = self._replies(invoker, path, request)

        async def read(stopper: Stopper) -> None:
            await self._read(stopper, keep=bidirectional)

        try:
            return await supervise(main, [read, self._tick], live=live, finish=self._finish)
        except (ClientStuckError, ClientGoneError):
            self._call.abort()
            return Stop.STUCK

    async def _replies(self, invoker: Invoker, path: str, request: Message | AsyncIterator[Message]) -> None:
        try:
            async with aclosing(invoker.stream(path, request, self._context)) as replies:
                async for reply in replies:
                    await self._write(self._encoder.item(reply).text)
            failure = self._context.failure()
            if failure is not None:
                raise failure
            await self._open()
        except FleetError as error:
            await self._fail(error)

    async def _requests(self) -> AsyncIterator[Message]:
        variables, query = self._variables, self._query
        await self._open()
        while True:
            frame = await self._frames.get()
            try:
                if isinstance(frame, bytes):
                    self._bad_frame = NOT_TEXT
                    raise FleetError("MALFORMED_JSON", "frame: it is binary; send one JSON object a text frame")
                message = self._binder.bind_frame(variables, query, frame)
            except FleetError:
                self._bad_frame = self._bad_frame or BAD_PAYLOAD
                raise
            yield message
            variables, query = (), b""

    async def _read(self, stopper: Stopper, *, keep: bool) -> None:
        """Take frames, and notice the client's leaving."""
        limit = self._settings.max_frame_bytes
        while True:
            message = await self._call.receive()
            if message["type"] == "websocket.disconnect":
                stopper.stop(Stop.GONE)
                return
            if message["type"] != "websocket.receive":
                continue
            text = message.get("text")
            frame: str | bytes = text if text is not None else message.get("bytes") or b""
            if len(frame) > limit or (isinstance(frame, str) and len(frame.encode("utf-8", "replace")) > limit):
                stopper.stop(Stop.OVERSIZE)
                return
            if keep:
                await self._frames.put(frame)

    async def _tick(self, stopper: Stopper) -> None:
        try:
            async with asyncio.timeout(self._settings.head_seconds):
                await self._sure.wait()
        except TimeoutError:
            pass
        await self._open()

    async def _open(self) -> None:
        async with self._lock:
            await self._accept()

    async def _accept(self) -> None:
        if not self._accepted and not self._closed:
            self._accepted = self._call.started = True
            headers = [(b"x-request-id", self._call.request_id.encode())]
            message = {"type": "websocket.accept", "headers": headers}
            await self._call.send_within(message, self._settings.send_seconds)

    async def _write(self, text: str) -> None:
        async with self._lock:
            await self._accept()
            if not self._closed:
                message = {"type": "websocket.send", "text": text}
                await self._call.send_within(message, self._settings.send_seconds)

    async def _fail(self, error: FleetError) -> None:
        """The error object as last frame, then the close; before the upgrade the error itself."""
        async with self._lock:
            if not self._accepted:
                self._closed = True
                raise error
        await self._write(error_body(error, self._call.request_id).decode())
        await self._close(self._bad_frame or close_code(error), error.reason)

    async def _close(self, code: int, reason: str = "") -> None:
        async with self._lock:
            if self._closed:
                return
            self._closed = True
            message = {"type": "websocket.close", "code": code, "reason": reason}
            await self._call.send_within(message, self._settings.send_seconds)

    async def _finish(self, reason: Stop | None) -> None:
        if reason is Stop.SHUTDOWN:
            await self._fail(FleetError("SHUTTING_DOWN", "the server is stopping; connect again"))
        elif reason is Stop.OVERSIZE:
            await self._open()
            await self._close(TOO_BIG, f"a frame may have {self._settings.max_frame_bytes} bytes")
        elif reason is Stop.STUCK:
            await self._close(TRY_AGAIN_LATER, "too slow")
            self._call.abort()
        elif reason is None:
            await self._close(NORMAL)
