"""fleet.v1.Fleet."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from fleet.v1 import fleet_pb2, types_pb2
from google.api import httpbody_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.rpc.containers import ContainerCalls
from fleet_server.rpc.outputs import OutputCalls, OutputParts
from fleet_server.rpc.swarm import SwarmCalls
from fleet_server.services.events import EventHub
from fleet_server.services.generation import Generated, Generation
from fleet_server.services.mailbox import EventFilter
from fleet_server.services.status import CAPABILITIES, CONNECTED, StatusBoard

Context = grpc.aio.ServicerContext[Any, Any]
CheckKey = Callable[[str | None, Context], None]
_ID_CHARACTERS = 128
INLINE_BYTES = 3 << 20
"""A picture up to this size rides in a gRPC reply, whose size clients limit to 4 MiB by default."""


class FleetServicer(ContainerCalls, OutputCalls, SwarmCalls):
    """The fleet as a whole. Every method raises FleetError.

    `check_key(key in the body, context)` returns if a caller of Connect may connect, else raises FleetError.
    """

    def __init__(
        self,
        board: StatusBoard,
        generation: Generation,
        hub: EventHub,
        check_key: CheckKey,
        outputs: OutputParts,
    ) -> None:
        self._board = board
        self._generation = generation
        self._hub = hub
        self._check_key = check_key
        self._outputs = outputs

    async def GetHealth(self, request: fleet_pb2.GetHealthRequest, context: Context) -> fleet_pb2.GetHealthResponse:
        await self._board.check_health()
        return fleet_pb2.GetHealthResponse(status="ok", version=self._board.settings.version)

    async def Connect(self, request: fleet_pb2.FleetConnectRequest, context: Context) -> fleet_pb2.FleetConnectResponse:
        self._check_key(request.api_key if request.HasField("api_key") else None, context)
        return fleet_pb2.FleetConnectResponse(
            status="connected", message=CONNECTED, version=self._board.settings.version, capabilities=CAPABILITIES
        )

    async def GetConnection(
        self, request: fleet_pb2.GetConnectionRequest, context: Context
    ) -> fleet_pb2.GetConnectionResponse:
        return fleet_pb2.GetConnectionResponse(
            status="connected", message=CONNECTED, version=self._board.settings.version, capabilities=CAPABILITIES
        )

    async def GetStatus(self, request: fleet_pb2.GetStatusRequest, context: Context) -> fleet_pb2.GetStatusResponse:
        return await self._board.status()

    async def GetCapabilities(
        self, request: fleet_pb2.GetCapabilitiesRequest, context: Context
    ) -> fleet_pb2.GetCapabilitiesResponse:
        return self._board.capabilities()

    async def Generate(
        self, request: fleet_pb2.FleetGenerateRequest, context: Context
    ) -> fleet_pb2.FleetGenerateResponse:
        key = idempotency_key(context, request)
        caller = caller_of(context)
        made = await self._generation.generate(request, owner=caller.owner, key=key)
        await context.send_initial_metadata(_headers(made))
        inline = caller.transport == "rest" or len(made.data) <= INLINE_BYTES
        return fleet_pb2.FleetGenerateResponse(
            image=httpbody_pb2.HttpBody(content_type=made.content_type, data=made.data if inline else b""),
            seed=made.seed,
            filename=made.filename,
            job_id=made.job_id,
            resolved_model=made.resolved_model,
            size_bytes=len(made.data),
        )

    async def GetGenerateStatus(
        self, request: fleet_pb2.GetGenerateStatusRequest, context: Context
    ) -> fleet_pb2.GetGenerateStatusResponse:
        return await self._generation.status()

    async def WatchEvents(
        self, request: fleet_pb2.WatchEventsRequest, context: Context
    ) -> AsyncGenerator[types_pb2.Event, None]:
        def given(name: str) -> str | None:
            return getattr(request, name) if request.HasField(name) else None  # type: ignore[arg-type]

        # A browser that reconnects sends the header beside the query with which it came first: the header is newer.
        since = caller_of(context).metadata.get("last-event-id", "")[:_ID_CHARACTERS] or given("since")
        wanted = EventFilter(
            kinds=frozenset(request.type),
            job_id=given("job_id"),
            node_id=given("node_id"),
            service_id=given("service_id"),
            cluster=given("target_cluster"),
            previews=request.previews,
            since=since,
        )

        async def listening() -> None:
            # A quiet stream's client sees at once that it is there.
            await context.send_initial_metadata(())

        async with aclosing(self._hub.watch(wanted, listening=listening)) as events:
            async for event in events:
                yield event


def _headers(made: Generated) -> tuple[tuple[str, str], ...]:
    sent = [
        ("x-seed", str(made.seed)),
        ("x-filename", made.filename),
        ("x-job-id", made.job_id),
        ("content-disposition", f'inline; filename="{made.filename}"'),
    ]
    if made.resolved_model is not None:
        sent.append(("x-resolved-model", made.resolved_model))
    return tuple(sent)
