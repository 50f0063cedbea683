"""Lines of a swarm service's log, from all its tasks."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any
from urllib.parse import parse_qsl

from fleet.v1 import fleet_pb2, types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.docker_engine import DockerEngine, DockerRefusedError, DockerUnavailableError, frames
from fleet_agent.swarm.manager import SwarmManager, fault_of
from fleet_agent.swarm.messages import SHORT, Json, set_time

_TASK = "com.docker.swarm.task.id"
_QUIET_SECONDS = 0.3
"""When nothing came for so long, the lines of the past have all been read: the engine sends them at once."""
_PART_BYTES = 1 << 14
"""The engine cuts longer lines in parts of so much."""


class ServiceLogs:
    """See `lines`."""

    def __init__(self, engine: DockerEngine, manager: SwarmManager, *, poll_seconds: float = 5.0) -> None:
        self._engine = engine
        self._manager = manager
        self._poll_seconds = poll_seconds

    async def lines(self, request: fleet_pb2.StreamServiceLogsRequest) -> AsyncGenerator[types_pb2.LogLine, None]:
        """The last `tail` lines between `since` and `until`, oldest first; with `follow` what is written from then on,
        until the service is removed or `until` has passed.

        Raises CommandFault: SERVICE_NOT_FOUND, NOT_SWARM_MANAGER, DOCKER_UNAVAILABLE.
        """
        attrs = await self._manager.inspect(request.service_id)
        until = request.until.ToNanoseconds() if request.HasField("until") else None
        try:
            async with (
                self._engine.stream(f"/services/{attrs['ID']}/logs", _params(request)) as chunks,
                aclosing(_lines(chunks, tty=_has_terminal(attrs))) as lines,
                aclosing(self._ordered(lines, request, attrs["ID"])) as ordered,
            ):
                async for line in ordered:
                    if until is None or line.time.ToNanoseconds() < until:
                        yield line
        except DockerRefusedError as error:
            raise fault_of(error.status_code, error.explanation) from None
        except DockerUnavailableError as error:
            raise CommandFault("DOCKER_UNAVAILABLE", str(error)) from None

    async def _ordered(
        self,
        lines: AsyncGenerator[types_pb2.LogLine, None],
        request: fleet_pb2.StreamServiceLogsRequest,
        service_id: str,
    ) -> AsyncGenerator[types_pb2.LogLine, None]:
        """Of the past the last lines in order: the engine gives so many for each task, one task after the other."""
        past = _Newest(request.tail)
        begun = time.time_ns()
        until = request.until.ToNanoseconds() if request.HasField("until") else None
        live = False
        async with aclosing(_Waiting(lines)) as waiting:
            while True:
                patience = self._patience(live, until) if request.follow else None
                try:
                    line = await waiting.next(patience)
                except TimeoutError:
                    if not live:
                        live = True
                        for one in past.take():
                            yield one
                    elif (until is not None and time.time_ns() > until) or await self._removed(service_id):
                        return
                    continue
                if line is None:
                    break
                if live:
                    yield line
                    continue
                past.add(line, until)
                if request.follow and line.time.ToNanoseconds() >= begun:
                    live = True
                    for one in past.take():
                        yield one
            for one in past.take():
                yield one

    def _patience(self, live: bool, until: int | None) -> float:
        if not live:
            return _QUIET_SECONDS
        left = self._poll_seconds if until is None else (until - time.time_ns()) / 1e9
        return max(0.05, min(left, self._poll_seconds))

    async def _removed(self, service_id: str) -> bool:
        """The engine does not end a log whose service is gone."""
        try:
            await self._manager.inspect(service_id)
        except CommandFault as fault:
            if fault.reason == "SERVICE_NOT_FOUND":
                return True
            raise
        return False


class _Newest:
    """The newest lines of those that it was given, at most `count`."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._heap: list[tuple[int, int, types_pb2.LogLine]] = []
        self._numbers = itertools.count()

    def add(self, line: types_pb2.LogLine, until: int | None) -> None:
        at = line.time.ToNanoseconds()
        if self._count == 0 or (until is not None and at >= until):
            return
        row = (at, next(self._numbers), line)
        if len(self._heap) < self._count:
            heapq.heappush(self._heap, row)
        else:
            heapq.heappushpop(self._heap, row)

    def take(self) -> list[types_pb2.LogLine]:
        """All of them, oldest first."""
        rows, self._heap = sorted(self._heap), []
        return [line for _, _, line in rows]


