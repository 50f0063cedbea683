"""The nodes' machines, put together: containers, their logs and changes, programs that callers run there."""

from __future__ import annotations

from collections.abc import Callable

from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.rpc.containers import ContainerParts
from fleet_server.services.commands import Commands
from fleet_server.services.container_logs import ContainerLogs
from fleet_server.services.container_news import ContainerNews
from fleet_server.services.containers import Containers
from fleet_server.services.fleet import FleetView
from fleet_server.services.sessions import Sessions
from fleet_server.services.terminals import Terminals
from fleet_server.store import Store

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
        self._containers = Containers(fleet, commands, store.replies, tell)
        self._logs = ContainerLogs(commands)
        self._news = ContainerNews(store.events)
        sessions.listen("container", self._news.take)
        self.parts = ContainerParts(self._containers, Terminals(commands), self._logs)

    async def run(self) -> None:
        """Until cancelled."""
        await self._news.run()

    async def aclose(self) -> None:
        """Ends the logs that are followed, waits for the changes under way."""
        await self._logs.aclose()
        await self._containers.aclose()
