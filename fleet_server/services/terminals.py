"""Programs that callers stay connected to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from fleet.v1 import command_pb2, fleet_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.audit import Actor, audited
from fleet_server.services.commands import Commands, CommandStream

Answer = command_pb2.ServeCommandResponse
Reply = fleet_pb2.ExecStreamResponse


class Terminals:
    """See `connect`."""

    def __init__(self, commands: Commands) -> None:
        self._commands = commands

    async def connect(
        self, requests: AsyncIterator[fleet_pb2.ExecStreamRequest], actor: Actor
    ) -> AsyncGenerator[fleet_pb2.ExecStreamResponse, None]:
        """The program's output as it comes, its exit last. Back-pressure is the only limit, both ways.

        The program ends with its caller. Raises FleetError: NODE_NOT_FOUND, NODE_OFFLINE, OUTCOME_UNKNOWN where the
        node is lost meanwhile, and what the node says.
        """
        try:
            first = await anext(requests)
        except StopAsyncIteration:
            raise invalid_field("start", "must be the first frame") from None
        if first.WhichOneof("frame") != "start":
            raise invalid_field("start", "must be the first frame", first.WhichOneof("frame"))
        if not first.node_id:
            raise invalid_field("node_id", "must be named in the first frame")
        start = first.start
        place = start.container_name if start.HasField("container_name") else None
        with audited(actor, "exec_stream", first.node_id, container_name=place, command=start.command):
            async with self._commands.open(first.node_id, command_pb2.Command(exec_stream=start)) as stream:
                typing = asyncio.create_task(_typed(requests, stream), name="exec-input")
                try:
                    async for part in stream:
                        match part.WhichOneof("part"):
                            case "stdout":
                                yield Reply(stdout=part.stdout)
                            case "stderr":
                                yield Reply(stderr=part.stderr)
                            case "end":
                                yield Reply(exit=part.end.exit)
                            case _:
                                pass
                        if typing.done() and (error := typing.exception()) is not None:
                            raise error
                finally:
                    typing.cancel()
                    await asyncio.gather(typing, return_exceptions=True)


async def _typed(requests: AsyncIterator[fleet_pb2.ExecStreamRequest], stream: CommandStream) -> None:
    """What the caller sends, to the program; after the caller's last frame its input is at its end."""
    async for request in requests:
        match request.WhichOneof("frame"):
            case "stdin":
                answer = Answer(stdin=request.stdin)
            case "resize":
                answer = Answer(resize=request.resize)
            case "close_stdin":
                answer = Answer(close_stdin=request.close_stdin)
            case "start":
                raise FleetError("INVALID_FIELD", "start: must be the first frame alone")
            case _:
                continue
        if not await stream.send(answer):
            return
    await stream.send(Answer(close_stdin=fleet_pb2.CloseStdin()))
