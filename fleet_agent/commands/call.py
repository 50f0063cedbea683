"""The agent's call that answers one command."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from fleet.v1 import command_pb2, node_pb2_grpc

from fleet_agent.upload import Metadata

BEGIN_KEY = "fleet-begin"
"""Initial metadata by which the server says that somebody waits for the command."""


class CallOverError(Exception):
    """The server has ended the call, or it was lost: nobody hears its answers."""


class CommandCall:
    """One ServeCommand. `over` is set when it has ended, from whichever side."""

    def __init__(self, call: Any) -> None:
        # stubs of the sync and the aio API share one class; the aio channel makes this an aio call
        self._call = call
        self._lock = asyncio.Lock()
        self._reading: asyncio.Future[Any] | None = None
        self.over = asyncio.Event()
        loop = asyncio.get_running_loop()
        call.add_done_callback(lambda _: loop.call_soon_threadsafe(self.over.set))

    async def write(self, part: command_pb2.ServeCommandRequest) -> None:
        """Sends one part; waits while the server takes none. Raises CallOverError."""
        async with self._lock:
            try:
                await self._call.write(part)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError) as error:
                raise CallOverError from error

    async def read(self) -> command_pb2.ServeCommandResponse | None:
        """What the server says next; None after its last word. Who is cancelled meanwhile loses nothing."""
        if self._reading is None:
            self._reading = asyncio.ensure_future(self._call.read())
        try:
            # A cancelled read would cancel the whole call.
            message = await asyncio.shield(self._reading)
        except asyncio.CancelledError:
            if self._reading.cancelled():
                return None
            raise
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return None
        self._reading = None
        return None if message is grpc.aio.EOF else message

    async def finish(self, end: command_pb2.CommandEnd, seconds: float) -> None:
        """Says the end, and waits until the server has ended the call. Raises CallOverError."""
        await self.write(command_pb2.ServeCommandRequest(end=end))
        try:
            async with asyncio.timeout(seconds):
                while await self.read() is not None:
                    pass
        except TimeoutError:
            raise CallOverError from None

    def cancel(self) -> None:
        """Ends it from this side."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()


class CommandRoad:
    """Makes the calls of a session, on a channel of their own that is connected when first used."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata) -> None:
        self._stub = node_pb2_grpc.NodeStub(channel)
        self._metadata = metadata

    async def begin(self, session: str, command_id: str) -> CommandCall:
        """A call for the command. Raises CallOverError where nobody waits for it, or the server is not reached."""
        call: Any = self._stub.ServeCommand(metadata=self._metadata)
        try:
            head = command_pb2.CommandHead(session=session, command_id=command_id)
            await call.write(command_pb2.ServeCommandRequest(head=head))
            if BEGIN_KEY not in dict(await call.initial_metadata()):
                raise CallOverError
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise CallOverError from error
        except BaseException:
            call.cancel()
            raise
        return CommandCall(call)
