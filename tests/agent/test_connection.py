"""The agent and its connection: inventory, servers that hang or leave, reconnects, hung drivers."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from fleet.v1 import node_pb2, types_pb2

from fleet_agent.metrics.reader import MetricsReader, Readings
from fleet_agent.session import SessionEndedError, _cause
from tests.agent.helpers import (
    Agent,
    Reply,
    ScriptedServer,
    agent_running,
    assign_of,
    let_go,
    settings_of,
)
from tests.waiting import wait_until


async def test_the_inventory_is_sent_again_when_model_files_change(server: ScriptedServer, tmp_path: Path) -> None:
    from fleet_agent.engines import sketch_model

    models = tmp_path / "models"
    settings = settings_of(tmp_path, server.address, engines=("sketch",))
    async with agent_running(settings):
        talk = await server.conversation()
        await talk.first("heartbeat")
        assert not any(beat.inventory for beat in talk.all("heartbeat"))
        assert sketch_model.main(["--out", str(models), "--name", "new.safetensors"]) == 0
        beat = await talk.first(
            "heartbeat", lambda beat: any(model.name == "new.safetensors" and model.sha256 for model in beat.models)
        )
        assert beat.inventory
        assert [engine.name for engine in beat.engines] == ["sketch"]
        (models / "checkpoints" / "new.safetensors").unlink()
        gone = await talk.first("heartbeat", lambda later: later.inventory and later.sequence > beat.sequence)
        assert [model.name for model in gone.models] == ["sketch"]
        await talk.first("heartbeat", lambda later: later.sequence > gone.sequence and not later.inventory)


async def test_a_server_that_takes_nothing_loses_its_session(server: ScriptedServer, tmp_path: Path) -> None:
    """A deaf server reads no message: sooner or later the flow control of the stream stops the writer."""
    server.deaf = True
    server.heartbeat_seconds = 0.001
    settings = settings_of(tmp_path, server.address, write_seconds=1)
    async with agent_running(settings, BulkyReadings(tmp_path)) as agent:
        await wait_until(lambda: server.deafened)
        server.deaf, server.heartbeat_seconds = False, 0.1
        talk = await wait_until(lambda: next((one for one in server.conversations if one.all("heartbeat")), None))
        talk.say(assign=assign_of("t1"))
        await talk.first("complete")
        assert agent.runner.slots_free == 1


class BulkyReadings(MetricsReader):
    """Readings of 100 kB, to fill a window soon."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, 5)

    async def read(self) -> Readings:
        return Readings(types_pb2.Host(), warnings=["x" * 100_000])


async def test_a_server_that_does_not_welcome_is_left(server: ScriptedServer, tmp_path: Path) -> None:
    server.silent = True
    async with agent_running(settings_of(tmp_path, server.address, welcome_seconds=0.2)):
        await server.conversation(1)
        server.silent = False
        await wait_until(lambda: len(server.conversations) > 2)


async def test_a_first_message_that_is_no_welcome_ends_the_session(server: ScriptedServer, tmp_path: Path) -> None:
    server.first_message = Reply(goodbye=node_pb2.ServerGoodbye())
    async with agent_running(settings_of(tmp_path, server.address)):
        await server.conversation(1)


async def test_after_the_servers_goodbye_the_agent_comes_back(server: ScriptedServer, tmp_path: Path) -> None:
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=assign_of("t1", "wait"))
        await talk.first("started")
        talk.say(goodbye=node_pb2.ServerGoodbye(retry_after_seconds=0.1))
        again = await server.conversation(1)
        assert [held.token for held in again.hello.held] == ["t1"]
        let_go(settings, "t1")
        await again.first("complete")


