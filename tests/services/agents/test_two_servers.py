"""A node dials another server while the first still has its old stream, which may be dead without anybody's notice."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fleet.v1 import node_pb2 as pb

from fleet_server.domain.job import JobState
from fleet_server.store import decode_node
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import Bench
from tests.services.agents.pair import Pair


async def tell(bench: Bench) -> None:
    """What the store's events say of nodes comes to the server."""
    events, _ = await bench.store.events.read("0")
    for event in events:
        if event.type == "node_update":
            bench.sessions.told(decode_node(event.fields))


async def moved(pair: Pair) -> tuple[ScriptedAgent, ScriptedAgent]:
    """One agent with a stream at each server; the second is the node's."""
    (old,) = await pair.dial(pair.a, "n0")
    (new,) = await pair.dial(pair.b, "n0")
    return old, new


@pytest.mark.parametrize("how", ["told by the store", "the line is cut"])
async def test_both_servers_know_where_the_node_is(pair: Pair, how: str) -> None:
    old, _ = await moved(pair)
    if how == "told by the store":
        await tell(pair.a)
        await old.ended.wait()
        assert old.error is not None and old.error.code() is grpc.StatusCode.ABORTED
    else:
        await old.hang_up()

    def known() -> bool:
        view = pair.a.fleet.node("n0")
        return view is not None and view.online and pair.a.fleet.replica("n0") == "b"

    await wait_until(known)
    assert await pair.a.status("n0") == "online"
    assert pair.b.sessions.live("n0") is not None


async def test_late_news_of_an_earlier_stream_end_nothing(pair: Pair) -> None:
    (back,) = await pair.dial(pair.b, "n0")
    await back.hang_up()
    await wait_until(lambda: pair.b.status_is("disconnected", "n0"))
    (agent,) = await pair.dial(pair.a, "n0")
    await tell(pair.a)
    await agent.beat()
    assert pair.a.sessions.live("n0") is not None and not agent.ended.is_set()


async def test_only_the_newer_stream_is_given_jobs(pair: Pair) -> None:
    old, new = await moved(pair)
    for _ in range(3):
        job_id = await pair.a.submit()
        pair.b.dispatcher.wake()
        assign = await new.start()
        assert assign.job_id == job_id
        await new.complete(assign)
        record = await pair.a.job(job_id)
        assert (record.state, record.attempt) == (JobState.SUCCEEDED, 1)
    assert not [message for message in old.heard if message.HasField("assign")]


async def test_what_the_newer_stream_brought_along_is_not_taken_back_by_the_older(pair: Pair) -> None:
    """The first server never heard that the job was taken; the agent has told the second one that it runs."""
    (old,) = await pair.dial(pair.a, "n0")
    job_id = await pair.a.submit()
    assign = (await old.next("assign")).assign
    session = pair.a.sessions.live("n0")
    assert session is not None
    new = pair.b.agent("n0")
    welcome = await new.dial(held=[pb.HeldAttempt(job_id=job_id, token=assign.token)])
    assert list(welcome.keep_tokens) == [assign.token]
    for attempt in session._book:
        attempt.accept_by = 0.0
    await wait_until(lambda: pair.a.sessions.counters.unaccepted == 1)
    await session._reports.join()
    record = await pair.b.job(job_id)
    assert (record.state, record.token) == (JobState.RUNNING, assign.token)
    await new.complete(assign)
    record = await pair.b.job(job_id)
    assert (record.state, record.attempt, record.losses) == (JobState.SUCCEEDED, 1, 0)


async def test_a_hello_that_was_overtaken_takes_nothing_back(pair: Pair) -> None:
    """The first server is slow with a Hello; the agent gives up, dials the second one and gets a job there."""
    jobs = pair.a.store.jobs
    held_by, arrived, go = jobs.held_by, asyncio.Event(), asyncio.Event()

    async def slow_once(node_id: str) -> dict[str, str]:
        if not arrived.is_set():
            arrived.set()
            await go.wait()
        return await held_by(node_id)

    jobs.held_by = slow_once  # type: ignore[method-assign]
    early = asyncio.create_task(pair.a.agent("n0").dial())
    await arrived.wait()
    (agent,) = await pair.dial(pair.b, "n0")
    job_id = await pair.b.submit()
    assign = await agent.start()
    go.set()
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await early
    assert refusal.value.code() is grpc.StatusCode.ABORTED
    record = await pair.b.job(job_id)
    assert (record.state, record.token) == (JobState.RUNNING, assign.token)
    await wait_until(lambda: pair.a.fleet.replica("n0") == "b" and len(pair.a.fleet.online()) == 1)
