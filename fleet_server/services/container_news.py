"""Changes of containers, from the nodes to whoever listens."""

from __future__ import annotations

import asyncio
from collections import deque

import structlog
from fleet.v1 import node_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.store import EventStore

_log = structlog.get_logger("fleet.containers")


class ContainerNews:
    """`take` what agents say; `run` writes it down as container_update events, in order.

    At most `most` wait while the store is away; the oldest are lost then.
    """

    def __init__(self, events: EventStore, *, most: int = 10_000, retry_seconds: float = 1.0) -> None:
        self._events = events
        self._retry_seconds = retry_seconds
        self._waiting: deque[types_pb2.Container] = deque(maxlen=most)
        self._some = asyncio.Event()

    def take(self, node_id: str, message: node_pb2.AgentMessage) -> None:
        """A node says how a container is. Never waits."""
        container = types_pb2.Container()
        container.CopyFrom(message.container)
        container.node_id = node_id
        container.ClearField("stats")
        self._waiting.append(container)
        self._some.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                try:
                    await self._events.publish("container_update", {"message": self._waiting[0].SerializeToString()})
                except FleetError as error:
                    _log.warning("changes of containers are not told yet", detail=error.detail)
                    await asyncio.sleep(self._retry_seconds)
                    continue
                self._waiting.popleft()
