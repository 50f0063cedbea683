"""The part of fleet.v1.Fleet that is about swarm services and the registry's images."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import fleet_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.services.audit import Actor, audited
from fleet_server.services.autoscaler import Autoscaler
from fleet_server.services.registry import Registry
from fleet_server.services.swarm import Swarm

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class SwarmParts:
    """What these calls work with."""

    swarm: Swarm
    autoscaler: Autoscaler
    registry: Registry


class SwarmCalls:
    """Every method raises FleetError."""

    swarm_parts: SwarmParts

    async def ListServices(
        self, request: fleet_pb2.ListServicesRequest, context: Context
    ) -> fleet_pb2.ListServicesResponse:
        services, token = await self.swarm_parts.swarm.page(request)
        return fleet_pb2.ListServicesResponse(services=services, next_page_token=token)

    async def GetService(self, request: fleet_pb2.GetServiceRequest, context: Context) -> fleet_pb2.GetServiceResponse:
        return fleet_pb2.GetServiceResponse(service=await self.swarm_parts.swarm.service(request.service_id))

    async def ScaleService(
        self, request: fleet_pb2.ScaleServiceRequest, context: Context
    ) -> fleet_pb2.ScaleServiceResponse:
        service = await self.swarm_parts.swarm.scale(request, _actor(context, request))
        return fleet_pb2.ScaleServiceResponse(service=service)

    async def UpdateService(
        self, request: fleet_pb2.UpdateServiceRequest, context: Context
    ) -> fleet_pb2.UpdateServiceResponse:
        service = await self.swarm_parts.swarm.update(request, _actor(context, request))
        return fleet_pb2.UpdateServiceResponse(service=service)

    async def RollbackService(
        self, request: fleet_pb2.RollbackServiceRequest, context: Context
    ) -> fleet_pb2.RollbackServiceResponse:
        service = await self.swarm_parts.swarm.rollback(request, _actor(context, request))
        return fleet_pb2.RollbackServiceResponse(service=service)

    async def AutoscaleService(
        self, request: fleet_pb2.AutoscaleServiceRequest, context: Context
    ) -> fleet_pb2.AutoscaleServiceResponse:
        caller = caller_of(context)
        with audited(Actor(caller.owner, caller.request_id), "autoscale_service", "", service=request.service_id):
            return fleet_pb2.AutoscaleServiceResponse(service=await self.swarm_parts.autoscaler.set_rule(request))

    async def GetServiceLogs(
        self, request: fleet_pb2.GetServiceLogsRequest, context: Context
    ) -> fleet_pb2.GetServiceLogsResponse:
        lines = await self.swarm_parts.swarm.log(request)
        return fleet_pb2.GetServiceLogsResponse(service_id=request.service_id, lines=lines)

    async def StreamServiceLogs(
        self, request: fleet_pb2.StreamServiceLogsRequest, context: Context
    ) -> AsyncGenerator[fleet_pb2.StreamServiceLogsResponse, None]:
        async with aclosing(self.swarm_parts.swarm.follow(request)) as lines:
            async for line in lines:
                yield fleet_pb2.StreamServiceLogsResponse(line=line)

    async def ListImages(self, request: fleet_pb2.ListImagesRequest, context: Context) -> fleet_pb2.ListImagesResponse:
        images, token = await self.swarm_parts.registry.images(request)
        return fleet_pb2.ListImagesResponse(images=images, next_page_token=token)


def _actor(context: Context, request: Any) -> Actor:
    """Who changes something. Raises INVALID_FIELD for a bad idempotency key."""
    caller = caller_of(context)
    return Actor(caller.owner, caller.request_id, idempotency_key(context, request))
