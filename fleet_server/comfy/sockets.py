"""The clients' WebSockets: each hears of its own prompts alone, and of how many remain in the fleet."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import orjson
import structlog
from starlette.websockets import WebSocket, WebSocketDisconnect

from fleet_server.comfy.outbox import Outbox, picture_of
from fleet_server.domain.errors import FleetError
from fleet_server.services.comfy_prompts import Who
from fleet_server.services.comfy_tracker import Live

_log = structlog.get_logger("fleet.comfy")
Told = Callable[[str, str, str], Awaitable[bool]]
"""Whether (owner, client) is to be told of the end of this job now; True once."""

_BEHIND = 1013
_REPLACED = 1000
_WITHDRAWN = 1008
_GOING = 1001
_KEYED = frozenset({"progress", "progress_state"})


@dataclass(frozen=True, slots=True)
class SocketSettings:
    """Bounds of one socket; `sockets` is the most of them."""

    waiting: int = 256
    waiting_bytes: int = 8 << 20
    send_seconds: float = 10.0
    first_frame_bytes: int = 64 << 10
    sockets: int = 4_096


class Socket:
    """One client. `run` is its whole life."""

    def __init__(
        self, websocket: WebSocket, who: Who, client_id: str, told: Told, features: bytes, settings: SocketSettings
    ) -> None:
        self.who = who
        self.client_id = client_id
        self._websocket = websocket
        self._told = told
        self._features = features
        self._settings = settings
        self._outbox = Outbox(most=settings.waiting, most_bytes=settings.waiting_bytes)
        self._with_metadata = False
        self._held: dict[str, tuple[bytes, bool]] = {}
        self._closed = asyncio.Event()
        self._code = _REPLACED

    def put(self, text: str, key: tuple[str, str] | None = None) -> None:
        """A text frame that is about no prompt in particular."""
        self._outbox.put(text, key)
        self._check()

    def put_frame(self, live: Live, kind: str, text: str) -> None:
        """A text frame of a prompt; a picture that was held for a client without metadata comes in its place."""
        held = self._held.pop(live.job_id, None)
        if held is not None and kind != "progress":
            self._put_picture(live.job_id, *held)
        self._outbox.put(text, (kind, live.job_id) if kind in _KEYED else None)
        if held is not None and kind == "progress":
            self._put_picture(live.job_id, *held)
        self._check()

    def put_binary(self, live: Live, data: bytes) -> None:
        """A binary frame of a prompt."""
        picture = picture_of(data)
        if picture is None:
            self._outbox.put(data)
        elif self._with_metadata:
            self._put_picture(live.job_id, picture.data, picture.lossy)
        else:
            # Without metadata ComfyUI sends the picture after the progress that it belongs to.
            earlier = self._held.pop(live.job_id, None)
            if earlier is not None:
                self._put_picture(live.job_id, *earlier)
            self._held[live.job_id] = (picture.plain, picture.lossy)
        self._check()

    def put_end(self, job_id: str, texts: Sequence[str]) -> None:
        """The end of a prompt."""
        held = self._held.pop(job_id, None)
        if held is not None:
            self._put_picture(job_id, *held)
        self._outbox.put_end(job_id, texts)
        self._check()

    def _put_picture(self, job_id: str, data: bytes, lossy: bool) -> None:
        self._outbox.put(data, ("preview", job_id) if lossy else None, replace=lossy)

    def _check(self) -> None:
        if self._outbox.full:
            self.close(_BEHIND)

    def close(self, code: int) -> None:
        """Ends the socket."""
        if not self._closed.is_set():
            self._code = code
            self._closed.set()

    async def run(self) -> None:
        """Reads and writes until either side ends it. Never raises but when cancelled."""
        tasks = [
            asyncio.create_task(self._read(), name="comfy-read"),
            asyncio.create_task(self._write(), name="comfy-write"),
            asyncio.create_task(self._closed.wait(), name="comfy-close"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if self._closed.is_set():
            with contextlib.suppress(Exception):
                async with asyncio.timeout(self._settings.send_seconds):
                    await self._websocket.close(self._code)

    async def _read(self) -> None:
        """The first text may say what the client takes; nothing else is read of it, as in ComfyUI."""
        first = True
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await self._websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                text = message.get("text")
                if first and text is not None and len(text) <= self._settings.first_frame_bytes:
                    self._negotiate(text)
                    first = False

    def _negotiate(self, text: str) -> None:
        try:
            said = orjson.loads(text)
            flags = said["data"] if said["type"] == "feature_flags" else None
        except (ValueError, KeyError, TypeError):
            return
        if isinstance(flags, dict):
            self._with_metadata = bool(flags.get("supports_preview_metadata"))
            self.put(orjson.dumps({"type": "feature_flags", "data": orjson.loads(self._features)}).decode())

    async def _write(self) -> None:
        try:
            while True:
                entry = await self._outbox.take()
                if entry.ends and not await self._to_tell(entry.ends):
                    continue
                for frame in entry.frames:
                    async with asyncio.timeout(self._settings.send_seconds):
                        if isinstance(frame, str):
                            await self._websocket.send_text(frame)
                        else:
                            await self._websocket.send_bytes(frame)
        except TimeoutError:
            self.close(_BEHIND)
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass

    async def _to_tell(self, job_id: str) -> bool:
        """Whether the end is still to be told; asked until the store answers."""
        while True:
            try:
                return await self._told(self.who.owner, self.client_id, job_id)
            except FleetError:
                await asyncio.sleep(0.5)


class Sockets:
    """All sockets of this replica, by owner and client. What the tracker tells goes through here."""

    def __init__(self, told: Told, settings: SocketSettings | None = None) -> None:
        self._told = told
        self._settings = settings or SocketSettings()
        self._by_client: dict[tuple[str, str], Socket] = {}
        self._addresses: dict[tuple[str, str], str] = {}

    @property
    def full(self) -> bool:
        """Whether no more sockets are taken."""
        return len(self._by_client) >= self._settings.sockets

    def address(self, owner: str, client_id: str) -> str:
        """Where the client's socket comes from; "" where it has none."""
        socket = self._by_client.get((owner, client_id))
        return "" if socket is None else socket.who.address

    def has(self, owner: str, client_id: str) -> bool:
        """Whether the client's socket is here."""
        return (owner, client_id) in self._by_client

    def open(self, websocket: WebSocket, who: Who, client_id: str, features: bytes) -> Socket:
        """A new socket; one that the client had before is closed."""
        socket = Socket(websocket, who, client_id, self._told, features, self._settings)
        before = self._by_client.get((who.owner, client_id))
        self._by_client[who.owner, client_id] = socket
        if before is not None:
            before.close(_REPLACED)
        return socket

    def leave(self, socket: Socket) -> None:
        """The socket has ended; one that took its place stays."""
        name = (socket.who.owner, socket.client_id)
        if self._by_client.get(name) is socket:
            del self._by_client[name]

    def close(self) -> None:
        """The server is being shut down."""
        for socket in list(self._by_client.values()):
            socket.close(_GOING)

    def withdrawn(self, socket: Socket) -> None:
        """The socket's key is none any more."""
        socket.close(_WITHDRAWN)

    # services.comfy_tracker.Audience

    def listens(self) -> bool:
        return bool(self._by_client)

    def status(self, remaining: int, *, but: tuple[str, str] | None = None) -> None:
        text = status_text(remaining)
        for name, socket in self._by_client.items():
            if name != but:
                socket.put(text, ("status", ""))

    def frame(self, live: Live, kind: str, text: str) -> None:
        socket = self._of(live)
        if socket is not None:
            socket.put_frame(live, kind, text)

    def binary(self, live: Live, data: bytes) -> None:
        socket = self._of(live)
        if socket is not None:
            socket.put_binary(live, data)

    def end(self, owner: str, client_id: str, job_id: str, texts: Sequence[str]) -> None:
        socket = self._by_client.get((owner, client_id))
        if socket is not None:
            socket.put_end(job_id, texts)

    def _of(self, live: Live) -> Socket | None:
        return self._by_client.get((live.owner, live.client_id)) if live.client_id else None


def status_text(remaining: int, sid: str | None = None) -> str:
    """A `status` frame; with the client's id in the first."""
    data: dict[str, object] = {"status": {"exec_info": {"queue_remaining": remaining}}}
    if sid is not None:
        data["sid"] = sid
    return orjson.dumps({"type": "status", "data": data}).decode()