async def test_an_error_in_the_middle_of_a_session_is_no_end_of_the_agent(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()

        def broken(job_id: str, token: str) -> None:
            monkeypatch.undo()
            raise ZeroDivisionError("a bug of ours")

        monkeypatch.setattr(agent.runner, "cancel", broken)
        talk.say(cancel=node_pb2.CancelAttempt(job_id="job-t1", token="t1"))
        again = await server.conversation(1)
        again.say(assign=assign_of("t2"))
        await again.first("complete")


def pauses(agent: Agent, attempt: int, count: int = 300) -> list[float]:
    return [agent.session._pause(attempt) for _ in range(count)]


async def test_reconnects_are_spread(tmp_path: Path) -> None:
    agent = Agent(settings_of(tmp_path, reconnect_seconds=10))
    first = pauses(agent, 0)
    assert 0 <= min(first) < 1
    assert 9 < max(first) <= 10
    assert max(pauses(agent, 2)) > 12
    assert 25 < max(pauses(agent, 50)) <= 30
    assert 25 < max(pauses(agent, 100_000)) <= 30


async def attempts_seen(agent: Agent, count: int) -> list[int]:
    """The attempts for which the agent drew its first pauses; each pause is none."""
    seen: list[int] = []
    enough = asyncio.Event()

    def pause(attempt: int) -> float:
        seen.append(attempt)
        if len(seen) >= count:
            enough.set()
        return 0.0

    agent.session._pause = pause  # type: ignore[method-assign]
    running = asyncio.create_task(agent.session.run())
    try:
        await asyncio.wait_for(enough.wait(), 50)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return seen[:count]


async def test_a_server_that_is_away_is_dialled_at_the_same_pace_and_one_that_refuses_is_given_time(
    tmp_path: Path,
) -> None:
    """So the whole fleet is back soon after its server, and does not storm one that is too busy."""
    assert await attempts_seen(Agent(settings_of(tmp_path / "away")), 3) == [0, 0, 0]
    refusing = grpc.aio.server()
    port = refusing.add_insecure_port("127.0.0.1:0")
    await refusing.start()
    try:
        assert await attempts_seen(Agent(settings_of(tmp_path / "busy", f"127.0.0.1:{port}")), 3) == [1, 2, 3]
    finally:
        await refusing.stop(0)


async def test_what_the_server_asks_for_is_waited_with_jitter_on_top(tmp_path: Path) -> None:
    agent = Agent(settings_of(tmp_path, reconnect_seconds=10))
    waits = []
    for _ in range(100):
        agent.session._retry_after = 60
        waits.append(agent.session._pause(0))
    assert min(waits) >= 60
    assert max(waits) - min(waits) > 5
    assert agent.session._pause(0) <= 10


async def test_a_hung_driver_does_not_stop_the_heartbeats(server: ScriptedServer, tmp_path: Path) -> None:
    import threading

    stuck = threading.Event()

    class Hanging:
        def read(self) -> tuple[list[types_pb2.Gpu], list[str]]:
            stuck.wait(40)
            return [], []

    metrics = MetricsReader(tmp_path, 0.05, [("stuck", types_pb2.METRICS_SOURCE_NVML, Hanging)])
    try:
        async with agent_running(settings_of(tmp_path, server.address), metrics):
            talk = await server.conversation()
            beat = await talk.first("heartbeat", lambda beat: beat.sequence >= 3)
            assert any("have not answered" in warning for warning in beat.warnings)
            assert sum(thread.name == "readings" for thread in threading.enumerate()) == 1
    finally:
        stuck.set()


async def test_a_write_after_the_end_of_the_stream_is_a_reconnect(server: ScriptedServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        for round_ in range(5):
            talk = await server.conversation(round_)
            talk.end()
            for number in range(20):
                agent.runner.cancel(f"job-{number}", f"t{number}")
        await server.conversation(5)


def test_of_several_errors_the_one_with_the_servers_status_is_told() -> None:
    group = ExceptionGroup("", [ValueError("writer"), ExceptionGroup("", [SessionEndedError("the status")])])
    assert str(_cause(group)) == "the status"
    assert isinstance(_cause(ValueError("x")), ValueError)
