"""The door for commands that other servers of the fleet send on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from fleet.v1 import command_pb2, types_pb2

from fleet_server.domain.errors import invalid_field
from fleet_server.services.commands import Commands, CommandStream

Response = command_pb2.RelayCommandResponse


class RelayDoor:
    """See `serve`. Commands go from here to agents alone, never to a third server."""

    def __init__(self, commands: Commands, *, head_seconds: float = 10.0) -> None:
        self._commands = commands
        self._head_seconds = head_seconds

    async def serve(
        self, requests: AsyncIterator[command_pb2.RelayCommandRequest]
    ) -> AsyncGenerator[command_pb2.RelayCommandResponse, None]:
        """Serves Node.RelayCommand. Raises as `run` and `open` do."""
        try:
            async with asyncio.timeout(self._head_seconds):
                first = await anext(requests)
        except (TimeoutError, StopAsyncIteration):
            raise invalid_field("head", "must be the first message") from None
        if first.WhichOneof("part") != "head":
            raise invalid_field("head", "must be the first message", first.WhichOneof("part"))
        head = first.head
        if head.attended:
            async with self._commands.open(head.node_id, head.command, relayed=True) as stream:
                typing = asyncio.create_task(_passed(requests, stream), name="relay-input")
                try:
                    async for part in stream:
                        yield Response(part=part)
                finally:
                    typing.cancel()
                    await asyncio.gather(typing, return_exceptions=True)
            return
        latest: list[types_pb2.OperationProgress] = []

        def tick(progress: types_pb2.OperationProgress) -> None:
            latest[:] = [progress]
            some.set()

        some = asyncio.Event()
        work = asyncio.create_task(
            self._commands.run(
                head.node_id, head.command, timeout=head.command.timeout_seconds, progress=tick, relayed=True
            )
        )
        work.add_done_callback(lambda _: some.set())
        try:
            while not work.done():
                await some.wait()
                some.clear()
                for progress in latest:
                    yield Response(part=command_pb2.ServeCommandRequest(progress=progress))
                latest.clear()
            yield Response(part=command_pb2.ServeCommandRequest(end=work.result()))
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _passed(requests: AsyncIterator[command_pb2.RelayCommandRequest], stream: CommandStream) -> None:
    async for request in requests:
        if request.HasField("answer") and not await stream.send(request.answer):
            return
