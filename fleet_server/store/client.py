"""Connections to the store: one task owns each, callers await futures.

A caller that is cancelled never touches the socket, so no reply can reach the wrong call. Calls that wait go out as
one pipelined batch (at most 32, or 256 KiB), one batch in flight. When a connection is lost in mid-call the outcome
is unknown and the same bytes are sent again on the next one, which every script here allows; after `MAX_SENDS` or the
call's deadline it is STORE_UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import hiredis
from redis.asyncio.connection import AbstractConnection, Connection, UnixDomainSocketConnection, parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ResponseError

from fleet_server.domain.errors import FleetError
from fleet_server.store.lua import Script

Argument = str | bytes | int

MAX_BATCH_CALLS = 32
MAX_BATCH_BYTES = 256 * 1024
MAX_WAITING = 10_000
MAX_SENDS = 6
CALL_SECONDS = 10.0
CONNECT_SECONDS = 2.0
FIRST_BACKOFF_SECONDS = 0.02
LAST_BACKOFF_SECONDS = 1.0

_ELSEWHERE = frozenset({"READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "UNBLOCKED", "NOREPLICAS"})
"""Replies of a server that cannot serve now: drop the connection and ask again."""


CLOSED = "the connection is closed"


class StoreFullError(FleetError):
    """The server has no memory left for a call that needs some."""

    def __init__(self, detail: str) -> None:
        super().__init__("STORE_UNAVAILABLE", f"the store is full: {detail}")


def pack(*args: Argument) -> bytes:
    """One command on the wire."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub says one-tuple
    return packed


def unavailable(detail: str) -> FleetError:
    """The one error for a store that cannot be reached or whose answer stays unknown."""
    return FleetError("STORE_UNAVAILABLE", detail)


async def connect(url: str, *, name: str = "fleet") -> AbstractConnection:
    """A fresh RESP2 connection. Raises RedisError or OSError."""
    options: dict[str, Any] = dict(parse_url(url))
    kind: type[AbstractConnection] = options.pop("connection_class", Connection)
    if kind is UnixDomainSocketConnection:
        options.setdefault("path", "")
    connection = kind(
        **options,
        protocol=2,
        client_name=name,
        driver_info=None,
        socket_timeout=None,
        socket_connect_timeout=CONNECT_SECONDS,
        retry=Retry(NoBackoff(), 0),
    )
    async with asyncio.timeout(CONNECT_SECONDS):
        await connection.connect()  # type: ignore[no-untyped-call]
    return connection


