"""Exclusive work begins on a lease that is surely its own, and is over on its node before that lease can end."""

from __future__ import annotations

import asyncio
import signal
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fleet.v1 import node_pb2

from tests.agent.helpers import (
    AgentProcess,
    Conversation,
    ScriptedServer,
    agent_running,
    alive,
    assign_of,
    children_of,
    let_go,
    settings_of,
)
from tests.waiting import wait_until

LEASE = 5.0


def work(token: str, prompt: str = "wait") -> node_pb2.Assign:
    assign = assign_of(token, prompt)
    assign.exclusive = True
    return assign


class LeasingServer(ScriptedServer):
    """Acknowledges heartbeats as long as it is told to."""

    def __init__(self) -> None:
        super().__init__(lease_seconds=LEASE)
        self.acknowledges = True
        self.drops: list[str] = []

    def on_heard(self, talk: Conversation, message: node_pb2.AgentMessage) -> None:
        if message.WhichOneof("message") == "heartbeat" and self.acknowledges:
            sequence = message.heartbeat.sequence
            talk.say(heartbeat_ack=node_pb2.HeartbeatAck(sequence=sequence, drop_tokens=self.drops))


@pytest.fixture
async def server() -> AsyncIterator[LeasingServer]:
    scripted = LeasingServer()
    await scripted.start()
    try:
        yield scripted
    finally:
        await scripted.stop()


async def test_it_begins_once_the_server_has_heard_of_it_again(server: LeasingServer, tmp_path: Path) -> None:
    server.acknowledges = False
    settings = settings_of(tmp_path, server.address)
    async with agent_running(settings):
        talk = await server.conversation()
        talk.say(assign=work("t1"))
        await talk.about("accepted", "t1")
        beats = len(talk.all("heartbeat"))
        await wait_until(lambda: len(talk.all("heartbeat")) > beats + 3)
        assert not talk.all("started")
        server.acknowledges = True
        await talk.about("started", "t1")
        # It lives as long as its lease is renewed, which is far longer than one lease.
        begun = time.monotonic()
        await wait_until(lambda: time.monotonic() - begun > 1.5 * LEASE)
        let_go(settings, "t1")
        assert not (await talk.about("complete", "t1")).HasField("error")


async def test_without_heartbeats_it_is_dead_before_its_lease_can_end(server: LeasingServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1", "pulse"))
        await talk.about("tick", "t1")
        (pid,) = [slot.pid for slot in agent.runner._slots if slot.pid]
        renewed = time.monotonic()
        server.acknowledges = False
        await wait_until(lambda: not alive(pid))
        # The last acknowledged heartbeat was begun at most at `renewed`. What it still did counts, not when a busy
        # machine saw its end.
        (worked,) = struct.unpack("d", (tmp_path / "pulse").read_bytes())
        assert worked < renewed + LEASE
        await wait_until(lambda: agent.runner.slots_free == 1)
        # Nobody is told: the server finds its lease run out. The slot is fit for other work.
        assert {"complete", "stopped", "released"}.isdisjoint(talk.kinds())
        talk.say(assign=assign_of("t2"))
        await talk.about("complete", "t2")


async def test_an_engine_that_ignores_the_alarm_is_ended_by_its_agent(server: LeasingServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1", "deaf"))
        await talk.first("tick")
        (pid,) = [slot.pid for slot in agent.runner._slots if slot.pid]
        server.acknowledges = False
        await wait_until(lambda: not alive(pid))
        await wait_until(lambda: agent.runner.slots_free == 1)


async def test_a_cut_stream_ends_it_and_leaves_other_work_alone(server: LeasingServer, tmp_path: Path) -> None:
    async with agent_running(settings_of(tmp_path, server.address, slots=2, reconnect_seconds=60)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1"))
        talk.say(assign=assign_of("t2", "wait"))
        await talk.about("started", "t1")
        await talk.about("started", "t2")
        await server.stop()
        await wait_until(lambda: agent.runner.slots_free == 1)
        assert [held.token for held in agent.runner.running()] == ["t2"]


async def test_a_stopped_agent_does_not_keep_it_alive(server: LeasingServer, tmp_path: Path) -> None:
    """The kernel ends the engine's process, who else could."""
    async with AgentProcess(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1"))
        await talk.about("started", "t1")
        children = children_of(agent.pid)
        agent.signal(signal.SIGSTOP)
        try:
            await wait_until(lambda: not all(alive(pid) for pid in children))
        finally:
            agent.signal(signal.SIGCONT)


async def test_what_the_server_gave_to_another_is_not_begun(server: LeasingServer, tmp_path: Path) -> None:
    server.drops = ["t1"]
    async with agent_running(settings_of(tmp_path, server.address)) as agent:
        talk = await server.conversation()
        talk.say(assign=work("t1"))
        await talk.about("accepted", "t1")
        await wait_until(lambda: agent.runner.slots_free == 1)
        assert not talk.all("started")


async def test_an_exclusive_assign_is_followed_by_a_heartbeat_at_once(server: LeasingServer, tmp_path: Path) -> None:
    # No other heartbeat comes, to renew a lease.
    server.heartbeat_seconds = server.lease_seconds = 3600
    async with agent_running(settings_of(tmp_path, server.address)):
        talk = await server.conversation()
        talk.say(assign=work("t1", "paint"))
        async with asyncio.timeout(50):
            await talk.about("complete", "t1")
        assert len(talk.all("heartbeat")) == 1
