"""Lines of a container's log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from docker.errors import APIError
from fleet.v1 import fleet_pb2, types_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from fleet_agent.commands.faults import CommandFault
from fleet_agent.containers.containers import Containers, find
from fleet_agent.containers.faults import gone, refused
from fleet_agent.containers.messages import exit_of
from fleet_agent.docker_engine import DockerEngine, DockerRefusedError, DockerUnavailableError, frames

LINE_BYTES = 256 << 10
"""What a line may have before it is cut in two."""
Entry = types_pb2.LogLine | types_pb2.Exit
_ENDED = ("exited", "dead")
_REMOVED = (404, 409)


class ContainerLogs:
    """See `entries`."""

    def __init__(self, engine: DockerEngine, containers: Containers, *, poll_seconds: float = 0.25) -> None:
        self._engine = engine
        self._containers = containers
        self._poll_seconds = poll_seconds

    async def entries(self, request: fleet_pb2.StreamLogsRequest) -> AsyncGenerator[Entry, None]:
        """The last `tail` lines between `since` and `until`, oldest first; with `follow` what is written from then on.

        The last entry is the exit of a container that has ended. `follow` waits for the start of one that is being
        deployed or was not started yet, and goes over restarts. Raises CommandFault.
        """
        name = request.container_name
        try:
            attrs = await self._awaited(name) if request.follow else await self._inspect(name)
            container_id, tty = attrs["Id"], bool(attrs["Config"].get("Tty"))
            params, seen = _params(request), _Seen()
            ended = False
            while request.follow and not ended:
                async with aclosing(self._reply(container_id, params, seen, tty)) as lines:
                    async for line in lines:
                        yield line
                # The engine ends the reply with each run of the container; the next run's lines come after the last.
                state = (await self._inspect(container_id))["State"]
                ended = state["Status"] in _ENDED
                if not ended:
                    await asyncio.sleep(self._poll_seconds)
                params = {**params, "tail": "all", **seen.since()}
            # One that follows may have ended ahead of the last lines: Docker 20.10 is not always there in time.
            async with aclosing(self._rest(container_id, params, seen, tty, known_end=ended)) as lines:
                async for line in lines:
                    yield line
            if not ended:
                state = (await self._inspect(container_id))["State"]
        except DockerRefusedError as error:
            if error.status_code == 404:
                raise gone(name) from None
            raise CommandFault("DOCKER_UNAVAILABLE", f"the Docker engine refuses it: {error.explanation}") from None
        except DockerUnavailableError as error:
            raise CommandFault("DOCKER_UNAVAILABLE", str(error)) from None
        except APIError as error:
            raise refused(error) from None
        if state["Status"] in _ENDED:
            yield exit_of(state)

    async def _reply(
        self, container_id: str, params: dict[str, str], seen: _Seen, tty: bool
    ) -> AsyncGenerator[types_pb2.LogLine, None]:
        """The lines of one reply of the engine that did not come before."""
        async with (
            self._engine.stream(f"/containers/{container_id}/logs", params) as chunks,
            aclosing(lines_of(chunks, tty=tty)) as lines,
        ):
            async for line in lines:
                if seen.new(line):
                    yield line

    async def _rest(
        self, container_id: str, params: dict[str, str], seen: _Seen, tty: bool, *, known_end: bool
    ) -> AsyncGenerator[types_pb2.LogLine, None]:
        """What is there now and did not come before; nothing of a container that was removed after its end."""
        try:
            async with aclosing(self._reply(container_id, {**params, "follow": "0"}, seen, tty)) as lines:
                async for line in lines:
                    yield line
        except DockerRefusedError as error:
            if not known_end or error.status_code not in _REMOVED:
                raise

    async def _inspect(self, name: str) -> dict[str, Any]:
        return await self._engine.run(lambda client: dict(find(client, name).attrs or {}))

    async def _awaited(self, name: str) -> dict[str, Any]:
        """The container once it was started."""
        while True:
            try:
                attrs = await self._inspect(name)
                if attrs["State"]["Status"] != "created":
                    return attrs
            except CommandFault:
                if name not in self._containers.deploying:
                    raise
            await asyncio.sleep(self._poll_seconds)


class _Seen:
    """Which lines came already, by their times: in each stream they only grow."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._before: dict[str, int] = {}

    def new(self, line: types_pb2.LogLine) -> bool:
        """Whether the line did not come in an earlier reply."""
        at = line.time.ToNanoseconds()
        self._last[line.stream] = max(at, self._last.get(line.stream, 0))
        return at > self._before.get(line.stream, -1)

    def since(self) -> dict[str, str]:
        """The next reply begins with the last lines of this one."""
        self._before = dict(self._last)
        last = min(self._last.values(), default=0)
        return {"since": f"{last // 10**9}.{last % 10**9:09}"} if last else {}


def _params(request: fleet_pb2.StreamLogsRequest) -> dict[str, str]:
    params = {"stdout": "1", "stderr": "1", "timestamps": "1", "follow": "1" if request.follow else "0"}
    params["tail"] = str(request.tail) if request.HasField("tail") else "all"
    for name in ("since", "until"):
        if request.HasField(name):
            at: Timestamp = getattr(request, name)
            params[name] = f"{at.seconds}.{at.nanos:09}"
    return params


async def lines_of(chunks: AsyncIterator[bytes], *, tty: bool) -> AsyncGenerator[types_pb2.LogLine, None]:
    """The lines of a log with timestamps. What is longer than LINE_BYTES comes in several."""
    waiting: dict[str, tuple[bytes, bytearray]] = {}
    carried: dict[str, bytes] = {}
    async with aclosing(_frames(chunks, tty)) as found:
        async for stream, data in found:
            for piece in (carried.pop(stream, b"") + data).splitlines(keepends=True):
                stamp, _, text = piece.partition(b" ")
                ended = piece.endswith(b"\n")
                if tty and not ended and len(piece) < LINE_BYTES:
                    # Without frames a piece may be cut anywhere.
                    carried[stream] = piece
                    continue
                first, whole = waiting.setdefault(stream, (stamp, bytearray()))
                whole += text
                if ended or len(whole) >= LINE_BYTES:
                    del waiting[stream]
                    yield _line(stream, first, whole)
    for stream, (stamp, whole) in waiting.items():
        yield _line(stream, stamp, whole)


async def _frames(chunks: AsyncIterator[bytes], tty: bool) -> AsyncGenerator[tuple[str, bytes], None]:
    async for stream, data in frames(chunks, tty=tty):
        yield stream, data


def _line(stream: str, stamp: bytes, text: bytes | bytearray) -> types_pb2.LogLine:
    line = types_pb2.LogLine(stream=stream, text=text.decode(errors="replace").rstrip("\r\n"))
    try:
        line.time.FromJsonString(stamp.decode("ascii"))
    except (ValueError, UnicodeDecodeError):
        line.text = f"{stamp.decode(errors='replace')} {line.text}".strip()
    return line
