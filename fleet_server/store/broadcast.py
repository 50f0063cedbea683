"""What replicas tell each other and nobody keeps: one channel of the store, at most once, in order."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from redis.asyncio.connection import AbstractConnection

from fleet_server.store._room import Room
from fleet_server.store.client import FIRST_BACKOFF_SECONDS, LAST_BACKOFF_SECONDS, connect, pack

QUIET_SECONDS = 15.0
"""A channel that is quiet for so long is asked whether it is still there; where no answer comes for as long again, it
is dialled anew."""

log = logging.getLogger(__name__)


class Broadcast:
    """The channel `broadcast`. What is said while a replica is not connected is lost to it."""

    def __init__(
        self, room: Room, url: str, *, quiet_seconds: float = QUIET_SECONDS, answer_seconds: float = QUIET_SECONDS
    ) -> None:
        self._room = room
        self._url = url
        self._quiet = quiet_seconds
        self._answer = answer_seconds

    async def publish(self, message: bytes) -> None:
        """Says it to all who listen, this replica included. Raises STORE_UNAVAILABLE."""
        await self._room.bulk.call("PUBLISH", self._room.keys.broadcast, message)

    async def listeners(self) -> int:
        """How many replicas listen, this one included. Raises STORE_UNAVAILABLE."""
        _, count = await self._room.bulk.call("PUBSUB", "NUMSUB", self._room.keys.broadcast)
        return int(count)

    async def listen(self, heard: Callable[[bytes], None]) -> None:
        """Calls `heard` for each message, until cancelled; it must not wait. Connects again after every loss."""
        backoff = FIRST_BACKOFF_SECONDS
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await connect(self._url, name="fleet-broadcast")
                await self._send(connection, "SUBSCRIBE", self._room.keys.broadcast)
                while True:
                    message = await self._next(connection)
                    backoff = FIRST_BACKOFF_SECONDS
                    if message is not None:
                        heard(message)
            except Exception as error:  # the listener must outlive whatever ends its connection
                log.warning("other replicas are not heard: %s", error)
                await asyncio.sleep(backoff * random.uniform(0.5, 1.0))
                backoff = min(backoff * 2, LAST_BACKOFF_SECONDS)
            finally:
                if connection is not None:
                    await connection.disconnect(nowait=True)

    async def _next(self, connection: AbstractConnection) -> bytes | None:
        """What comes next; None for the channel's own words."""
        reading = asyncio.ensure_future(connection.read_response(disable_decoding=True))
        try:
            done, _ = await asyncio.wait({reading}, timeout=self._quiet)
            if not done:
                await self._send(connection, "PING")
            async with asyncio.timeout(self._answer):
                reply: Any = await reading
        finally:
            reading.cancel()
        return bytes(reply[2]) if reply[0] == b"message" else None

    @staticmethod
    async def _send(connection: AbstractConnection, *args: str) -> None:
        await connection.send_packed_command([pack(*args)], check_health=False)
