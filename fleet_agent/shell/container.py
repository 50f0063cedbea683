"""A program in a container of this node, started by its Docker engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import docker
from docker.errors import APIError
from fleet.v1 import types_pb2

from fleet_agent.commands.faults import CommandFault, unknown
from fleet_agent.containers.containers import find
from fleet_agent.containers.faults import refused, words_of
from fleet_agent.containers.messages import signal_of
from fleet_agent.docker_engine import DockerEngine, DockerUnavailableError, frames
from fleet_agent.shell.program import CHUNK_BYTES, MARK, NoProgramError

_MISSING = ("executable file not found", "no such file or directory")
_POLL_SECONDS = 0.02
_RESIZE_TRIES = 25
Kill = Callable[[str, str], Awaitable[int]]
"""Kills what was started with a variable in a container, from outside of it; how many processes were found."""


async def start_in_container(
    engine: DockerEngine,
    name: str,
    words: Sequence[str],
    env: Mapping[str, str],
    kill: Kill,
    *,
    command_id: str,
    stdin: bool = False,
    tty: bool = False,
    rows: int = 0,
    columns: int = 0,
) -> ContainerProgram:
    """Raises CommandFault: CONTAINER_NOT_FOUND, CONTAINER_NOT_RUNNING, DOCKER_UNAVAILABLE; NoProgramError."""
    variables = {MARK: command_id, **({"TERM": "xterm-256color"} if tty else {}), **env}

    def create(client: docker.DockerClient) -> tuple[str, str, str]:
        container = find(client, name)
        try:
            made: dict[str, Any] = client.api.exec_create(
                container.id or "", list(words), stdin=stdin, tty=tty, environment=variables
            )
        except APIError as error:
            if error.status_code == 409:
                raise CommandFault(
                    "CONTAINER_NOT_RUNNING", f"container_name: {name!r} does not run: {words_of(error)}"
                ) from None
            raise refused(error) from None
        return made["Id"], container.id or "", client.api.api_version

    try:
        exec_id, container_id, version = await engine.run(create)
        start = json.dumps({"Detach": False, "Tty": tty}).encode()
        reader, writer = await _hijacked(engine, f"/v{version}/exec/{exec_id}/start", start)
    except DockerUnavailableError as error:
        raise CommandFault("DOCKER_UNAVAILABLE", str(error)) from None
    except APIError as error:
        raise refused(error) from None
    program = ContainerProgram(engine, exec_id, container_id, command_id, reader, writer, kill, tty=tty)
    if tty and rows and columns:
        # The engine has begun to start it, but a terminal has a size only once it is there.
        for _ in range(_RESIZE_TRIES):
            if await program.sized(rows, columns):
                break
            await asyncio.sleep(_POLL_SECONDS)
    return program


class ContainerProgram:
    """See Program."""

    def __init__(
        self,
        engine: DockerEngine,
        exec_id: str,
        container_id: str,
        command_id: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        kill: Kill,
        *,
        tty: bool,
    ) -> None:
        self._engine = engine
        self._exec_id = exec_id
        self._container_id = container_id
        self._command_id = command_id
        self._reader = reader
        self._writer = writer
        self._kill = kill
        self._tty = tty
        self._exit: types_pb2.Exit | None = None

    async def output(self) -> AsyncGenerator[tuple[str, bytes], None]:
        async for part in frames(self._chunks(), tty=self._tty):
            yield part

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            try:
                data = await self._reader.read(CHUNK_BYTES)
            except OSError:
                return
            if not data:
                return
            yield data

    async def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(data)
            await self._writer.drain()

    async def close_input(self) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            if self._tty:
                await self.write(b"\x04")
            elif self._writer.can_write_eof():
                self._writer.write_eof()

    async def resize(self, rows: int, columns: int) -> None:
        if self._tty:
            await self.sized(rows, columns)

    async def sized(self, rows: int, columns: int) -> bool:
        """Whether the engine took the size."""
        try:
            await self._engine.run(lambda client: client.api.exec_resize(self._exec_id, rows, columns))
        except (DockerUnavailableError, APIError):
            return False
        return True

    async def wait(self) -> types_pb2.Exit:
        while self._exit is None:
            state = await self._inspect()
            if not state["Running"]:
                code = int(state["ExitCode"] or 0)
                self._exit = types_pb2.Exit(exit_code=code, signal=signal_of(code))
                break
            await asyncio.sleep(_POLL_SECONDS)
        return self._exit

    async def kill(self) -> None:
        """The engine cannot end a program: it is found by its mark, from outside, or from inside the container."""
        if await self._kill(f"{MARK}={self._command_id}", self._container_id):
            return
        script = (
            f'for p in /proc/[0-9]*; do grep -qs "{MARK}={self._command_id}" "$p/environ" '
            '&& [ "${p#/proc/}" != $$ ] && kill -9 "${p#/proc/}"; done'
        )

        def work(client: docker.DockerClient) -> None:
            made = client.api.exec_create(self._container_id, ["/bin/sh", "-c", script])
            client.api.exec_start(made["Id"])

        with contextlib.suppress(DockerUnavailableError, APIError):
            await self._engine.run(work)

    async def close(self) -> None:
        with contextlib.suppress(CommandFault):
            if self._exit is None and (await self._inspect())["Running"]:
                await self.kill()
        self._writer.close()

    async def _inspect(self) -> dict[str, Any]:
        try:
            return await self._engine.run(lambda client: client.api.exec_inspect(self._exec_id))
        except DockerUnavailableError as error:
            raise unknown(str(error)) from None
        except APIError as error:
            # The engine forgets the programs of a container that ended.
            raise CommandFault("CONTAINER_NOT_RUNNING", f"container_name: {words_of(error)}", acted=True) from None


def missing_program(exit_code: int, output: bytes) -> str | None:
    """The engine's words where it found no such program: it says so in place of the program's output."""
    text = output[:4096].decode(errors="replace")
    if exit_code in (126, 127) and "OCI runtime exec failed" in text and any(words in text for words in _MISSING):
        return " ".join(text.split())
    return None


async def _hijacked(engine: DockerEngine, path: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that the engine has given over to a program."""
    parts = urlsplit(engine.url)
    try:
        if parts.scheme in ("unix", "http+unix"):
            reader, writer = await asyncio.open_unix_connection(engine.url.partition("://")[2], limit=CHUNK_BYTES)
        else:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 2375, limit=CHUNK_BYTES)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n"
            f"Connection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        status = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise DockerUnavailableError(f"the Docker engine {engine.place} does not answer: {error}") from error
    code = int(status.split()[1])
    if code in (101, 200):
        return reader, writer
    said = await reader.read(CHUNK_BYTES)
    writer.close()
    text = said.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["message"])
    if any(words in text for words in _MISSING):
        raise NoProgramError(127, text)
    if code == 409:
        raise CommandFault("CONTAINER_NOT_RUNNING", f"container_name: {text}")
    raise CommandFault("DOCKER_UNAVAILABLE", f"the Docker engine refuses it: {text}")
