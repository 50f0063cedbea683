"""The server's commands to run programs."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from contextlib import aclosing

import structlog
from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_agent.commands import CommandChannel, CommandDesk, CommandFault
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.shell.container import missing_program, start_in_container
from fleet_agent.shell.node import node_env, start_on_node
from fleet_agent.shell.processes import kill_all, marked
from fleet_agent.shell.program import NoProgramError, Program, check_env, words_of

_log = structlog.get_logger("fleet.agent.audit")
OUTPUT_BYTES = 1 << 20
"""Of a program that is run to its end so much output is kept, of both kinds together."""


class ShellCommands:
    """Handlers of exec and exec_stream. Programs run as the agent's user, without the agent's own FLEET_* variables."""

    def __init__(self, node_id: str, engine: DockerEngine) -> None:
        self._node_id = node_id
        self._engine = engine

    def register(self, desk: CommandDesk) -> None:
        """Makes them answer their commands."""
        desk.register("exec", self._exec)
        desk.register("exec_stream", self._stream)

    async def _exec(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        request = command.exec
        reply = fleet_pb2.ExecResponse(node_id=self._node_id, command=request.command)
        if request.HasField("container_name"):
            reply.container_name = request.container_name
        begun = time.monotonic()
        seconds = request.timeout_seconds or 60
        try:
            program = await self._start(request, command.command_id)
        except NoProgramError as error:
            reply.exit_code, reply.stderr = error.exit_code, str(error)
            return command_pb2.CommandEnd(exec=reply)
        kept = _Kept()
        try:
            async with asyncio.timeout(seconds):
                async with aclosing(program.output()) as output:
                    async for name, data in output:
                        kept.add(name, data)
                reply.exit_code = (await program.wait()).exit_code
        except TimeoutError:
            await program.kill()
            detail = f"timeout_seconds: the command ran for more than {seconds} s and was killed: give it more time"
            raise CommandFault("TIMEOUT", detail, acted=True) from None
        finally:
            await program.close()
        if request.HasField("container_name") and (why := missing_program(reply.exit_code, kept.stdout)) is not None:
            reply.exit_code, reply.stderr = 127, why
        else:
            reply.stdout, reply.stderr = kept.text("stdout"), kept.text("stderr")
        reply.truncated = kept.truncated
        reply.duration_seconds = round(time.monotonic() - begun, 3)
        return command_pb2.CommandEnd(exec=reply)

    async def _stream(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        start = command.exec_stream
        try:
            program = await self._start(start, command.command_id)
        except NoProgramError as error:
            await channel.stderr(f"{error}\n".encode())
            return command_pb2.CommandEnd(exit=types_pb2.Exit(exit_code=error.exit_code))
        typing = asyncio.create_task(_typed(program, channel))
        first = b""
        try:
            async with aclosing(program.output()) as output:
                async for name, data in output:
                    first = first or data
                    await (channel.stdout(data) if name == "stdout" else channel.stderr(data))
            end = await program.wait()
        finally:
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)
            await program.close()
        if start.HasField("container_name") and missing_program(end.exit_code, first) is not None:
            end.exit_code = 127
        return command_pb2.CommandEnd(exit=end)

    async def _start(self, request: fleet_pb2.ExecRequest | fleet_pb2.ExecStart, command_id: str) -> Program:
        words = words_of(request.command, shell=request.shell)
        env = check_env(dict(request.env))
        place = request.container_name if request.HasField("container_name") else None
        _log.info("audit", verb="exec", command_id=command_id, container_name=place, command=request.command)
        live = isinstance(request, fleet_pb2.ExecStart)
        terminal: Mapping[str, int] = {}
        if isinstance(request, fleet_pb2.ExecStart):
            terminal = {"rows": request.rows, "columns": request.columns}
        tty = isinstance(request, fleet_pb2.ExecStart) and request.tty
        if place is None:
            return await start_on_node(words, node_env(command_id, env), stdin=live, tty=tty, **terminal)
        return await start_in_container(
            self._engine, place, words, env, self._kill_marked, command_id=command_id, stdin=live, tty=tty, **terminal
        )

    async def _kill_marked(self, mark: str, container_id: str) -> int:
        """Kills what was started with that variable in the container, seen from its machine; how many there were."""
        return await asyncio.to_thread(kill_all, lambda pid: marked(pid, mark, container_id))


class _Kept:
    """The first OUTPUT_BYTES of a program's output."""

    def __init__(self) -> None:
        self._parts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self._left = OUTPUT_BYTES
        self.truncated = False

    @property
    def stdout(self) -> bytes:
        return bytes(self._parts["stdout"])

    def add(self, name: str, data: bytes) -> None:
        kept = data[: self._left]
        self._left -= len(kept)
        self._parts[name] += kept
        self.truncated = self.truncated or len(kept) < len(data)

    def text(self, name: str) -> str:
        return self._parts[name].decode(errors="replace")


async def _typed(program: Program, channel: CommandChannel) -> None:
    """What the caller sends, to the program."""
    async with aclosing(channel.inputs()) as inputs:
        async for part in inputs:
            match part.WhichOneof("part"):
                case "stdin":
                    await program.write(part.stdin)
                case "resize":
                    with contextlib.suppress(OSError):
                        await program.resize(part.resize.rows, part.resize.columns)
                case "close_stdin":
                    await program.close_input()
                case _:
                    pass
