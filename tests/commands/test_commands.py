"""Commands from the server to a node and back: real gRPC, real journal, handlers that the tests give."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from fleet.v1 import command_pb2, fleet_pb2, types_pb2

from fleet_agent.commands import CallOverError, CommandChannel, CommandDesk, CommandFault, CommandJournal
from fleet_server.domain.errors import FleetError
from fleet_server.services.commands import Commands, CommandSettings
from tests.agent.helpers import agent_running, settings_of
from tests.commands.node import NODE, node_on
from tests.services.agents.bench import Bench
from tests.waiting import wait_until

Command = command_pb2.Command
Answer = command_pb2.ServeCommandResponse


def execute(command_id: str = "") -> Command:
    return Command(command_id=command_id, exec=fleet_pb2.ExecRequest(node_id=NODE, command="true"))


def listing() -> Command:
    return Command(list_containers=fleet_pb2.ListContainersRequest(node_id=NODE))


class Notes:
    """A handler that counts what it is given."""

    def __init__(self, work: Callable[[Command, CommandChannel], Awaitable[None]] | None = None) -> None:
        self.seen: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self._work = work

    async def __call__(self, command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        self.seen.append(command.command_id)
        if self._work is not None:
            await self._work(command, channel)
        await self.gate.wait()
        return command_pb2.CommandEnd(exec=fleet_pb2.ExecResponse(stdout=f"run {len(self.seen)}"))


async def test_a_command_is_run_and_answered(bench: Bench, tmp_path: Path) -> None:
    async def tell(command: Command, channel: CommandChannel) -> None:
        await channel.progress(types_pb2.OperationProgress(operation="deploy", progress=40))

    ticks: list[int] = []
    async with agent_running(settings_of(tmp_path, bench.address)) as agent:
        agent.desk.register("exec", Notes(tell))
        await wait_until(lambda: bench.sessions.live(NODE))
        end = await bench.commands.run(NODE, execute(), timeout=50, progress=lambda tick: ticks.append(tick.progress))
    assert end.exec.stdout == "run 1"
    assert ticks == [40]


async def test_the_same_id_acts_once_and_gives_the_same_end(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    async with node_on(bench, tmp_path, exec=notes):
        same = [bench.commands.run(NODE, execute("one"), timeout=50) for _ in range(3)]
        ends = await asyncio.gather(*same)
        await bench.commands.run(NODE, execute("two"), timeout=50)
    assert [end.exec.stdout for end in ends] == ["run 1"] * 3
    assert notes.seen == ["one", "two"]


async def test_reads_are_run_each_time(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    async with node_on(bench, tmp_path, list_containers=notes):
        for _ in range(2):
            await bench.commands.run(NODE, listing(), timeout=50)
    assert len(notes.seen) == 2


async def test_a_fault_is_the_callers_error(bench: Bench, tmp_path: Path) -> None:
    tries: list[str] = []

    async def refuse(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        tries.append(command.command_id)
        raise CommandFault("PORT_IN_USE", "host_port: 8080 is taken", acted=len(tries) > 1)

    async with node_on(bench, tmp_path, exec=refuse):
        for _ in range(3):
            with pytest.raises(FleetError) as caught:
                await bench.commands.run(NODE, execute("one"), timeout=50)
            assert (caught.value.reason, caught.value.detail) == ("PORT_IN_USE", "host_port: 8080 is taken")
    # What changed nothing may be tried again; what acted is kept.
    assert tries == ["one", "one"]


async def test_unknown_nodes_absent_nodes_and_unknown_commands(bench: Bench, tmp_path: Path) -> None:
    for_sure = "NODE_NOT_FOUND"
    with pytest.raises(FleetError) as caught:
        await bench.commands.run(NODE, execute(), timeout=50)
    assert caught.value.reason == for_sure
    async with node_on(bench, tmp_path):
        with pytest.raises(FleetError) as caught:
            await bench.commands.run(NODE, execute(), timeout=50)
        assert caught.value.reason == "NOT_IMPLEMENTED"
    await wait_until(lambda: bench.sessions.live(NODE) is None)
    with pytest.raises(FleetError) as caught:
        await bench.commands.run(NODE, execute(), timeout=50)
    assert caught.value.reason == "NODE_OFFLINE"
    with pytest.raises(FleetError) as caught:
        async with bench.commands.open(NODE, execute()):
            pass
    assert caught.value.reason == "NODE_OFFLINE"


async def test_an_effect_goes_on_when_its_caller_has_no_more_time(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    notes.gate.clear()
    async with node_on(bench, tmp_path, exec=notes) as node:
        with pytest.raises(FleetError) as caught:
            await bench.commands.run(NODE, execute("one"), timeout=0.3)
        assert caught.value.reason == "TIMEOUT"
        await wait_until(lambda: not node.desk._tasks)
        again = asyncio.create_task(bench.commands.run(NODE, execute("one"), timeout=50))
        notes.gate.set()
        assert (await again).exec.stdout == "run 1"
    assert notes.seen == ["one"]


async def test_a_lost_stream_hides_no_end(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    notes.gate.clear()
    async with node_on(bench, tmp_path, exec=notes) as node:
        running = asyncio.create_task(bench.commands.run(NODE, execute("one"), timeout=50))
        await wait_until(lambda: notes.seen)
        await node.hang_up()
        await node.dial()
        notes.gate.set()
        assert (await running).exec.stdout == "run 1"
    assert notes.seen == ["one"]


async def test_what_an_agent_did_when_it_died_is_unknown_and_never_repeated(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    notes.gate.clear()
    async with node_on(bench, tmp_path, exec=notes):
        running = asyncio.create_task(bench.commands.run(NODE, execute("one"), timeout=50))
        await wait_until(lambda: notes.seen)
    async with node_on(bench, tmp_path, exec=notes):
        with pytest.raises(FleetError) as caught:
            await running
        assert caught.value.reason == "OUTCOME_UNKNOWN"
        with pytest.raises(FleetError) as caught:
            await bench.commands.run(NODE, execute("one"), timeout=50)
        assert caught.value.reason == "OUTCOME_UNKNOWN"
    assert notes.seen == ["one"]


def impatient(bench: Bench) -> Commands:
    """The bench's commands, which do not wait for long for a node that was lost."""
    commands = Commands(bench.sessions, bench.fleet, CommandSettings(return_seconds=0.2, again_seconds=0.1))
    commands._exchanges = bench.commands._exchanges
    return commands


