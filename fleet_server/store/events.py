"""The stream of state changes: capped, replayable, fanned out in process."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio.connection import AbstractConnection

from fleet_server.store._room import Room
from fleet_server.store.client import (
    FIRST_BACKOFF_SECONDS,
    LAST_BACKOFF_SECONDS,
    Argument,
    connect,
    gather,
    pack,
)
from fleet_server.store.records import StoredEvent

KEEP_EVENTS = 100_000
GATHER_SECONDS = 0.01
"""After events came the next read waits a little: many small reads cost the store more than the events do."""
QUIET_GATHER_SECONDS = 0.05
"""So long where no subscriber is in a hurry."""
BLOCK_MS = 5_000
READ_COUNT = 500

log = logging.getLogger(__name__)


def _event(entry: Sequence[Any]) -> StoredEvent:
    return StoredEvent.of(*entry)


def _order(event_id: str) -> tuple[int, int]:
    milliseconds, _, sequence = event_id.partition("-")
    return int(milliseconds), int(sequence or 0)


def _gap(since: str, oldest_id: str) -> StoredEvent:
    return StoredEvent("", 0, "gap", {"since": since.encode(), "oldest_id": oldest_id.encode()})


class Subscription:
    """An iterator of one watcher: at most `buffer` events wait, beyond that a gap stands for all that was lost."""

    def __init__(self, buffer: int, hurry: Callable[[], bool]) -> None:
        self.hurry = hurry
        self._waiting: deque[StoredEvent] = deque()
        self._buffer = buffer
        self._wake = asyncio.Event()
        self._delivered = "0-0"

    def __aiter__(self) -> AsyncIterator[StoredEvent]:
        return self

    async def __anext__(self) -> StoredEvent:
        while not self._waiting:
            self._wake.clear()
            await self._wake.wait()
        event = self._waiting.popleft()
        if event.id:
            self._delivered = event.id
        return event

    def begin(self, event_id: str) -> None:
        """Where this watcher stands before its first event."""
        self._delivered = event_id

    def put(self, event: StoredEvent) -> None:
        """Never waits: a watcher that does not keep up loses what waits, and is told from where to read again."""
        if len(self._waiting) >= self._buffer:
            self._waiting.clear()
            self._waiting.append(_gap(self._delivered, event.id))
        self._waiting.append(event)
        self._wake.set()


class EventStore:
    """About the newest 100,000 events. One blocking reader a process, on a connection of its own."""

    def __init__(self, room: Room, url: str) -> None:
        self._room = room
        self._url = url
        self._subscribers: set[Subscription] = set()
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._last = ""

    @asynccontextmanager
    async def subscribe(
        self, *, buffer: int = 1024, hurry: Callable[[], bool] = lambda: True
    ) -> AsyncIterator[AsyncIterator[StoredEvent]]:
        """Every event committed after entering, in order. At most `buffer` wait: beyond, one `gap` stands for the lost.

        Subscribe, then snapshot, then drop what is not newer. Events from just before entering may come too. While
        `hurry()` says no for all subscribers, events that follow others come up to 50 ms late, else 10.
        """
        subscription = Subscription(buffer, hurry)
        async with self._starting:
            if self._task is None:
                self._last = await self.last_id()
                self._task = asyncio.create_task(self._read_on(), name="store-events")
            subscription.begin(self._last)
            self._subscribers.add(subscription)
        try:
            yield subscription
        finally:
            self._subscribers.discard(subscription)

    async def read(self, since: str, limit: int = 1000) -> tuple[list[StoredEvent], str]:
        """Events after id `since` ("0": all that is kept), oldest first, and the oldest id kept ("" if none).

        Where `since` is older than the oldest id, what lay between is gone.
        """
        after = self._room.bulk.post_call("XRANGE", self._room.keys.events, f"({since}", "+", "COUNT", limit)
        first = self._room.bulk.post_call("XRANGE", self._room.keys.events, "-", "+", "COUNT", 1)
        entries, oldest = await gather([after, first])
        return [_event(entry) for entry in entries], oldest[0][0].decode() if oldest else ""

    async def last_id(self) -> str:
        """The id of the newest event ("0-0" if there is none)."""
        newest = await self._room.bulk.call("XREVRANGE", self._room.keys.events, "+", "-", "COUNT", 1)
        return newest[0][0].decode() if newest else "0-0"

    async def publish(self, kind: str, fields: Mapping[str, Argument]) -> str:
        """Appends an event that has no row of its own in the store; its id. At least once."""
        flat = [part for pair in fields.items() for part in pair]
        reply = await self._room.bulk.run("publish", [self._room.keys.events], self._room.args(kind, *flat))
        return str(reply.decode())

    async def aclose(self) -> None:
        """Ends the reader; iterators wait for ever then, so end the watchers first."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _read_on(self) -> None:
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await connect(self._url, name="fleet-events")
                await self._find_place()
                backoff = FIRST_BACKOFF_SECONDS
                while True:
                    if 0 < await self._read_once(connection) < READ_COUNT:
                        hurry = any(one.hurry() for one in self._subscribers)
                        await asyncio.sleep(GATHER_SECONDS if hurry else QUIET_GATHER_SECONDS)
            except Exception as error:  # the reader must outlive whatever ends its connection
                log.warning("the event stream is interrupted: %s", error)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
            finally:
                if connection is not None:
                    await connection.disconnect(nowait=True)

    async def _find_place(self) -> None:
        """After a reconnect: tells of a gap if events were trimmed, or the store came back with fewer than it had."""
        _, oldest = await self.read(self._last, 1)
        newest = await self.last_id()
        behind = _order(newest) < _order(self._last)
        if behind or (oldest and _order(self._last) < _order(oldest) and self._last != "0-0"):
            for subscription in self._subscribers:
                subscription.put(_gap(self._last, oldest))
        if behind:
            self._last = newest

    async def _read_once(self, connection: AbstractConnection) -> int:
        """Hands out what comes next; how many events."""
        request = pack("XREAD", "COUNT", READ_COUNT, "BLOCK", BLOCK_MS, "STREAMS", self._room.keys.events, self._last)
        await connection.send_packed_command([request], check_health=False)
        async with asyncio.timeout(BLOCK_MS / 1000 + 5):
            reply = await connection.read_response(disable_decoding=True)
        entries = reply[0][1] if reply else ()
        for entry in entries:
            event = _event(entry)
            self._last = event.id
            for subscription in self._subscribers:
                subscription.put(event)
        return len(entries)
