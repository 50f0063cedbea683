"""Commands for nodes whose streams other servers hold: one step, to the server that holds the stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from fleet.v1 import command_pb2, node_pb2_grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from fleet_server.domain.errors import REASON_CODES, Code, FleetError
from fleet_server.services.exchange import ServedCall
from fleet_server.store import DoorStore

Dial = Callable[[str], grpc.aio.Channel]
Request = command_pb2.RelayCommandRequest
_DETAILS_KEY = "grpc-status-details-bin"
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 17_825_792),
    ("grpc.use_local_subchannel_pool", 1),
)


class Relay:
    """Calls to other servers, one channel for each. `dial` makes a channel, `key` gives the fleet's key, if any."""

    def __init__(self, doors: DoorStore, dial: Dial, key: Callable[[], str | None]) -> None:
        self._doors = doors
        self._dial = dial
        self._key = key
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def aclose(self) -> None:
        """Ends the channels."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()

    @asynccontextmanager
    async def call(
        self, replica: str, node_id: str, command: command_pb2.Command, *, attended: bool
    ) -> AsyncGenerator[ServedCall, None]:
        """The command's answers, as the other server gives them on. Leaving ends the call.

        `parts` ends without an end where the other server was lost. Raises NODE_OFFLINE where it cannot be reached, and
        what it answers.
        """
        door = await self._doors.find(replica)
        if door is None:
            raise lost_server(node_id)
        channel = self._channels.get(door)
        if channel is None:
            channel = self._channels[door] = self._dial(door)
        # stubs of the sync and the aio API share one class; the aio channel makes this an aio call
        key = self._key()
        metadata = (("x-api-key", key),) if key else ()
        call: Any = node_pb2_grpc.NodeStub(channel).RelayCommand(metadata=metadata)
        served = ServedCall()
        head = command_pb2.RelayHead(node_id=node_id, command=command, attended=attended)
        tasks = [
            asyncio.create_task(_read(call, served, node_id), name="relay-parts"),
            asyncio.create_task(_write(call, served, head), name="relay-answers"),
        ]
        try:
            yield served
        finally:
            served.leave()
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _read(call: Any, served: ServedCall, node_id: str) -> None:
    try:
        while (message := await call.read()) is not grpc.aio.EOF:
            if not await served.parts.put(message.part):
                return
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            served.error = _error(code, await call.details(), await call.trailing_metadata(), node_id)
    except grpc.aio.AioRpcError as error:
        served.error = _error(error.code(), error.details() or "", error.trailing_metadata(), node_id)
    except (asyncio.InvalidStateError, grpc.aio.UsageError):
        served.error = lost_server(node_id)
    finally:
        served.parts.end()


async def _write(call: Any, served: ServedCall, head: command_pb2.RelayHead) -> None:
    try:
        await call.write(Request(head=head))
        while (answer := await served.answers.get()) is not None:
            await call.write(Request(answer=answer))
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
        served.answers.close()


def lost_server(node_id: str) -> FleetError:
    """The server that holds the node's stream cannot be asked."""
    return FleetError(
        "NODE_OFFLINE",
        f"node_id: the server that {node_id!r} is connected to cannot be reached from here: set FLEET_ADVERTISE there",
    )


def _error(code: grpc.StatusCode, details: str, trailers: Any, node_id: str) -> FleetError:
    for key, value in trailers or ():
        if key != _DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
        except DecodeError:
            break
        info = error_details_pb2.ErrorInfo()
        for detail in status.details:
            if detail.Unpack(info):
                known = REASON_CODES.get(info.reason)
                return FleetError(info.reason, details, code=None if known is not None else Code[code.name])
    # No server of ours speaks so: the connection failed.
    return lost_server(node_id)


async def served_requests(
    requests: AsyncIterator[Request],
) -> AsyncIterator[command_pb2.ServeCommandResponse]:
    """The answers of a relayed command, after its head."""
    async for request in requests:
        if request.HasField("answer"):
            yield request.answer
