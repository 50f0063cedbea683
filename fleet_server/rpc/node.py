"""fleet.v1.Node: machines for callers, the stream and the uploads for agents."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

import grpc
from fleet.v1 import command_pb2
from fleet.v1 import node_pb2 as pb

from fleet_server.domain.errors import FleetError
from fleet_server.domain.node import NodeView
from fleet_server.rpc.caller import caller_of
from fleet_server.rpc.machines import MachineCalls, MachineParts
from fleet_server.rpc.outputs import FileCalls
from fleet_server.services.commands import Commands
from fleet_server.services.file_reader import FileReader
from fleet_server.services.fleet import FleetView
from fleet_server.services.nodes import status_number
from fleet_server.services.pages import page_by_name
from fleet_server.services.relay_door import RelayDoor
from fleet_server.services.sessions import Sessions
from fleet_server.services.uploads import Uploads
from fleet_server.services.words import type_word

Context = grpc.aio.ServicerContext[Any, Any]


class NodeServicer(MachineCalls, FileCalls):
    """The machines. Every method raises FleetError."""

    def __init__(
        self,
        fleet: FleetView,
        sessions: Sessions,
        uploads: Uploads,
        commands: Commands,
        parts: MachineParts,
        reader: FileReader,
    ) -> None:
        self._fleet = fleet
        self._parts = parts
        self._sessions = sessions
        self._uploads = uploads
        self._commands = commands
        self._reader = reader

    async def ListNodes(self, request: pb.NodeListNodesRequest, context: Context) -> pb.NodeListNodesResponse:
        found = self._matching(request, statuses=request.status)
        if request.HasField("job_type"):
            found = [view for view in found if type_word(request.job_type) in view.job_types]
        page, token = page_by_name(request, found, lambda view: (view.node_id,))
        infos = [info for view in page if (info := self._fleet.info(view.node_id)) is not None]
        return pb.NodeListNodesResponse(nodes=infos, next_page_token=token)

    async def GetNode(self, request: pb.GetNodeRequest, context: Context) -> pb.GetNodeResponse:
        info = self._fleet.info(request.node_id)
        if info is None:
            raise FleetError("NODE_NOT_FOUND", f"node_id: there is no node {request.node_id!r}; see GET /api/nodes")
        return pb.GetNodeResponse(node=info)

    async def ListHeartbeats(self, request: pb.ListHeartbeatsRequest, context: Context) -> pb.ListHeartbeatsResponse:
        found = [beat for view in self._matching(request) if (beat := self._fleet.heartbeat(view.node_id)) is not None]
        page, token = page_by_name(request, found, lambda beat: (beat.node_id,))
        return pb.ListHeartbeatsResponse(heartbeats=page, next_page_token=token)

    async def Connect(
        self, request_iterator: AsyncIterator[pb.AgentMessage], context: Context
    ) -> AsyncGenerator[pb.ServerMessage, None]:
        async with aclosing(
            self._sessions.connect(request_iterator, context, only=caller_of(context).node_id)
        ) as messages:
            async for message in messages:
                yield message

    async def UploadOutput(
        self, request_iterator: AsyncIterator[pb.UploadOutputRequest], context: Context
    ) -> pb.UploadOutputResponse:
        return pb.UploadOutputResponse(
            receipt=await self._uploads.receive(request_iterator, only=caller_of(context).node_id)
        )

    async def ServeCommand(
        self, request_iterator: AsyncIterator[command_pb2.ServeCommandRequest], context: Context
    ) -> AsyncGenerator[command_pb2.ServeCommandResponse, None]:
        async with aclosing(
            self._commands.serve(request_iterator, context, only=caller_of(context).node_id)
        ) as answers:
            async for answer in answers:
                yield answer

    async def RelayCommand(
        self, request_iterator: AsyncIterator[command_pb2.RelayCommandRequest], context: Context
    ) -> AsyncGenerator[command_pb2.RelayCommandResponse, None]:
        async with aclosing(RelayDoor(self._commands).serve(request_iterator)) as parts:
            async for part in parts:
                yield part

    def _matching(
        self, request: pb.NodeListNodesRequest | pb.ListHeartbeatsRequest, statuses: Iterable[int] = ()
    ) -> list[NodeView]:
        wanted = set(statuses)
        return [
            view
            for view in self._fleet.nodes()
            if (not request.HasField("cluster") or request.cluster in view.clusters)
            and (not wanted or status_number(view.status) in wanted)
        ]
