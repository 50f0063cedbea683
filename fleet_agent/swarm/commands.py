"""The server's commands about swarm services."""

from __future__ import annotations

from contextlib import aclosing

from fleet.v1 import command_pb2, types_pb2

from fleet_agent.commands import CommandChannel, CommandDesk
from fleet_agent.swarm.logs import ServiceLogs
from fleet_agent.swarm.manager import SwarmManager


class SwarmCommands:
    """Handlers of the commands that name swarm services. Each raises CommandFault as SwarmManager does."""

    def __init__(self, manager: SwarmManager, logs: ServiceLogs) -> None:
        self._manager = manager
        self._logs = logs

    def register(self, desk: CommandDesk) -> None:
        """Makes them answer their commands."""
        desk.register("list_services", self._list)
        desk.register("get_service", self._get)
        desk.register("scale_service", self._scale)
        desk.register("update_service", self._update)
        desk.register("rollback_service", self._rollback)
        desk.register("service_logs", self._follow)

    async def _list(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        services = await self._manager.services()
        return command_pb2.CommandEnd(services=command_pb2.SwarmServices(services=services))

    async def _get(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        return _named(await self._manager.service(command.get_service.service_id))

    async def _scale(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        asked = command.scale_service
        return _named(await self._manager.scale(asked.service_id, asked.replicas))

    async def _update(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        asked = command.update_service
        auth = asked.registry_auth if asked.HasField("registry_auth") else None
        return _named(await self._manager.update(asked.service_id, asked.image, auth))

    async def _rollback(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        return _named(await self._manager.rollback(command.rollback_service.service_id))

    async def _follow(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        async with aclosing(self._logs.lines(command.service_logs)) as lines:
            async for line in lines:
                await channel.line(line)
        return command_pb2.CommandEnd()


def _named(service: types_pb2.SwarmService) -> command_pb2.CommandEnd:
    return command_pb2.CommandEnd(service=service)