class _Call:
    """One call on its way: packed bytes, who waits and until when. Its own timer ends the wait."""

    __slots__ = ("_timer", "data", "deadline", "future", "script", "sends")

    def __init__(self, data: bytes, script: Script | None, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self.data = data
        self.script = script
        self.future: asyncio.Future[Any] = loop.create_future()
        self.deadline = loop.time() + seconds
        self.sends = 0
        self._timer = loop.call_at(self.deadline, self.fail, "no answer in time")

    def settle(self, reply: Any) -> None:
        """Hands the reply, or the server's refusal, to the caller if it still waits."""
        self._timer.cancel()
        if self.future.done():
            return
        if isinstance(reply, Exception):
            self.future.set_exception(reply)
        else:
            self.future.set_result(reply)

    def fail(self, detail: str) -> None:
        """Tells the caller that there will be no reply, and whether the call may have taken effect."""
        if self.sends:
            detail += ", and the outcome is unknown; ask again"
        self.settle(unavailable(f"the store is unavailable: {detail}"))


class Client:
    """One connection with its task; reconnects with bounded backoff. At most `MAX_WAITING` calls wait.

    `call` and `run` return raw replies (bytes, ints, lists). They raise STORE_UNAVAILABLE, StoreFullError, or INTERNAL
    for a refusal that only a fault of ours explains.
    """

    def __init__(self, url: str, *, name: str, scripts: Mapping[str, Script]) -> None:
        self._url = url
        self._name = name
        self._scripts = scripts
        self._waiting: deque[_Call] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connection: AbstractConnection | None = None
        self._closed = False
        self._last_error = "not connected yet"

    async def call(self, *args: Argument, seconds: float = CALL_SECONDS) -> Any:
        """One plain command; it must be harmless to repeat."""
        return await self._enqueue(pack(*args), None, seconds)

    async def run(
        self, script: str, keys: Sequence[str], args: Sequence[Argument], *, seconds: float = CALL_SECONDS
    ) -> Any:
        """One script by name."""
        return await self.post(script, keys, args, seconds=seconds)

    def post(
        self, script: str, keys: Sequence[str], args: Sequence[Argument], *, seconds: float = CALL_SECONDS
    ) -> asyncio.Future[Any]:
        """As `run`, but only enqueues: await the future. What is posted in one go travels in one batch."""
        known = self._scripts[script]
        return self._enqueue(pack("EVALSHA", known.sha, len(keys), *keys, *args), known, seconds)

    def post_call(self, *args: Argument, seconds: float = CALL_SECONDS) -> asyncio.Future[Any]:
        """As `call`, but only enqueues."""
        return self._enqueue(pack(*args), None, seconds)

    async def aclose(self) -> None:
        """Ends the task; calls that wait get STORE_UNAVAILABLE."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await self._drop()
        while self._waiting:
            self._waiting.popleft().fail(CLOSED)

    def _enqueue(self, data: bytes, script: Script | None, seconds: float) -> asyncio.Future[Any]:
        if self._closed:
            raise unavailable(CLOSED)
        if len(self._waiting) >= MAX_WAITING:
            raise unavailable(f"{MAX_WAITING} calls wait for the store ({self._last_error}); try again later")
        call = _Call(data, script, seconds)
        self._waiting.append(call)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.create_task(self._serve(), name=f"store-{self._name}")
        return call.future

    async def _serve(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        batch: list[_Call] = []
        try:
            while True:
                batch = self._take()
                if not batch:
                    self._wake.clear()
                    await self._wake.wait()
                    # Others whom the same event woke have calls too: they go together.
                    await asyncio.sleep(0)
                    continue
                try:
                    if self._connection is None:
                        self._connection = await self._open()
                    await self._exchange(self._connection, batch)
                    backoff = FIRST_BACKOFF_SECONDS
                except Exception as error:  # whatever broke the connection must not strand those who wait
                    self._last_error = f"{type(error).__name__}: {error}"
                    await self._drop()
                    self._again(batch)
                    await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                    backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
        finally:
            for call in batch:
                call.fail(CLOSED)

    def _take(self) -> list[_Call]:
        batch: list[_Call] = []
        size = 0
        while self._waiting and len(batch) < MAX_BATCH_CALLS:
            call = self._waiting[0]
            if batch and size + len(call.data) > MAX_BATCH_BYTES:
                break
            self._waiting.popleft()
            if call.future.done():
                continue
            batch.append(call)
            size += len(call.data)
        return batch

    async def _open(self) -> AbstractConnection:
        connection = await connect(self._url, name=f"fleet-{self._name}")
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._load(connection)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _load(self, connection: AbstractConnection) -> None:
        loads = [pack("SCRIPT", "LOAD", script.source) for script in self._scripts.values()]
        await connection.send_packed_command(loads, check_health=False)
        for _ in loads:
            await connection.read_response(disable_decoding=True)

    async def _exchange(self, connection: AbstractConnection, batch: list[_Call]) -> None:
        """Sends a batch and settles its calls; what is still unsettled when it raises has an unknown outcome."""
        for call in batch:
            call.sends += 1
        missing: list[_Call] = []
        async with asyncio.timeout_at(max(call.deadline for call in batch)):
            await connection.send_packed_command([call.data for call in batch], check_health=False)
            for call in batch:
                try:
                    reply = await connection.read_response(disable_decoding=True)
                except ResponseError as error:
                    code = error.status_code or str(error).split(" ", 1)[0]
                    if code == "NOSCRIPT":
                        missing.append(call)
                        continue
                    if code in _ELSEWHERE:
                        raise
                    reply = _refusal(code, str(error))
                call.settle(reply)
            if missing:
                await self._load(connection)
        self._again(missing)

    def _again(self, batch: list[_Call]) -> None:
        """Back to the head of the queue what may be sent once more; the rest fails."""
        for call in reversed(batch):
            if call.future.done():
                continue
            if call.sends >= MAX_SENDS:
                call.fail(f"no answer to {MAX_SENDS} tries ({self._last_error})")
            else:
                self._waiting.appendleft(call)

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _refusal(code: str, text: str) -> FleetError:
    """What the caller of a refused call is told."""
    if code == "OOM":
        return StoreFullError("free memory or raise maxmemory")
    if code == "MISCONF":
        return unavailable(f"the store refuses writes: {text}")
    return FleetError("INTERNAL", f"the store refused a call: {code} {text}")


async def gather(futures: Sequence[asyncio.Future[Any]]) -> list[Any]:
    """All replies, in order; the first error after all are settled."""
    if len(futures) > 1:
        await asyncio.wait(futures)
        return [future.result() for future in futures]
    return [await future for future in futures]