async def test_a_node_that_stays_away_leaves_unknown_what_it_began(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    notes.gate.clear()
    async with node_on(bench, tmp_path, exec=notes, list_containers=notes):
        effect = asyncio.create_task(impatient(bench).run(NODE, execute("one"), timeout=50))
        read = asyncio.create_task(impatient(bench).run(NODE, listing(), timeout=50))
        await wait_until(lambda: len(notes.seen) == 2)
    for task, reason in ((effect, "OUTCOME_UNKNOWN"), (read, "NODE_OFFLINE")):
        with pytest.raises(FleetError) as caught:
            await task
        assert caught.value.reason == reason


async def test_what_was_never_begun_is_known_not_to_have_happened(bench: Bench, tmp_path: Path) -> None:
    notes = Notes()
    async with node_on(bench, tmp_path, exec=notes) as node:
        node.desk._limit = 0
        effect = asyncio.create_task(impatient(bench).run(NODE, execute("one"), timeout=50))
        await wait_until(lambda: bench.commands._exchanges)
        await node.hang_up()
        with pytest.raises(FleetError) as caught:
            await effect
    assert caught.value.reason == "NODE_OFFLINE"
    assert not notes.seen


async def test_nothing_is_done_for_nobody(bench: Bench, tmp_path: Path) -> None:
    """A command that nobody waits for, and one that is another session's, are not begun."""
    notes = Notes()
    async with node_on(bench, tmp_path, exec=notes) as node:
        node.desk.take(node.road, node.session, execute("stale"))
        await wait_until(lambda: not node.desk._tasks)
        notes.gate.clear()
        running = asyncio.create_task(bench.commands.run(NODE, execute("one"), timeout=50))
        await wait_until(lambda: notes.seen)
        with pytest.raises(CallOverError):
            await node.road.begin("another-session", "one")
        notes.gate.set()
        await running
    assert notes.seen == ["one"]


async def test_a_stream_carries_parts_both_ways_and_ends_with_its_caller(bench: Bench, tmp_path: Path) -> None:
    over = asyncio.Event()

    async def echo(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        try:
            async for part in channel.inputs():
                if part.WhichOneof("part") == "close_stdin":
                    return command_pb2.CommandEnd(exit=types_pb2.Exit(exit_code=7))
                await channel.stdout(part.stdin.upper())
            return command_pb2.CommandEnd()
        finally:
            over.set()

    start = fleet_pb2.ExecStart(command="cat")
    async with node_on(bench, tmp_path, exec_stream=echo):
        async with bench.commands.open(NODE, Command(exec_stream=start)) as stream:
            parts = aiter(stream)
            for word in (b"one", b"two"):
                assert await stream.send(Answer(stdin=word))
                assert (await anext(parts)).stdout == word.upper()
            await stream.send(Answer(close_stdin=fleet_pb2.CloseStdin()))
            assert (await anext(parts)).end.exit.exit_code == 7
        over.clear()
        async with bench.commands.open(NODE, Command(exec_stream=start)):
            pass
        async with asyncio.timeout(50):
            await over.wait()


async def test_a_slow_reader_holds_the_agent_back(bench: Bench, tmp_path: Path) -> None:
    written = 0

    async def flood(command: Command, channel: CommandChannel) -> command_pb2.CommandEnd:
        nonlocal written
        for _ in range(400):
            await channel.stdout(bytes(65_536))
            written += 1
        return command_pb2.CommandEnd(exit=types_pb2.Exit())

    async with (
        node_on(bench, tmp_path, exec_stream=flood, exec=Notes()),
        bench.commands.open(NODE, Command(exec_stream=fleet_pb2.ExecStart(command="yes"))) as stream,
    ):
        parts = aiter(stream)
        await anext(parts)
        stuck_at = await wait_until(lambda: (written > 1) and written)
        # While the stream is not read, other commands go through, and the flood comes to a halt.
        for _ in range(20):
            await bench.commands.run(NODE, execute(), timeout=50)
        assert written >= stuck_at
        assert written < 200
        received = 65_536 + sum([len(part.stdout) async for part in parts])
    assert received == 400 * 65_536


async def test_the_journal_is_bounded(tmp_path: Path) -> None:
    clock = 1_000_000.0
    journal = CommandJournal(tmp_path / "c.db", keep_entries=20, keep_bytes=10_000, clock=lambda: clock)
    assert await journal.open() == []
    big = command_pb2.CommandEnd(exec=fleet_pb2.ExecResponse(stdout="x" * 1_000))
    for number in range(40):
        clock += 30
        assert await journal.begin(f"c{number:03}") is None
        await journal.end(f"c{number:03}", big)
    assert (await journal.begin("c039")) == big
    old = await journal.begin("c025")
    assert old is not None
    assert "kept no more" in old.error.detail
    clock += 86_400
    await journal.begin("new")
    await journal.aclose()
    again = CommandJournal(tmp_path / "c.db", clock=lambda: clock)
    assert await again.open() == ["new"]
    assert await again.begin("c025") is None
    await again.aclose()


async def test_too_many_commands_wait_for_the_servers_next_try(tmp_path: Path) -> None:
    desk = CommandDesk(CommandJournal(tmp_path / "c.db"), limit=0)
    await desk.open()
    desk.take(None, "session", execute("one"))  # type: ignore[arg-type]
    await desk.aclose()