class _Waiting:
    """An iterator whose next item can be waited for in vain, and then waited for on."""

    def __init__(self, lines: AsyncGenerator[types_pb2.LogLine, None]) -> None:
        self._lines = lines
        self._next: asyncio.Task[types_pb2.LogLine | None] | None = None

    async def next(self, seconds: float | None) -> types_pb2.LogLine | None:
        """The next line, None at the end. Raises TimeoutError."""
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._lines, None))
        done, _ = await asyncio.wait({self._next}, timeout=seconds)
        if not done:
            raise TimeoutError
        task, self._next = self._next, None
        return task.result()

    async def aclose(self) -> None:
        if self._next is not None:
            self._next.cancel()
            await asyncio.gather(self._next, return_exceptions=True)


def _params(request: fleet_pb2.StreamServiceLogsRequest) -> dict[str, Any]:
    params: dict[str, Any] = {
        "stdout": "1",
        "stderr": "1",
        "timestamps": "1",
        "details": "1",
        "follow": "1" if request.follow else "0",
        # The engine counts from the end, which a time in the past moves; it takes 0 for all.
        "tail": "all" if request.HasField("until") else str(max(1, request.tail)),
    }
    if request.HasField("since"):
        params["since"] = f"{request.since.seconds}.{request.since.nanos:09d}"
    return params


def _has_terminal(attrs: Json) -> bool:
    container = attrs["Spec"].get("TaskTemplate", {}).get("ContainerSpec") or {}
    return bool(container.get("TTY"))


async def _lines(chunks: AsyncIterator[bytes], *, tty: bool) -> AsyncGenerator[types_pb2.LogLine, None]:
    """Lines of the engine's reply; very long ones come in parts, each with the time and the task again."""
    waiting = bytearray()
    async for stream, data in frames(chunks, tty=tty):
        if not tty:
            # A frame is a line, or a part of one.
            yield line_of(stream, data.removesuffix(b"\n"))
            continue
        waiting += data
        while (end := _end_of_first(waiting)) is not None:
            yield line_of(stream, bytes(waiting[:end]).removesuffix(b"\n"))
            del waiting[:end]
    if waiting:
        yield line_of("stdout", bytes(waiting))


def _end_of_first(waiting: bytearray) -> int | None:
    """Where the first line ends, or the first part of a very long one, which has no newline; None if not yet here."""
    text = waiting.find(b" ", waiting.find(b" ") + 1) + 1
    newline = waiting.find(b"\n", 0, text + _PART_BYTES)
    if newline >= 0:
        return newline + 1
    return text + _PART_BYTES if text and len(waiting) >= text + _PART_BYTES else None


def line_of(stream: str, raw: bytes) -> types_pb2.LogLine:
    """One line: when, whose, what. What the engine itself has to say comes as stderr of no task."""
    text = raw.rstrip(b"\r").decode(errors="replace")
    if stream == "system":
        line = types_pb2.LogLine(stream="stderr", text=text)
        line.time.GetCurrentTime()
        return line
    when, _, rest = text.partition(" ")
    details, _, text = rest.partition(" ")
    line = types_pb2.LogLine(stream=stream, text=text, task_id=_task_of(details))
    set_time(line.time, when)
    return line


def _task_of(details: str) -> str | None:
    given: Mapping[str, str] = dict(parse_qsl(details.replace(",", "&")))
    task_id = given.get(_TASK)
    return task_id[:SHORT] if task_id else None
