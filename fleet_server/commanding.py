"""The nodes' machines, put together: containers, their logs and changes, programs that callers run there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.enrolling import Enrolment
from fleet_server.rpc.containers import ContainerParts
from fleet_server.services.commands import Commands
from fleet_server.services.container_logs import ContainerLogs
from fleet_server.services.container_news import ContainerNews
from fleet_server.services.containers import Containers
from fleet_server.services.fleet import FleetView
from fleet_server.services.relay import Relay
from fleet_server.services.sessions import Sessions
from fleet_server.services.terminals import Terminals
from fleet_server.store import Store

_DOOR_SECONDS, _DOOR_RETRY_SECONDS = 60.0, 1.0
LOG_ENTRY = fleet_pb2.StreamLogsResponse.DESCRIPTOR.full_name
"""One entry is shared by all who follow the log."""


class Commanding:
    """Makes these parts, runs their loop, and closes them."""

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        commands: Commands,
        tell: Callable[[types_pb2.OperationProgress], None],
    ) -> None:
        self.door: asyncio.Future[str] = asyncio.Future()
        """Where other servers dial this one; to be set once it listens."""
        self._doors = store.doors
        self._commands = commands
        self._replica = ""
        self._relay: Relay | None = None
        self._containers = Containers(fleet, commands, store.replies, tell)
        self._logs = ContainerLogs(commands)
        self._news = ContainerNews(store.events)
        sessions.listen("container", self._news.take)
        self.parts = ContainerParts(self._containers, Terminals(commands), self._logs)

    def relay_by(self, replica: str, enrolment: Enrolment, key: Callable[[], str | None]) -> None:
        """Commands for nodes of other servers go there; `key` is the fleet's, `replica` this server's name."""
        self._replica = replica
        self._relay = Relay(self._doors, enrolment.dial, key)
        self._commands.relay_by(self._relay, replica)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._news.run(), name="container-news")
            tasks.create_task(self._tell_door(), name="door")

    async def _tell_door(self) -> None:
        """Other servers find this one in the store, also after the store was emptied."""
        door = await self.door
        while True:
            pause = _DOOR_SECONDS
            try:
                await self._doors.tell(self._replica, door)
            except FleetError:
                pause = _DOOR_RETRY_SECONDS
            await asyncio.sleep(pause)

    async def aclose(self) -> None:
        """Ends the logs that are followed, waits for the changes under way."""
        await self._logs.aclose()
        if self._relay is not None:
            await self._relay.aclose()
        await self._containers.aclose()
