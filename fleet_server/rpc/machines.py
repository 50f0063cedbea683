"""Calls of fleet.v1.Node by which operators look after machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import node_pb2 as pb
from google.protobuf import json_format

from fleet_server.services.fleet import FleetView
from fleet_server.services.history import History
from fleet_server.services.machines import Machines, not_found
from fleet_server.services.nodes import now_ms
from fleet_server.services.pages import key_of, token_for

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class MachineParts:
    """What these calls work with."""

    machines: Machines
    history: History


class MachineCalls:
    """Every method raises FleetError."""

    _fleet: FleetView
    _parts: MachineParts

    async def ListNodeHeartbeats(
        self, request: pb.ListNodeHeartbeatsRequest, context: Context
    ) -> pb.ListNodeHeartbeatsResponse:
        if self._fleet.node(request.node_id) is None:
            raise not_found(request.node_id)
        beats = self._parts.history.of(request.node_id, now_ms=now_ms(), step_seconds=request.step_seconds)
        after = key_of(request)
        if after is not None:
            since = after[0] if isinstance(after[0], int) else 0
            beats = [beat for beat in beats if beat.heartbeat_time.ToMilliseconds() > since]
        token = ""
        if request.HasField("limit") and len(beats) > request.limit:
            beats = beats[: request.limit]
            token = token_for(request, (beats[-1].heartbeat_time.ToMilliseconds(),))
        return pb.ListNodeHeartbeatsResponse(heartbeats=beats, next_page_token=token)

    async def CordonNode(self, request: pb.CordonNodeRequest, context: Context) -> pb.CordonNodeResponse:
        return pb.CordonNodeResponse(node=await self._parts.machines.cordon(request.node_id))

    async def UncordonNode(self, request: pb.UncordonNodeRequest, context: Context) -> pb.UncordonNodeResponse:
        return pb.UncordonNodeResponse(node=await self._parts.machines.uncordon(request.node_id))

    async def DrainNode(self, request: pb.DrainNodeRequest, context: Context) -> pb.DrainNodeResponse:
        node = await self._parts.machines.drain(
            request.node_id, request.deadline_seconds, containers=request.containers
        )
        return pb.DrainNodeResponse(node=node)

    async def UpdateNode(self, request: pb.UpdateNodeRequest, context: Context) -> pb.UpdateNodeResponse:
        clusters = json_format.MessageToDict(request)["clusters"] if request.HasField("clusters") else None
        labels = json_format.MessageToDict(request.labels) if request.HasField("labels") else None
        node = await self._parts.machines.update(request.node_id, clusters=clusters, labels=labels)
        return pb.UpdateNodeResponse(node=node)

    async def DeleteNode(self, request: pb.DeleteNodeRequest, context: Context) -> pb.DeleteNodeResponse:
        return pb.DeleteNodeResponse(node=await self._parts.machines.delete(request.node_id))
