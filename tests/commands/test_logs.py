"""Followers of one log share one reading of it, and each gets every line."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_agent.commands import CommandChannel, CommandFault
from fleet_server.domain.errors import FleetError
from fleet_server.services.container_logs import ContainerLogs
from fleet_server.services.log_feed import LogSettings
from tests.commands.node import NODE, node_on
from tests.services.agents.bench import Bench
from tests.waiting import wait_until

Request = fleet_pb2.StreamLogsRequest


class Log:
    """A container's log as a node would read it, and who reads it."""

    def __init__(self) -> None:
        self.lines: list[types_pb2.LogLine] = []
        self.exit: types_pb2.Exit | None = None
        self.following = 0
        self.most = 0
        self.reads = 0
        self.changed = asyncio.Event()
        self.missed = 0
        self.sure = asyncio.Event()
        """Until then one that is to be followed and is not there may be on its way."""

    def write(self, *texts: str) -> None:
        for text in texts:
            line = types_pb2.LogLine(stream="stdout", text=text)
            line.time.FromNanoseconds(1_000_000 + len(self.lines))
            self.lines.append(line)
        self.changed.set()

    def end(self, exit_code: int) -> None:
        self.exit = types_pb2.Exit(exit_code=exit_code)
        self.changed.set()

    async def __call__(self, command: command_pb2.Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        asked = command.logs
        if asked.container_name != "writer":
            self.missed += 1
            if asked.follow:
                await self.sure.wait()
            raise CommandFault("CONTAINER_NOT_FOUND", "container_name: there is none")
        self.reads += 1
        since = asked.since.ToNanoseconds() if asked.HasField("since") else 0
        found = [line for line in self.lines if line.time.ToNanoseconds() >= since]
        if asked.HasField("tail"):
            found = found[-asked.tail :] if asked.tail else []
        number = len(self.lines)
        for line in found:
            await channel.line(line)
        if asked.follow:
            self.following += 1
            self.most = max(self.most, self.following)
            try:
                while self.exit is None or number < len(self.lines):
                    for line in self.lines[number:]:
                        await channel.line(line)
                        number += 1
                    self.changed.clear()
                    await self.changed.wait() if self.exit is None else None
            finally:
                self.following -= 1
        return command_pb2.CommandEnd(exit=self.exit)


async def read(
    logs: ContainerLogs, tail: int | None = None, listening: asyncio.Event | None = None
) -> tuple[list[str], int]:
    """All lines and the exit code; `listening` is set once the past has been read."""

    async def listens() -> None:
        if listening is not None:
            listening.set()

    texts, exit_code = [], -1
    request = Request(node_id=NODE, container_name="writer", tail=tail, follow=True)
    async with aclosing(logs.stream(request, listening=listens)) as entries:
        async for entry in entries:
            if entry.HasField("line"):
                texts.append(entry.line.text)
            else:
                exit_code = entry.exit.exit_code
    return texts, exit_code


async def test_one_reading_serves_all(bench: Bench, tmp_path: Path) -> None:
    log, logs = Log(), ContainerLogs(bench.commands)
    log.write("a", "b", "c")
    async with node_on(bench, tmp_path, logs=log):
        readers = [asyncio.create_task(read(logs, tail)) for tail in (None, 2, 0) for _ in range(10)]
        # Where the log ends, its past for those who want it, and what comes.
        await wait_until(lambda: log.following == 1 and log.reads == 32)
        for number in range(50):
            log.write(f"line {number}")
        log.end(3)
        found = await asyncio.gather(*readers)
        assert log.most == 1
        assert not logs._feeds
    new = [f"line {number}" for number in range(50)]
    for index, past in enumerate((["a", "b", "c"], ["b", "c"], [])):
        for texts, exit_code in found[10 * index : 10 * index + 10]:
            assert texts == past + new
            assert exit_code == 3


async def test_who_falls_behind_reads_the_rest_in_his_own_time(bench: Bench, tmp_path: Path) -> None:
    log, logs = Log(), ContainerLogs(bench.commands, LogSettings(ring_bytes=1_000))
    log.write("first")
    async with node_on(bench, tmp_path, logs=log):
        request = Request(node_id=NODE, container_name="writer", follow=True)
        slow = logs.stream(request)
        assert (await anext(slow)).line.text == "first"
        quick = asyncio.create_task(read(logs))
        await wait_until(lambda: log.following == 1)
        expected = ["first"]
        for number in range(200):
            log.write(f"line {number}")
            expected.append(f"line {number}")
            await asyncio.sleep(0)
        log.end(0)
        assert (await quick)[0] == expected
        feed = next(iter(logs._feeds.values()))
        assert feed.next - feed.first < 20
        rest = [entry async for entry in slow]
        assert ["first", *(entry.line.text for entry in rest[:-1])] == expected
        assert rest[-1].exit.exit_code == 0


async def test_a_node_that_comes_back_is_read_on(bench: Bench, tmp_path: Path) -> None:
    log, logs = Log(), ContainerLogs(bench.commands, LogSettings(again_seconds=0.05))
    log.write("a")
    async with node_on(bench, tmp_path, logs=log) as node:
        listening = asyncio.Event()
        reader = asyncio.create_task(read(logs, listening=listening))
        # The past is read by each for himself: a node that is lost meanwhile is told of.
        await wait_until(lambda: log.following == 1 and listening.is_set())
        log.write("b")
        await node.hang_up()
        await node.channel.close()
        await wait_until(lambda: log.following == 0)
        log.write("c")
    async with node_on(bench, tmp_path, logs=log):
        await wait_until(lambda: log.following == 1)
        log.write("d")
        log.end(1)
        assert await reader == (["a", "b", "c", "d"], 1)


async def test_the_last_who_leaves_ends_the_reading(bench: Bench, tmp_path: Path) -> None:
    log, logs = Log(), ContainerLogs(bench.commands)
    async with node_on(bench, tmp_path, logs=log):
        readers = [asyncio.create_task(read(logs)) for _ in range(2)]
        await wait_until(lambda: log.following == 1)
        readers[0].cancel()
        await asyncio.gather(readers[0], return_exceptions=True)
        assert log.following == 1
        readers[1].cancel()
        await asyncio.gather(readers[1], return_exceptions=True)
        await wait_until(lambda: log.following == 0)


async def test_what_is_not_there_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    """Nor is it said to be, while the node does not know yet whether it is on its way."""
    log, logs = Log(), ContainerLogs(bench.commands)
    told: list[str] = []

    async def listening() -> None:
        told.append("listening")

    async def follow() -> None:
        async for _ in logs.stream(Request(node_id=NODE, container_name="nosuch", follow=True), listening=listening):
            pass

    async with node_on(bench, tmp_path, logs=log):
        follower = asyncio.create_task(follow())
        # Where the log ends, what comes, and its past.
        await wait_until(lambda: log.missed == 3)
        log.end(0)
        # Answers come one after the other: that of the past has come too.
        assert await read(logs) == ([], 0)
        log.sure.set()
        with pytest.raises(FleetError) as caught:
            await follower
        assert caught.value.reason == "CONTAINER_NOT_FOUND"
    assert not told
    assert not logs._feeds
