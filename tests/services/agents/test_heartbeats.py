"""Heartbeats: readings for callers, the authority over leases, and what is in the node's folders."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import node_pb2_grpc, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from fleet_server.services.nodes import address_of, info_of, now_ms
from fleet_server.services.reaper import Reaper, ReaperSettings
from fleet_server.store import decode_node, open_store
from tests.services.agents.agent import image_engine, wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on
from tests.store.conftest import Server

NO_GRACE = ReaperSettings(grace_seconds=0, sweep_seconds=0.02, check_seconds=0.02)


async def test_readings_are_shown_as_they_came(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    gpu = types_pb2.Gpu(index=0, name="Orin", memory_total_bytes=32 << 30, temperature_celsius=61)
    await agent.beat(
        host=types_pb2.Host(cpu_count=12),
        gpus=[gpu],
        metrics_source=types_pb2.MetricsSource.METRICS_SOURCE_JETSON,
        warnings=["power: not readable"],
        loaded_models=[pb.LoadedFile(name="sketch", engine="sketch", loaded_seconds_ago=3)],
    )
    stub = node_pb2_grpc.NodeStub(agent._channel)
    (beat,) = (await stub.ListHeartbeats(pb.ListHeartbeatsRequest())).heartbeats
    node = (await stub.GetNode(pb.GetNodeRequest(node_id="agx0"))).node
    for seen in (beat, node):
        assert list(seen.gpus) == [gpu]
        assert seen.host.cpu_count == 12
        assert seen.metrics_source == types_pb2.MetricsSource.METRICS_SOURCE_JETSON
        assert list(seen.warnings) == ["power: not readable"]
        assert list(seen.loaded_models) == ["sketch"]
        assert (seen.slots, seen.slots_free) == (1, 1)
        assert seen.heartbeat_time.seconds > 0
    assert node.create_time.seconds > 0 and node.connect_time.seconds > 0
    view = bench.fleet.node("agx0")
    assert view is not None and view.gpu_memory_bytes == 32 << 30
    assert not (await stub.ListHeartbeats(pb.ListHeartbeatsRequest(cluster="llm"))).heartbeats


async def test_an_unknown_node_is_not_found(bench: Bench) -> None:
    stub = node_pb2_grpc.NodeStub(bench.agent()._channel)
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.GetNode(pb.GetNodeRequest(node_id="nobody"))
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await stub.CordonNode(pb.CordonNodeRequest(node_id="nobody"))
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_nodes_come_in_pages_by_name(bench: Bench) -> None:
    for name in ("c", "a", "b"):
        await bench.agent(name).dial()
    stub = node_pb2_grpc.NodeStub(bench.agents[0]._channel)
    first = await stub.ListNodes(pb.NodeListNodesRequest(limit=2))
    second = await stub.ListNodes(pb.NodeListNodesRequest(limit=2, page_token=first.next_page_token))
    assert [node.node_id for node in (*first.nodes, *second.nodes)] == ["a", "b", "c"]
    assert second.next_page_token == ""


async def test_a_changed_inventory_is_an_event_and_an_unchanged_beat_is_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beats that come late say the same still: how late is test_quiet_beats.py's.
    monkeypatch.setattr("fleet_server.services.nodes._SAME_SECONDS", 3600.0)
    agent = bench.agent()
    await agent.dial()
    before = await bench.store.events.last_id()
    for _ in range(3):
        await agent.beat()
    assert await bench.store.events.last_id() == before
    await agent.beat(
        inventory=True, models=[pb.ModelFile(name="new", kind="lora")], engines=[image_engine(version="2")]
    )
    events, _ = await bench.store.events.read(before)
    assert [event.type for event in events] == ["node_update"]
    info = info_of(decode_node(events[0].fields))
    assert info.engines[0].version == "2"
    view = bench.fleet.node("agx0")
    assert view is not None and set(view.models) == {"new"}
    await agent.beat(loaded_models=[pb.LoadedFile(name="new", loaded_seconds_ago=1)])
    loaded = await bench.store.events.last_id()
    await agent.beat(loaded_models=[pb.LoadedFile(name="new", loaded_seconds_ago=2)])
    assert await bench.store.events.last_id() == loaded


@dataclass
class Aged:
    """A bench whose store is told what time it is: leases run out when a test says so, not while it stands still."""

    bench: Bench
    ahead_ms: list[int]

    def pass_by(self, seconds: float) -> None:
        self.ahead_ms[0] += int(seconds * 1000)

    async def reaped(self, **changes: Any) -> None:
        """One sweep of a reaper."""
        await Reaper(
            self.bench.store, self.bench.fleet, self.bench.dispatcher.wake, settings=replace(NO_GRACE, **changes)
        ).sweep()


@pytest.fixture
async def aged(valkey: Server, short_path: Path) -> AsyncIterator[Aged]:
    ahead_ms = [0]
    async with (
        open_store(valkey.url, namespace=secrets.token_hex(8), clock=lambda: now_ms() + ahead_ms[0]) as store,
        bench_on(store, short_path) as bench,
    ):
        yield Aged(bench, ahead_ms)


async def test_leases_live_by_heartbeats_alone(aged: Aged) -> None:
    """Two jobs run; the one that beats name stays, the other is lost with its lease and runs again."""
    bench, lease = aged.bench, QUICK.lease_seconds
    agent = bench.agent(slots=2)
    await agent.dial()
    await bench.submit()
    await bench.submit()
    kept, lost = await agent.start(), await agent.start()
    await wait_until(lambda: bench.started(lost.job_id))
    aged.pass_by(lease * 0.7)
    await agent.beat([(kept.job_id, kept.token)], slots=2)
    await aged.reaped()
    assert (await bench.job(lost.job_id)).token == lost.token
    aged.pass_by(lease * 0.7)
    await aged.reaped()
    record = await bench.job(kept.job_id)
    assert (record.state, record.token) == (JobState.RUNNING, kept.token)
    record = await bench.job(lost.job_id)
    assert (record.token != lost.token, record.losses) == (True, 1)
    attempt = types_pb2.JobAttempt.FromString(record.attempts[0])
    assert (attempt.error.reason, attempt.node_id) == ("NODE_LOST", "agx0")


async def test_nothing_is_reaped_while_agents_may_still_come_back(aged: Aged) -> None:
    bench = aged.bench
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await wait_until(lambda: bench.started(job_id))
    await agent.hang_up()
    aged.pass_by(QUICK.lease_seconds + 1)
    for _ in range(3):
        await aged.reaped(grace_seconds=60)
    assert (await bench.job(job_id)).token == assign.token
    await aged.reaped()
    assert (await bench.job(job_id)).state is JobState.QUEUED


async def test_a_poisonous_job_fails_on_the_one_node_that_can_run_it(aged: Aged) -> None:
    bench = aged.bench
    job_id = await bench.submit(max_retries=0)
    for boot in range(3):
        agent = bench.agent(instance_id=f"boot-{boot}")
        await agent.dial()
        await agent.start()
        await wait_until(lambda: bench.started(job_id))
        await agent.hang_up()
        aged.pass_by(QUICK.lease_seconds + 1)
        await aged.reaped()
        assert (await bench.job(job_id)).losses == boot + 1
    record = await bench.job(job_id)
    assert record.state is JobState.FAILED
    error = types_pb2.JobError.FromString(record.error)
    assert (error.reason, error.code) == ("POISON", "INTERNAL")


async def test_losses_on_the_one_node_that_could_run_it_are_poison_too(aged: Aged) -> None:
    """Another node is there, but it cannot run the job; the leases run out, since no beat names the attempts."""
    bench = aged.bench
    agent, other = bench.agent(), bench.agent("agx1", models=[])
    await agent.dial()
    await other.dial()
    job_id = await bench.submit(max_retries=0)
    for _ in range(3):
        token = (await agent.start()).token
        await wait_until(lambda: bench.started(job_id))
        aged.pass_by(QUICK.lease_seconds + 1)
        await aged.reaped()
        assert (await bench.job(job_id)).token != token
        # Beats that do not name the attempt free its slot.
        for _ in range(2):
            await agent.beat()
    record = await bench.job(job_id)
    assert (record.state, record.losses) == (JobState.FAILED, 3)
    assert types_pb2.JobError.FromString(record.error).reason == "POISON"


async def failed(bench: Bench, job_id: str) -> bool:
    return (await bench.job(job_id)).state is JobState.FAILED


class Away:
    """Stands before a call of the store: while `away` it answers STORE_UNAVAILABLE, the call made (`after`) or not."""

    def __init__(self, call: Callable[..., Awaitable[Any]], *, after: bool) -> None:
        self.away = True
        self.tries = 0
        self._call = call
        self._after = after

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.tries += 1
        answer = None if self.away and not self._after else await self._call(*args, **kwargs)
        if self.away:
            raise FleetError("STORE_UNAVAILABLE", "the store cannot be reached")
        return answer


@pytest.mark.parametrize("after", [False, True], ids=["not written", "written but not answered"])
async def test_reports_wait_for_a_store_that_is_away(bench: Bench, after: bool) -> None:
    """The end of an attempt is settled when the store is back, once; heartbeats go on meanwhile."""
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await wait_until(lambda: bench.started(job_id))
    door = Away(bench.store.jobs.complete_many, after=after)
    bench.store.jobs.complete_many = door  # type: ignore[method-assign]
    for _ in range(3):
        await agent.send(complete=pb.JobComplete(job_id=job_id, token=assign.token))
    await wait_until(lambda: door.tries > 2)
    await agent.beat()
    assert not [message for message in agent.heard if message.HasField("complete_ack")]
    door.away = False
    ack = (await agent.next("complete_ack")).complete_ack
    assert ack.outcome == (
        pb.CompleteOutcome.COMPLETE_OUTCOME_ALREADY if after else pb.CompleteOutcome.COMPLETE_OUTCOME_OK
    )
    await agent.beat()
    assert not [message for message in agent.heard if message.HasField("complete_ack")]
    assert (await bench.job(job_id)).state is JobState.SUCCEEDED


@pytest.mark.parametrize("after", [False, True], ids=["not written", "written but not answered"])
async def test_a_claim_whose_outcome_is_unknown_is_claimed_again(bench: Bench, after: bool) -> None:
    """The same token: the job is not claimed twice and not forgotten."""
    door = Away(bench.store.jobs.claim_and_look, after=after)
    bench.store.jobs.claim_and_look = door  # type: ignore[method-assign]
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    await wait_until(lambda: door.tries > 2)
    door.away = False
    assign = await agent.take()
    assert (assign.job_id, assign.attempt) == (job_id, 1)


async def test_a_departure_is_written_down_when_the_store_is_back(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    door = Away(bench.store.nodes.disconnect, after=False)
    bench.store.nodes.disconnect = door  # type: ignore[method-assign]
    await agent.hang_up()
    await wait_until(lambda: door.tries > 2)
    assert await bench.status() == "online"
    assert bench.fleet.nodes()[0].status == "disconnected"
    door.away = False
    await wait_until(lambda: bench.status_is("disconnected"))


async def test_a_hello_whose_store_is_away_is_told_to_come_again(bench: Bench) -> None:
    door = Away(bench.store.nodes.connect, after=True)
    bench.store.nodes.connect = door  # type: ignore[method-assign]
    agent = bench.agent()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await agent.dial()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    await wait_until(lambda: bench.status_is("disconnected"))
    door.away = False
    await agent.dial()
    assert await bench.status() == "online"


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:10.0.0.7:4711", "10.0.0.7"),
        ("ipv6:%5Bfe80::1%5D:4711", "fe80::1"),
        ("unix:/run/x", ""),
        ("", ""),
    ],
)
def test_the_address_of_a_peer(peer: str, address: str) -> None:
    assert address_of(peer) == address


async def test_what_has_ended_fills_no_slot_though_a_beat_still_names_it(bench: Bench) -> None:
    """The agent names an attempt until its end is acknowledged; the slot is free from the report on."""
    agent = bench.agent()
    await agent.dial(slots=2)
    first, second = await bench.submit(), await bench.submit()
    done, running = await agent.start(), await agent.start()
    assert {done.job_id, running.job_id} == {first, second}
    await agent.complete(done)
    held = [(done.job_id, done.token), (running.job_id, running.token)]
    await agent.beat(held, slots=2, slots_free=1)
    assert bench.sessions.slots_free("agx0") == 1
    await agent.beat(held[1:], slots=2)
    assert bench.sessions.slots_free("agx0") == 1
    third = await bench.submit()
    assert (await agent.take()).job_id == third
