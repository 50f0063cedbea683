"""Whatever is lost on the way, a command takes effect once, or its caller hears that nobody knows.

`make soak` gives 10,000 commands.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import shlex
from collections import Counter
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, fleet_pb2

from fleet_agent.commands import CommandCall, CommandJournal
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.shell.commands import ShellCommands
from fleet_server.domain.errors import FleetError
from fleet_server.services.commands import Commands, CommandSettings
from tests.commands.node import NODE, DeskNode
from tests.services.agents.bench import Bench
from tests.waiting import wait_until

COMMANDS = int(os.environ.get("FLEET_COMMANDS", "1000"))
AT_ONCE = 16
LONG = max(400, COMMANDS // 10)
POINTS = ("begun", "acted", "ended")
"""Where an agent is killed: the command is written down and nothing done; it took effect; its end is written down, and
nobody was told."""


class Nemesis:
    """Cuts calls and streams, loses replies, kills and restarts the agent at random points."""

    def __init__(self, bench: Bench, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.kills = 0
        self.cuts = 0
        self.lost = 0
        self.reached: Counter[str] = Counter()
        self.ends: dict[int, str] = {}
        """What callers were told, by the numbers of their commands."""
        self._armed = ""
        self._due = asyncio.Event()
        self._bench = bench
        self._folder = folder
        self.node = self._born()

    def _born(self) -> DeskNode:
        node = DeskNode(self._bench.address, self._folder)
        ShellCommands(NODE, DockerEngine("unix:///nowhere")).register(node.desk)
        return node

    async def begin(self) -> None:
        await self.node.desk.open()
        await self.node.dial()

    @property
    def content(self) -> bool:
        """Whether enough has happened."""
        points = min(self.reached[point] for point in POINTS)
        return points >= 2 and min(self.kills, self.cuts, self.lost) > 5

    async def run(self) -> None:
        points = itertools.cycle((*POINTS, ""))
        while True:
            # So many commands later, however long they take: on a slow machine all would be lost, one after the other.
            later = len(self.ends) + self.chance.randint(10, 60)
            await wait_until(lambda later=later: len(self.ends) >= later, seconds=LONG)  # type: ignore[misc]
            if self.chance.random() < 0.6:
                await self._kill(next(points))
            else:
                self.cuts += 1
                await self.node.hang_up()
                await self.node.dial()

    async def reach(self, point: str) -> None:
        """A command is there. Where the agent is to be killed at it, nothing comes after."""
        if self._armed == point:
            self._armed = ""
            self.reached[point] += 1
            self._due.set()
            await asyncio.Event().wait()

    async def _kill(self, point: str) -> None:
        """The agent ends as by SIGKILL, at the point or wherever it is: what is not written down by then never is, and
        its programs go with it."""
        if point:
            self._due.clear()
            self._armed = point
            await self._due.wait()
        self.kills += 1
        await self.end()
        self.node = self._born()
        self.node.instance_id = f"boot-{self.kills}"
        await self.begin()

    async def end(self) -> None:
        await self.node.close()
        await self.node.desk.aclose()
        await self.node.channel.close()


@pytest.mark.timeout(LONG)
async def test_a_thousand_appends_among_losses(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nemesis = Nemesis(bench, tmp_path, seed=7)
    finish = CommandCall.finish

    async def lose(call: CommandCall, end: command_pb2.CommandEnd, seconds: float) -> None:
        if nemesis.chance.random() < 0.1:
            nemesis.lost += 1
            call.cancel()
            return
        await finish(call, end, seconds)

    begin, end = CommandJournal.begin, CommandJournal.end

    async def begun(journal: CommandJournal, command_id: str) -> command_pb2.CommandEnd | None:
        known = await begin(journal, command_id)
        if known is None:
            await nemesis.reach("begun")
        return known

    async def ended(journal: CommandJournal, command_id: str, outcome: command_pb2.CommandEnd) -> None:
        await nemesis.reach("acted")
        await end(journal, command_id, outcome)
        await nemesis.reach("ended")

    monkeypatch.setattr(CommandCall, "finish", lose)
    monkeypatch.setattr(CommandJournal, "begin", begun)
    monkeypatch.setattr(CommandJournal, "end", ended)
    commands = Commands(bench.sessions, bench.fleet, CommandSettings(again_seconds=0.3, pause_seconds=0.01))
    monkeypatch.setattr(bench.commands, "_exchanges", commands._exchanges)
    target = tmp_path / "lines"
    await nemesis.begin()
    trouble = asyncio.create_task(nemesis.run())
    ends = nemesis.ends
    numbers = itertools.count()

    async def caller() -> None:
        while (number := next(numbers)) < COMMANDS or not nemesis.content:
            ends[number] = await _append(commands, target, number)

    try:
        async with asyncio.TaskGroup() as callers:
            for _ in range(AT_ONCE):
                callers.create_task(caller())
    finally:
        trouble.cancel()
        outcome = await asyncio.gather(trouble, return_exceptions=True)
        await nemesis.end()
    assert isinstance(outcome[0], asyncio.CancelledError), outcome
    lines = [int(line) for line in target.read_text().split()]
    assert len(lines) == len(set(lines)), "a command took effect twice"
    for number, told_of in ends.items():
        if told_of == "done":
            assert number in lines
        elif told_of == "NODE_OFFLINE":
            assert number not in lines
        else:
            assert told_of == "OUTCOME_UNKNOWN", told_of
    told = list(ends.values())
    assert told.count("done") > COMMANDS // 2


async def _append(commands: Commands, target: Path, number: int) -> str:
    request = fleet_pb2.ExecRequest(
        node_id=NODE, command=f"echo {number} >> {shlex.quote(str(target))}", shell=True, timeout_seconds=300
    )
    command = command_pb2.Command(command_id=f"c{number}", exec=request)
    while True:
        try:
            await commands.run(NODE, command, timeout=300)
        except FleetError as error:
            if error.reason == "NODE_OFFLINE":
                # It was never begun: the caller may give it again, under the same id.
                await asyncio.sleep(0.02)
                continue
            return error.reason
        return "done"
