"""Logs of containers: the last lines, and what comes; however many follow, a node is read once for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.commands import Commands
from fleet_server.services.log_feed import Entry, Key, LogFeed, LogSettings, Place, read


class ContainerLogs:
    """Every method raises FleetError: NODE_NOT_FOUND, NODE_OFFLINE, CONTAINER_NOT_FOUND, DOCKER_UNAVAILABLE."""

    def __init__(self, commands: Commands, settings: LogSettings | None = None) -> None:
        self._commands = commands
        self._settings = settings or LogSettings()
        self._feeds: dict[Key, LogFeed] = {}

    async def aclose(self) -> None:
        """Ends what is followed."""
        tasks = [feed.task for feed in self._feeds.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def last(self, request: fleet_pb2.GetLogsRequest) -> fleet_pb2.GetLogsResponse:
        """The last lines, oldest first, and how the container ended if it has."""
        asked = fleet_pb2.StreamLogsRequest(
            node_id=request.node_id, container_name=request.container_name, tail=request.tail, follow=False
        )
        for name in ("since", "until"):
            if request.HasField(name):
                getattr(asked, name).CopyFrom(getattr(request, name))
        reply = fleet_pb2.GetLogsResponse(node_id=request.node_id, container_name=request.container_name)
        lines: deque[types_pb2.LogLine] = deque()
        size = 0
        try:
            async with asyncio.timeout(self._settings.read_seconds), aclosing(read(self._commands, asked)) as entries:
                async for entry in entries:
                    if isinstance(entry, types_pb2.Exit):
                        reply.exit.CopyFrom(entry)
                        continue
                    lines.append(entry)
                    size += entry.ByteSize()
                    while size > self._settings.reply_bytes:
                        size -= lines.popleft().ByteSize()
        except TimeoutError:
            raise FleetError(
                "TIMEOUT", f"the log did not come within {self._settings.read_seconds:g} s: ask for fewer lines"
            ) from None
        reply.lines.extend(lines)
        return reply

    async def stream(
        self, request: fleet_pb2.StreamLogsRequest, *, listening: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[Entry, None]:
        """The last lines, then with `follow` what comes; the exit last. Entries are shared: not to be changed.

        `listening` is called once, where one follows a container that is there, when no line that is written from then
        on can be missed.
        """
        if not request.follow or request.HasField("until"):
            async with aclosing(read(self._commands, request)) as entries:
                async for entry in entries:
                    yield Entry(exit=entry) if isinstance(entry, types_pb2.Exit) else Entry(line=entry)
            return
        feed = self._join((request.node_id, request.container_name))
        try:
            async with aclosing(self._followed(feed, request, listening)) as found:
                async for one in found:
                    yield one
        finally:
            await self._leave(feed)

    async def _followed(
        self, feed: LogFeed, request: fleet_pb2.StreamLogsRequest, listening: Callable[[], Awaitable[None]] | None
    ) -> AsyncGenerator[Entry, None]:
        await feed.ready()
        place, number = Place(), feed.next
        known = True
        past = fleet_pb2.StreamLogsRequest()
        past.CopyFrom(request)
        past.follow = False
        try:
            async with aclosing(self._past(past, place)) as lines:
                async for line in lines:
                    yield line
        except FleetError as error:
            # It is on its way: whatever it says is in the feed.
            if error.reason != "CONTAINER_NOT_FOUND" or feed.error is not None:
                raise
            number, known = feed.first, False
        if listening is not None and known:
            await listening()
        while True:
            await feed.more(number)
            if number < feed.first:
                # Too slow for what is kept here: the node has it all.
                number = feed.next
                past.ClearField("tail")
                place.since(past)
                async with aclosing(self._past(past, place)) as lines:
                    async for line in lines:
                        yield line
                continue
            if number >= feed.next:
                break
            entry = feed.line(number)
            number += 1
            if place.new(entry.line):
                place.note(entry.line)
                yield entry
        if feed.exit is None:
            raise feed.error or FleetError("SHUTTING_DOWN", "the server is being shut down: come again in a moment")
        yield Entry(exit=feed.exit)

    async def _past(self, request: fleet_pb2.StreamLogsRequest, place: Place) -> AsyncGenerator[Entry, None]:
        async with aclosing(read(self._commands, request)) as entries:
            async for entry in entries:
                if isinstance(entry, types_pb2.LogLine) and place.new(entry):
                    place.note(entry)
                    yield Entry(line=entry)

    def _join(self, key: Key) -> LogFeed:
        feed = self._feeds.get(key)
        if feed is None or feed.over:
            feed = self._feeds[key] = LogFeed(*key, self._commands, self._settings)
        feed.followers += 1
        return feed

    async def _leave(self, feed: LogFeed) -> None:
        """The last who leaves ends it."""
        feed.followers -= 1
        if feed.followers:
            return
        key = feed.node_id, feed.name
        if self._feeds.get(key) is feed:
            del self._feeds[key]
        feed.task.cancel()
        await asyncio.gather(feed.task, return_exceptions=True)
