"""What this node does through its Docker engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fleet.v1 import node_pb2, types_pb2

from fleet_agent.commands import CommandDesk
from fleet_agent.containers.commands import ContainerCommands
from fleet_agent.containers.containers import ContainerLimits, Containers
from fleet_agent.containers.image_roots import ImagePolicy
from fleet_agent.containers.logs import ContainerLogs
from fleet_agent.containers.mounts import MountPolicy
from fleet_agent.containers.watch import ContainerWatch
from fleet_agent.docker_engine import DockerEngine, EngineFacts
from fleet_agent.settings import AgentSettings
from fleet_agent.shell.commands import ShellCommands
from fleet_agent.swarm.commands import SwarmCommands
from fleet_agent.swarm.logs import ServiceLogs
from fleet_agent.swarm.manager import SwarmManager
from fleet_agent.swarm.watch import SwarmWatch

_FIRST_LOOK_SECONDS = 2.0
Say = Callable[[node_pb2.AgentMessage], bool]


class DockerRoom:
    """`open`, then `run` beside the session, `close` in the end. Without a Docker engine its commands say so.

    `place` says where the engine is, where its socket's path would not.
    """

    def __init__(
        self, settings: AgentSettings, desk: CommandDesk, policy: MountPolicy | None = None, place: str = ""
    ) -> None:
        self.engine = DockerEngine(settings.docker_host, threads=settings.docker_threads, place=place)
        self._say: Say = lambda _: False
        images = ImagePolicy(settings.image_roots)
        swarm = SwarmManager(self.engine, images)
        SwarmCommands(swarm, ServiceLogs(self.engine, swarm, poll_seconds=settings.docker_seconds)).register(desk)
        # Who has the agent's folder has its keys; who has the engine's socket has the machine.
        policy = policy or MountPolicy(settings.mount_roots, [settings.data_dir, *_sockets(self.engine.url)])
        limits = ContainerLimits(pids=settings.container_pids, images=images)
        self._containers = Containers(settings.node_id, self.engine, policy, limits)
        logs = ContainerLogs(self.engine, self._containers)
        ShellCommands(settings.node_id, self.engine).register(desk)
        self._container_watch = ContainerWatch(
            self.engine, self._containers, self._container_changed, seconds=settings.docker_seconds
        )
        ContainerCommands(settings.node_id, self._containers, logs, self._container_watch.look).register(desk)
        self._watch = SwarmWatch(self.engine, swarm, self._service_changed, seconds=settings.docker_seconds)

    @property
    def facts(self) -> EngineFacts:
        """What the engine said of itself lately, and how many containers of the fleet run there or are on their way."""
        count = self._container_watch.running + self._containers.deploying.total()
        return replace(self.engine.facts, managed_containers=count)

    def report_by(self, say: Say) -> None:
        """`say` queues a message for the server; false where none is connected. Without it nobody is told."""
        self._say = say

    async def open(self, unfinished: Sequence[str] = ()) -> None:
        """Looks at the engine, so that the first Hello can tell of it; an engine that hangs is not waited for.

        `unfinished` are the ids of commands that a crash cut short: what they left half-done is removed.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FIRST_LOOK_SECONDS):
                await self.engine.look()
                await self._containers.tidy(unfinished)
                await self._container_watch.look()

    async def run(self) -> None:
        """Looks on until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch.run(), name="swarm-watch")
            group.create_task(self._container_watch.run(), name="container-watch")

    def welcomed(self) -> None:
        """A new session: the server is told all anew."""
        self._watch.told_nothing()

    async def close(self) -> None:
        """Ends the connections."""
        await self.engine.close()

    def _container_changed(self, container: types_pb2.Container) -> bool:
        return self._say(node_pb2.AgentMessage(container=container))

    def _service_changed(self, service: types_pb2.SwarmService) -> bool:
        return self._say(node_pb2.AgentMessage(service=service))


def _sockets(url: str) -> list[Path]:
    scheme, _, path = url.partition("://")
    return [Path(path)] if scheme in ("unix", "http+unix") else []
