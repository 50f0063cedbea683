"""One container's log as it grows, read once for all who follow it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.commands import Commands

Entry = fleet_pb2.StreamLogsResponse
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class LogSettings:
    """`ring_bytes` of the newest lines are kept of each container that is followed: who falls behind them reads the
    rest from the node, in his own time."""

    ring_bytes: int = 2 << 20
    reply_bytes: int = 3 << 20
    """A reply with the last lines has no more than this, the newest."""
    read_seconds: float = 25.0
    return_seconds: float = 45.0
    """A node that is lost while its log is followed is waited for."""
    again_seconds: float = 0.5


class Place:
    """How far one reader is: of each stream the time of its last line. In each stream times only grow."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}

    def new(self, line: types_pb2.LogLine) -> bool:
        """Whether the line comes after what was read."""
        return line.time.ToNanoseconds() > self._last.get(line.stream, -1)

    def note(self, line: types_pb2.LogLine) -> None:
        """The line has been read."""
        self._last[line.stream] = max(line.time.ToNanoseconds(), self._last.get(line.stream, -1))

    def pass_by(self, line: types_pb2.LogLine) -> None:
        """Everything up to this line counts as read."""
        for stream in ("stdout", "stderr"):
            self._last[stream] = line.time.ToNanoseconds()

    def since(self, request: fleet_pb2.StreamLogsRequest) -> None:
        """Asks for what comes from here on; the last line may come again."""
        if self._last:
            request.since.FromNanoseconds(min(self._last.values()))


async def read(
    commands: Commands, request: fleet_pb2.StreamLogsRequest
) -> AsyncGenerator[types_pb2.LogLine | types_pb2.Exit, None]:
    """The node's answer to one request for lines; the exit last, where there was one."""
    async with commands.open(request.node_id, command_pb2.Command(logs=request)) as stream:
        async for part in stream:
            match part.WhichOneof("part"):
                case "line":
                    yield part.line
                case "end" if part.end.HasField("exit"):
                    yield part.end.exit
                case _:
                    pass


class LogFeed:
    """The newest lines of a container that is followed. Lines are numbered; `first` to before `next` are here."""

    def __init__(self, node_id: str, name: str, commands: Commands, settings: LogSettings) -> None:
        self.node_id = node_id
        self.name = name
        self.followers = 0
        self.first = 0
        self.next = 0
        self.exit: types_pb2.Exit | None = None
        self.error: FleetError | None = None
        self._commands = commands
        self._settings = settings
        self._lines: deque[tuple[Entry, int]] = deque()
        self._bytes = 0
        self._place = Place()
        self._changed = asyncio.Event()
        self._ready = asyncio.Event()
        self.task = asyncio.create_task(self._run(), name=f"log-{node_id}-{name}")

    @property
    def over(self) -> bool:
        """No line will come any more."""
        return self.exit is not None or self.error is not None or self.task.done()

    def line(self, number: int) -> Entry:
        """A line that is here."""
        return self._lines[number - self.first][0]

    async def ready(self) -> None:
        """Returns when no line that is written from now on can be missed."""
        await self._ready.wait()

    async def more(self, number: int) -> None:
        """Returns when that line is here, or none will come."""
        while self.next <= number and not self.over:
            await self._changed.wait()

    async def _run(self) -> None:
        try:
            await self._place_of_end()
            lost_at: float | None = None
            while self.exit is None:
                try:
                    await self._follow()
                    lost_at = None
                except FleetError as error:
                    now = asyncio.get_running_loop().time()
                    lost_at = lost_at or now
                    if error.reason != "NODE_OFFLINE" or now - lost_at > self._settings.return_seconds:
                        raise
                    await asyncio.sleep(self._settings.again_seconds)
        except FleetError as error:
            self.error = error
        finally:
            self._ready.set()
            self._tell()

    async def _place_of_end(self) -> None:
        """Where the log ends now: all after that belongs to this feed."""
        asked = self._request(tail=1, follow=False)
        try:
            async for entry in read(self._commands, asked):
                if isinstance(entry, types_pb2.LogLine):
                    self._place.pass_by(entry)
        except FleetError as error:
            # It may be on its way: the node knows, and waits.
            if error.reason != "CONTAINER_NOT_FOUND":
                raise

    async def _follow(self) -> None:
        asked = self._request(tail=None, follow=True)
        self._place.since(asked)
        async with self._commands.open(self.node_id, command_pb2.Command(logs=asked)) as stream:
            self._ready.set()
            async for part in stream:
                match part.WhichOneof("part"):
                    case "line" if self._place.new(part.line):
                        self._place.note(part.line)
                        self._put(part.line)
                    case "end":
                        self.exit = part.end.exit
                    case _:
                        pass

    def _request(self, *, tail: int | None, follow: bool) -> fleet_pb2.StreamLogsRequest:
        return fleet_pb2.StreamLogsRequest(node_id=self.node_id, container_name=self.name, tail=tail, follow=follow)

    def _put(self, line: types_pb2.LogLine) -> None:
        size = len(line.text) + 100
        self._lines.append((Entry(line=line), size))
        self._bytes += size
        self.next += 1
        while self._bytes > self._settings.ring_bytes and len(self._lines) > 1:
            self._bytes -= self._lines.popleft()[1]
            self.first += 1
        self._tell()

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
