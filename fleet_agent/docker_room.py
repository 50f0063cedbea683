"""What this node does through its Docker engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from fleet.v1 import node_pb2, types_pb2

from fleet_agent.commands import CommandDesk
from fleet_agent.docker_engine import DockerEngine, EngineFacts
from fleet_agent.settings import AgentSettings
from fleet_agent.swarm.commands import SwarmCommands
from fleet_agent.swarm.logs import ServiceLogs
from fleet_agent.swarm.manager import SwarmManager
from fleet_agent.swarm.watch import SwarmWatch

_FIRST_LOOK_SECONDS = 2.0
Say = Callable[[node_pb2.AgentMessage], bool]


class DockerRoom:
    """`open`, then `run` beside the session, `close` in the end. Without a Docker engine its commands say so."""

    def __init__(self, settings: AgentSettings, desk: CommandDesk) -> None:
        self.engine = DockerEngine(settings.docker_host, threads=settings.docker_threads)
        self._say: Say = lambda _: False
        swarm = SwarmManager(self.engine)
        SwarmCommands(swarm, ServiceLogs(self.engine, swarm, poll_seconds=settings.docker_seconds)).register(desk)
        self._watch = SwarmWatch(self.engine, swarm, self._service_changed, seconds=settings.docker_seconds)

    @property
    def facts(self) -> EngineFacts:
        """What the engine said of itself lately."""
        return self.engine.facts

    def report_by(self, say: Say) -> None:
        """`say` queues a message for the server; false where none is connected. Without it nobody is told."""
        self._say = say

    async def open(self) -> None:
        """Looks at the engine, so that the first Hello can tell of it; an engine that hangs is not waited for."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_SECONDS):
                await self.engine.look()

    async def run(self) -> None:
        """Looks on until cancelled."""
        await self._watch.run()

    def welcomed(self) -> None:
        """A new session: the server is told all anew."""
        self._watch.told_nothing()

    async def close(self) -> None:
        """Ends the connections."""
        await self.engine.close()

    def _service_changed(self, service: types_pb2.SwarmService) -> bool:
        return self._say(node_pb2.AgentMessage(service=service))
