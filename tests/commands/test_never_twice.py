"""Whatever is lost on the way, a command takes effect once, or its caller hears that nobody knows."""

from __future__ import annotations

import asyncio
import random
import shlex
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, fleet_pb2

from fleet_agent.commands import CommandCall
from fleet_agent.docker_engine import DockerEngine
from fleet_agent.shell.commands import ShellCommands
from fleet_server.domain.errors import FleetError
from fleet_server.services.commands import Commands, CommandSettings
from tests.commands.node import NODE, DeskNode
from tests.services.agents.bench import Bench

COMMANDS = 1_000
AT_ONCE = 16


class Nemesis:
    """Cuts calls and streams, loses replies, kills and restarts the agent at random points."""

    def __init__(self, bench: Bench, folder: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.kills = 0
        self.cuts = 0
        self.lost = 0
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

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.chance.uniform(0.05, 0.5))
            if self.chance.random() < 0.4:
                await self._kill()
            else:
                self.cuts += 1
                await self.node.hang_up()
                await self.node.dial()

    async def _kill(self) -> None:
        """The agent ends as by SIGKILL: no end is written down, and its programs go with it."""
        self.kills += 1
        await self.end()
        self.node = self._born()
        self.node.instance_id = f"boot-{self.kills}"
        await self.begin()

    async def end(self) -> None:
        await self.node.close()
        await self.node.desk.aclose()
        await self.node.channel.close()


async def test_a_thousand_appends_among_losses(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nemesis = Nemesis(bench, tmp_path, seed=7)
    finish = CommandCall.finish

    async def lose(call: CommandCall, end: command_pb2.CommandEnd, seconds: float) -> None:
        if nemesis.chance.random() < 0.1:
            nemesis.lost += 1
            call.cancel()
            return
        await finish(call, end, seconds)

    monkeypatch.setattr(CommandCall, "finish", lose)
    commands = Commands(bench.sessions, bench.fleet, CommandSettings(again_seconds=0.3, pause_seconds=0.01))
    monkeypatch.setattr(bench.commands, "_exchanges", commands._exchanges)
    target = tmp_path / "lines"
    await nemesis.begin()
    trouble = asyncio.create_task(nemesis.run())
    ends: dict[int, str] = {}
    numbers = iter(range(COMMANDS))

    async def caller() -> None:
        for number in numbers:
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
    for number, end in ends.items():
        if end == "done":
            assert number in lines
        elif end == "NODE_OFFLINE":
            assert number not in lines
        else:
            assert end == "OUTCOME_UNKNOWN", end
    told = list(ends.values())
    assert told.count("done") > COMMANDS // 2
    assert min(nemesis.kills, nemesis.cuts, nemesis.lost) > 5


async def _append(commands: Commands, target: Path, number: int) -> str:
    request = fleet_pb2.ExecRequest(
        node_id=NODE, command=f"echo {number} >> {shlex.quote(str(target))}", shell=True, timeout_seconds=20
    )
    command = command_pb2.Command(command_id=f"c{number}", exec=request)
    while True:
        try:
            await commands.run(NODE, command, timeout=30)
        except FleetError as error:
            if error.reason == "NODE_OFFLINE":
                # It was never begun: the caller may give it again, under the same id.
                await asyncio.sleep(0.02)
                continue
            return error.reason
        return "done"
