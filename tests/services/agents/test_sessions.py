"""Streams of agents: how they begin, are replaced, and end."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobState
from fleet_server.services.hello_bucket import HelloBucket
from fleet_server.store import Store
from tests.services.agents.agent import wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on

OK = pb.CompleteOutcome.COMPLETE_OUTCOME_OK


async def test_a_hello_makes_the_node_online(bench: Bench) -> None:
    agent = bench.agent(labels={"zone": "a"}, host=types_pb2.Host(cpu_count=12))
    welcome = await agent.dial()
    assert welcome.heartbeat_seconds == pytest.approx(QUICK.heartbeat_seconds)
    assert welcome.server_version == "1.0.0"
    assert len(agent.session) == 32
    (node,) = await agent.nodes()
    assert (node.node_id, node.status) == ("agx0", types_pb2.NodeStatus.NODE_STATUS_ONLINE)
    assert list(node.clusters) == ["vision"]
    assert list(node.job_types) == [types_pb2.JobType.JOB_TYPE_IMAGE_GEN]
    assert dict(node.labels) == {"zone": "a"}
    assert node.host.cpu_count == 12
    assert (node.slots, node.slots_free) == (1, 1)
    assert await bench.status() == "online"
    assert await agent.nodes(cluster="llm") == []
    assert await agent.nodes(status=[types_pb2.NodeStatus.NODE_STATUS_DOWN]) == []


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"protocol_version": 2}, grpc.StatusCode.FAILED_PRECONDITION, "version 2, this server version 1"),
        ({"node_id": "a b"}, grpc.StatusCode.INVALID_ARGUMENT, "node_id"),
        ({"node_id": "heartbeats"}, grpc.StatusCode.INVALID_ARGUMENT, "node_id"),
        ({"instance_id": ""}, grpc.StatusCode.INVALID_ARGUMENT, "instance_id"),
    ],
)
async def test_a_wrong_hello_is_refused(
    bench: Bench, changes: dict[str, object], code: grpc.StatusCode, words: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await bench.agent().dial(**changes)
    assert refusal.value.code() is code
    assert words in (refusal.value.details() or "")
    assert bench.fleet.nodes() == []


async def test_the_first_message_must_be_a_hello(bench: Bench) -> None:
    agent = bench.agent()
    call = agent.stub.Connect()
    await call.write(pb.AgentMessage(heartbeat=pb.AgentHeartbeat()))
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await call.read()
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_an_agent_that_says_nothing_is_not_waited_for(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, settings=replace(QUICK, hello_seconds=0.05)) as bench:
        call = bench.agent().stub.Connect()
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await call.read()
        assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_hellos_are_admitted_at_a_bounded_rate(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, settings=replace(QUICK, hellos_per_second=0.001)) as bench:
        await bench.agent("first").dial()
        late = [bench.agent(f"n{number}") for number in range(3)]
        for agent in late:
            with pytest.raises(grpc.aio.AioRpcError) as refusal:
                await agent.dial()
            assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert bench.sessions.counters.refused_hellos == sum(agent.dials for agent in late)


def test_the_bucket_of_hellos_fills_again() -> None:
    now = 100.0
    bucket = HelloBucket(10, clock=lambda: now)
    assert [bucket.wait_seconds() for _ in range(10)] == [0] * 10
    assert bucket.wait_seconds() >= 1
    now += 0.25
    assert [bucket.wait_seconds() > 0 for _ in range(3)] == [False, False, True]
    now += 60
    assert [bucket.wait_seconds() > 0 for _ in range(11)] == [False] * 10 + [True]


async def test_messages_of_another_session_are_ignored(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    assign = await agent.take()
    await agent.send_as("other", complete=pb.JobComplete(job_id=assign.job_id, token=assign.token))
    await agent.send_as("", goodbye=pb.AgentGoodbye())
    await agent.beat([(assign.job_id, assign.token)])
    assert bench.sessions.counters.ignored_messages == 2
    assert (await bench.job(assign.job_id)).state is JobState.RUNNING
    assert bench.fleet.online()


async def test_the_same_agent_takes_over_its_own_stream_and_keeps_its_work(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    assign = await agent.start()
    held = [pb.HeldAttempt(job_id=assign.job_id, token=assign.token)]
    first = agent.session
    again = bench.agent()
    welcome = await again.dial(held=held)
    assert list(welcome.keep_tokens) == [assign.token]
    assert list(welcome.kill_tokens) == []
    assert again.session != first
    await agent.end()
    assert agent.error is not None and agent.error.code() is grpc.StatusCode.ABORTED
    (node,) = await again.nodes()
    assert (node.slots_free, list(node.running_job_ids)) == (0, [assign.job_id])
    assert await again.complete(assign) == OK
    record = await bench.job(assign.job_id)
    assert (record.state, record.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_clone_of_a_living_agent_is_refused(store: Store, short_path: Path) -> None:
    # A sign of life is waited for as long as a heartbeat may take.
    async with bench_on(store, short_path, settings=replace(QUICK, heartbeat_seconds=30)) as bench:
        agent = bench.agent()
        await agent.dial()
        clone = bench.agent(instance_id="boot-2")
        await clone.begin()

        async def refused() -> bool:
            await agent.beat()
            return clone.ended.is_set()

        await wait_until(refused)
        assert clone.error is not None and clone.error.code() is grpc.StatusCode.ALREADY_EXISTS
        assert "another agent" in (clone.error.details() or "")
        assert not agent.ended.is_set()
        assert await bench.status() == "online"


async def test_another_agent_replaces_one_that_is_silent(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.agent(instance_id="boot-2").dial()
    await agent.end()
    assert agent.error is not None and agent.error.code() is grpc.StatusCode.ABORTED


async def test_a_restarted_agent_loses_what_it_ran_at_once(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await wait_until(lambda: bench.started(job_id))
    await agent.hang_up()
    restarted = bench.agent(instance_id="boot-2")
    welcome = await restarted.dial(held=[pb.HeldAttempt(job_id=job_id, token=assign.token)])
    assert list(welcome.kill_tokens) == [assign.token]
    await restarted.send(stopped=pb.JobStopped(job_id=job_id, token=assign.token))
    again = await restarted.take()
    assert again.job_id == job_id and again.token != assign.token
    record = await bench.job(job_id)
    assert (record.losses, record.attempt) == (1, 2)


async def test_a_restarted_agent_brings_results_along(bench: Bench) -> None:
    """Its spooled result counts; the job is not taken for lost meanwhile."""
    agent = bench.agent(slots=2)
    await agent.dial()
    job_id, other = await bench.submit(), await bench.submit()
    assign = await agent.start()
    await agent.start()
    await wait_until(lambda: bench.started(other))
    await agent.hang_up()
    restarted = bench.agent(instance_id="boot-2", slots=3)
    await restarted.dial(spooled=[pb.HeldAttempt(job_id=job_id, token=assign.token)])
    assert await restarted.complete(assign, run_seconds=1.5) == OK
    record = await bench.job(job_id)
    assert (record.state, record.losses, record.attempt, record.run_ms) == (JobState.SUCCEEDED, 0, 1, 1500)
    # What it has not brought is lost as soon as that is settled.
    again = await restarted.take()
    assert (again.job_id, again.attempt) == (other, 2)


async def test_an_assign_lost_with_the_stream_goes_back_uncounted(bench: Bench) -> None:
    """The same agent says at its next Hello that it holds nothing."""
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    lost = (await agent.next("assign")).assign
    await agent.hang_up()
    again = bench.agent()
    await again.dial()
    assign = await again.take()
    assert (assign.job_id, assign.attempt) == (job_id, 1)
    assert assign.token != lost.token
    assert (await bench.job(job_id)).losses == 0


async def test_a_lost_stream_leaves_work_and_leases_alone(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await agent.hang_up()
    await wait_until(lambda: bench.status_is("disconnected"))
    assert bench.fleet.nodes()[0].status == "disconnected"
    record = await bench.job(job_id)
    assert (record.state, record.token) == (JobState.RUNNING, assign.token)
    await agent.dial(held=[pb.HeldAttempt(job_id=job_id, token=assign.token)])
    assert await agent.complete(assign) == OK


async def test_a_node_that_stays_away_is_down(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await agent.hang_up()
    missed = bench.sessions._departures._down_at
    at, session = await wait_until(lambda: missed.get("agx0"))
    assert at > asyncio.get_running_loop().time()
    assert await bench.status() == bench.fleet.nodes()[0].status == "disconnected"
    # Its lease is over.
    missed["agx0"] = (0.0, session)
    await wait_until(lambda: bench.status_is("down"))
    await wait_until(lambda: bench.fleet.nodes()[0].status == "down")
    await agent.dial()
    assert await bench.status() == "online"
    assert bench.fleet.nodes()[0].status == "online"


async def test_a_silent_stream_is_ended(store: Store, short_path: Path) -> None:
    """A half-open connection: nothing comes for as long as a lease lasts."""
    async with bench_on(store, short_path, settings=replace(QUICK, lease_seconds=0.2)) as bench:
        agent = bench.agent()
        await agent.dial()
        await agent.end()
        assert agent.error is not None and agent.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_goodbye_gives_work_back_and_the_node_is_down(bench: Bench) -> None:
    agent = bench.agent(slots=2)
    await agent.dial()
    first, second = await bench.submit(), await bench.submit()
    assigns = [await agent.start(), await agent.start()]
    await wait_until(lambda: bench.started(second))
    await agent.send(goodbye=pb.AgentGoodbye())
    await agent.send(released=pb.JobReleased(job_id=assigns[0].job_id, token=assigns[0].token))
    await agent.finish()
    assert agent.error is None
    await wait_until(lambda: bench.status_is("down"))
    for job_id in (first, second):
        record = await bench.job(job_id)
        assert (record.state, record.attempt, record.losses) == (JobState.QUEUED, 0, 0)
    assert bench.fleet.nodes()[0].status == "down"


async def test_no_work_is_given_after_a_goodbye(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await agent.send(goodbye=pb.AgentGoodbye())
    await wait_until(lambda: bench.fleet.nodes()[0].draining)
    assert bench.sessions.slots_free("agx0") == 0
    await bench.submit()
    assert await bench.dispatcher.round() == 0
    assert not [message for message in agent.heard if message.HasField("assign")]


async def test_what_was_said_before_the_end_is_settled(store: Store, short_path: Path) -> None:
    """The agent reports and hangs up while the store is slow."""
    async with bench_on(store, short_path, settings=replace(QUICK, drain_seconds=600)) as bench:
        agent = bench.agent()
        await agent.dial()
        job_id = await bench.submit()
        assign = await agent.start()
        complete, called, open_door = bench.store.jobs.complete_many, asyncio.Event(), asyncio.Event()

        async def slow(*args: Any, **kwargs: Any) -> Any:
            called.set()
            await open_door.wait()
            return await complete(*args, **kwargs)

        bench.store.jobs.complete_many = slow  # type: ignore[method-assign]
        await agent.send(complete=pb.JobComplete(job_id=job_id, token=assign.token))
        await called.wait()
        await agent.hang_up()
        await wait_until(lambda: bench.sessions.slots_free("agx0") == 0)
        open_door.set()
        await wait_until(lambda: bench.status_is("disconnected"))
        assert (await bench.job(job_id)).state is JobState.SUCCEEDED


async def test_shutdown_says_goodbye_and_refuses_newcomers(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.sessions.shutdown(retry_after_seconds=3)
    goodbye = (await agent.next("goodbye")).goodbye
    assert goodbye.retry_after_seconds == 3
    await agent.end()
    assert agent.error is None
    assert await bench.status() == "disconnected"
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await bench.agent("agx1").dial()
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_nodes_are_known_again_after_a_restart_of_the_server(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path) as bench:
        await bench.agent(labels={"zone": "a"}).dial()
    async with bench_on(store, short_path) as bench:
        node = await wait_until(lambda: bench.fleet.node("agx0"))
        assert node.status == "disconnected"
        assert set(node.models) == {"sketch"}
        assert dict(node.labels) == {"zone": "a"}
        agent = bench.agent()
        await agent.dial()
        assert bench.fleet.online()


async def test_an_agent_that_does_not_read_loses_its_stream(store: Store, short_path: Path) -> None:
    """The writer waits for the first message for ever: it is cancelled, and the node is disconnected."""
    async with bench_on(store, short_path, settings=replace(QUICK, write_seconds=0.1)) as bench:
        stuck = asyncio.Event()

        async def hello() -> object:
            yield pb.AgentMessage(hello=bench.agent("slow").hello())
            await asyncio.Event().wait()

        class Context:
            def peer(self) -> str:
                return "unix:"

            def add_done_callback(self, callback: object) -> None: ...

        async def writer() -> None:
            async for _ in bench.sessions.connect(hello(), Context()):  # type: ignore[arg-type]
                stuck.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(writer())
        await stuck.wait()
        await wait_until(task.done)
        assert task.cancelled()
        assert bench.sessions.counters.stuck_writers == 1
        await wait_until(lambda: bench.status_is("disconnected", "slow"))
