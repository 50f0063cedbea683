"""Calls of fleet.v1.Node by which operators look after machines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import node_pb2 as pb
from google.protobuf import json_format

from fleet_server.domain.errors import Code, FleetError
from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.services.fleet import FleetView
from fleet_server.services.history import History
from fleet_server.services.joins import Joins
from fleet_server.services.machines import Machines, check_name, not_found
from fleet_server.services.nodes import now_ms, set_time
from fleet_server.services.pages import key_of, token_for
from fleet_server.services.refusals import forbidden
from fleet_server.services.rights import NodeRights
from fleet_server.store import Idempotency, ReplyStore

Context = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class MachineParts:
    """What these calls work with."""

    machines: Machines
    history: History
    replies: ReplyStore
    rights: NodeRights
    joins: Joins | None
    """None where agents need no certificates: on a loopback bind."""


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

    async def CreateNode(self, request: pb.CreateNodeRequest, context: Context) -> pb.CreateNodeResponse:
        node = await self._parts.machines.add_ssh(
            request.node_id,
            address=request.address,
            port=request.port,
            user=request.user,
            host_key=request.host_key,
            clusters=request.clusters,
            labels=request.labels,
        )
        return pb.CreateNodeResponse(node=node)

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

    async def CreateJoinToken(self, request: pb.CreateJoinTokenRequest, context: Context) -> pb.CreateJoinTokenResponse:
        joins = self._joins()
        key = idempotency_key(context, request)

        async def work(operation: str) -> bytes:
            made = await joins.token()
            reply = pb.CreateJoinTokenResponse(token=made.token, ca_sha256=made.ca_sha256)
            set_time(reply.expire_time, made.expire_ms)
            return reply.SerializeToString()

        if key is None:
            return pb.CreateJoinTokenResponse.FromString(await work(""))
        once = Idempotency(caller_of(context).owner, "Node/CreateJoinToken", key, "")
        return pb.CreateJoinTokenResponse.FromString(await self._parts.replies.once(once, work))

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinResponse:
        check_name(request.node_id)
        joins = self._joins()
        issued = await joins.join(request.secret, request.node_id, request.certificate_request)
        reply = pb.JoinResponse(certificate=issued.pem, agents_port=joins.agents_port)
        reply.expire_time.FromDatetime(issued.expires)
        return reply

    async def RenewCertificate(
        self, request: pb.RenewCertificateRequest, context: Context
    ) -> pb.RenewCertificateResponse:
        caller = caller_of(context)
        if not caller.node_id:
            raise forbidden("only a node's own certificate can be renewed: join with a token first")
        issued = await self._joins().renew(caller.node_id, caller.identity, request.certificate_request)
        reply = pb.RenewCertificateResponse(certificate=issued.pem)
        reply.expire_time.FromDatetime(issued.expires)
        return reply

    def _joins(self) -> Joins:
        joins = self._parts.joins
        if joins is None:
            raise FleetError(
                "TLS_OFF",
                "this server listens on loopback, where agents need no token: start it with --lan, or with FLEET_TLS=1",
                code=Code.FAILED_PRECONDITION,
            )
        return joins
