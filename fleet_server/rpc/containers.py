"""The part of fleet.v1.Fleet that is about containers, their logs, and programs on nodes."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import fleet_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.services.audit import Actor
from fleet_server.services.container_logs import ContainerLogs
from fleet_server.services.containers import Containers
from fleet_server.services.terminals import Terminals

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class ContainerParts:
    """What these calls work with."""

    containers: Containers
    terminals: Terminals
    logs: ContainerLogs


class ContainerCalls:
    """Every method raises FleetError."""

    container_parts: ContainerParts

    async def DeployContainer(
        self, request: fleet_pb2.DeployContainerRequest, context: Context
    ) -> fleet_pb2.DeployContainerResponse:
        actor = _actor(context, idempotency_key(context, request))
        return fleet_pb2.DeployContainerResponse(container=await self.container_parts.containers.deploy(request, actor))

    async def ListContainers(
        self, request: fleet_pb2.ListContainersRequest, context: Context
    ) -> fleet_pb2.ListContainersResponse:
        return await self.container_parts.containers.all(request)

    async def GetContainer(
        self, request: fleet_pb2.GetContainerRequest, context: Context
    ) -> fleet_pb2.GetContainerResponse:
        return fleet_pb2.GetContainerResponse(container=await self.container_parts.containers.get(request))

    async def RemoveContainer(
        self, request: fleet_pb2.RemoveContainerRequest, context: Context
    ) -> fleet_pb2.RemoveContainerResponse:
        removed = await self.container_parts.containers.remove(request, _actor(context))
        return fleet_pb2.RemoveContainerResponse(container=removed)

    async def Exec(self, request: fleet_pb2.ExecRequest, context: Context) -> fleet_pb2.ExecResponse:
        return await self.container_parts.containers.execute(
            request, _actor(context, idempotency_key(context, request))
        )

    async def ExecStream(
        self, request_iterator: AsyncIterator[fleet_pb2.ExecStreamRequest], context: Context
    ) -> AsyncGenerator[fleet_pb2.ExecStreamResponse, None]:
        async with aclosing(self.container_parts.terminals.connect(request_iterator, _actor(context))) as frames:
            async for frame in frames:
                yield frame

    async def GetLogs(self, request: fleet_pb2.GetLogsRequest, context: Context) -> fleet_pb2.GetLogsResponse:
        return await self.container_parts.logs.last(request)

    async def StreamLogs(
        self, request: fleet_pb2.StreamLogsRequest, context: Context
    ) -> AsyncGenerator[fleet_pb2.StreamLogsResponse, None]:
        begun = False

        async def listening() -> None:
            # A quiet log's follower sees at once that it is there.
            if not begun:
                await context.send_initial_metadata(())

        async with aclosing(self.container_parts.logs.stream(request, listening=listening)) as entries:
            async for entry in entries:
                begun = True
                yield entry


def _actor(context: Context, key: str | None = None) -> Actor:
    caller = caller_of(context)
    return Actor(caller.owner, caller.request_id, key)
