"""The server's commands about containers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import aclosing

import structlog
from fleet.v1 import command_pb2, types_pb2

from fleet_agent.commands import CommandChannel, CommandDesk
from fleet_agent.containers.containers import Containers
from fleet_agent.containers.logs import ContainerLogs

_log = structlog.get_logger("fleet.agent.audit")
_GRACE_SECONDS = 10


class ContainerCommands:
    """Handlers of the commands that name containers. Each raises CommandFault as Containers does.

    `look` counts the node's containers anew: one that was started counts as on its way until it counts as running.
    """

    def __init__(
        self, node_id: str, containers: Containers, logs: ContainerLogs, look: Callable[[], Awaitable[None]]
    ) -> None:
        self._node_id = node_id
        self._containers = containers
        self._logs = logs
        self._look = look

    def register(self, desk: CommandDesk) -> None:
        """Makes them answer their commands."""
        desk.register("deploy", self._deploy)
        desk.register("remove", self._remove)
        desk.register("list_containers", self._list)
        desk.register("get_container", self._get)
        desk.register("logs", self._follow)

    async def _deploy(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        request = command.deploy
        _log.info("audit", verb="deploy", command_id=command.command_id, name=request.name, image=request.image)

        async def tell(done: int, total: int, words: str) -> None:
            # 100 is the end, which a pull is not: the container is still to be started.
            percent = min(99, 100 * done // total) if total else 0
            progress = self._progress(request.name, percent, words)
            progress.done_bytes, progress.total_bytes = done, total
            await channel.progress(progress)

        with self._containers.on_its_way(request.name):
            container = await self._containers.deploy(request, command.command_id, tell)
            await self._look()
        await channel.progress(self._progress(request.name, 100, "running"))
        return command_pb2.CommandEnd(container=container)

    def _progress(self, name: str, percent: int, words: str) -> types_pb2.OperationProgress:
        return types_pb2.OperationProgress(
            operation="deploy", node_id=self._node_id, name=name, progress=percent, message=words
        )

    async def _remove(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        request = command.remove
        _log.info("audit", verb="remove", command_id=command.command_id, name=request.container_name)
        grace = request.stop_grace_seconds if request.HasField("stop_grace_seconds") else _GRACE_SECONDS
        return command_pb2.CommandEnd(container=await self._containers.remove(request.container_name, grace))

    async def _list(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        found = await self._containers.all()
        return command_pb2.CommandEnd(containers=command_pb2.Containers(containers=found))

    async def _get(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        return command_pb2.CommandEnd(container=await self._containers.get(command.get_container.container_name))

    async def _follow(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        end = command_pb2.CommandEnd()
        async with aclosing(self._logs.entries(command.logs)) as entries:
            async for entry in entries:
                if isinstance(entry, types_pb2.Exit):
                    end.exit.CopyFrom(entry)
                else:
                    await channel.line(entry)
        return end
