"""What the handler of a command says while it runs, and hears."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from fleet.v1 import command_pb2, types_pb2

from fleet_agent.commands.call import CallOverError, CommandCall


class CommandChannel:
    """Every method but `progress` waits while the server takes nothing, and raises CallOverError once nobody hears it.

    A command that goes on without its call (see `CommandDesk`) has `progress` alone: it is lost while no call is there.
    """

    def __init__(self, call: CommandCall | None = None) -> None:
        self.call = call

    async def progress(self, progress: types_pb2.OperationProgress) -> None:
        """How far the command is."""
        if self.call is not None:
            try:
                await self.call.write(command_pb2.ServeCommandRequest(progress=progress))
            except CallOverError:
                self.call = None

    async def stdout(self, data: bytes) -> None:
        """Output of a program; at most 64 KiB at a time is kind to other readers."""
        await self._write(command_pb2.ServeCommandRequest(stdout=data))

    async def stderr(self, data: bytes) -> None:
        """Errors of a program."""
        await self._write(command_pb2.ServeCommandRequest(stderr=data))

    async def line(self, line: types_pb2.LogLine) -> None:
        """A line of a log."""
        await self._write(command_pb2.ServeCommandRequest(line=line))

    async def reply(self, reply: command_pb2.EngineReply) -> None:
        """The head of an engine's reply."""
        await self._write(command_pb2.ServeCommandRequest(reply=reply))

    async def body(self, data: bytes) -> None:
        """A part of an engine's reply."""
        await self._write(command_pb2.ServeCommandRequest(body=data))

    async def inputs(self) -> AsyncGenerator[command_pb2.ServeCommandResponse, None]:
        """What the server says, to its last word. What is not taken waits at the server."""
        while self.call is not None and (part := await self.call.read()) is not None:
            yield part

    async def _write(self, part: command_pb2.ServeCommandRequest) -> None:
        if self.call is None:
            raise CallOverError
        await self.call.write(part)
