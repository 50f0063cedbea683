"""Changes of swarm services, from the nodes that manage the swarm to whoever listens."""

from __future__ import annotations

import asyncio
import hashlib

import structlog
from fleet.v1 import node_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.swarm import Swarm
from fleet_server.store import SwarmStore

_log = structlog.get_logger("fleet.swarm")


class SwarmNews:
    """`take` what agents say; `run` writes it down as service_update events, each change once.

    Bounded: of each service the latest waits, of at most `most` services.
    """

    def __init__(self, swarm: Swarm, store: SwarmStore, *, most: int = 10_000, retry_seconds: float = 1.0) -> None:
        self._swarm = swarm
        self._store = store
        self._most = most
        self._retry_seconds = retry_seconds
        self._waiting: dict[str, types_pb2.SwarmService] = {}
        self._some = asyncio.Event()

    def take(self, node_id: str, message: node_pb2.AgentMessage) -> None:
        """A node says how a service is. Never waits."""
        service = message.service
        if service.service_id in self._waiting or len(self._waiting) < self._most:
            kept = types_pb2.SwarmService()
            kept.CopyFrom(service)
            self._waiting[service.service_id] = kept
            self._some.set()

    async def tell(self, service: types_pb2.SwarmService) -> None:
        """Writes the event, unless it is what was told last. The service is complete. Raises STORE_UNAVAILABLE."""
        content = service.SerializeToString(deterministic=True)
        await self._store.tell(service.service_id, service.version, hashlib.sha256(content).hexdigest()[:32], content)

    async def run(self) -> None:
        """Until cancelled; while the store is away, the latest of each service waits."""
        while True:
            await self._some.wait()
            self._some.clear()
            services, self._waiting = self._waiting, {}
            try:
                for service in await self._swarm.completed(list(services.values())):
                    await self.tell(service)
                    del services[service.service_id]
            except FleetError as error:
                _log.warning("changes of services are not told yet", detail=error.detail)
                # What came meanwhile is newer.
                self._waiting = services | self._waiting
                self._some.set()
                await asyncio.sleep(self._retry_seconds)
