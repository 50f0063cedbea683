"""Progress: from the agent's ticks to who listens, the latest wins."""

from __future__ import annotations

import asyncio

from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2
from fleet.v1.types_pb2 import JobProgress

from fleet_server.services.progress import ProgressHub
from tests.services.agents.agent import wait_until
from tests.services.agents.bench import Bench


async def test_ticks_reach_who_listens(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    async with bench.hub.subscribe([job_id]) as ticks:
        await agent.send(
            tick=pb.JobTick(
                job_id=job_id, token=assign.token, progress=40, step=8, steps=20, message="painting", eta_seconds=2
            )
        )
        tick = await anext(ticks)
    assert (tick.job_id, tick.progress, tick.step, tick.steps) == (job_id, 40, 8, 20)
    assert (tick.node_id, tick.generation, tick.attempt) == ("agx0", 1, 1)
    assert (tick.message, tick.eta_seconds) == ("painting", 2)
    assert bench.hub.latest(job_id) == tick


async def test_the_last_percentage_is_kept_when_the_lease_is_renewed(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await agent.send(tick=pb.JobTick(job_id=job_id, token=assign.token, progress=40, step=8, steps=20))
    await agent.beat([(job_id, assign.token)])
    record = await bench.job(job_id)
    assert (record.progress, record.step, record.steps) == (40, 8, 20)


async def test_ticks_of_attempts_that_are_not_the_agents_are_ignored(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await agent.send(tick=pb.JobTick(job_id=job_id, token="other", progress=40))
    await bench.sessions.cancel_attempt(job_id, "agx0", assign.token)
    await agent.next("cancel")
    await agent.send(tick=pb.JobTick(job_id=job_id, token=assign.token, progress=50))
    await agent.beat([(job_id, assign.token)])
    assert bench.hub.latest(job_id) is None
    assert bench.sessions.counters.ignored_messages == 2


async def test_an_ended_attempt_leaves_no_tick_behind(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await agent.send(tick=pb.JobTick(job_id=job_id, token=assign.token, progress=40))
    await wait_until(lambda: bench.hub.latest(job_id))
    await agent.complete(assign)
    assert bench.hub.latest(job_id) is None


async def test_previews_are_asked_for_while_somebody_looks(bench: Bench) -> None:
    agent = bench.agent(slots=2)
    await agent.dial()
    first = await bench.submit()
    assign = await agent.start()
    held = [(first, assign.token)]
    assert not assign.previews
    assert list((await agent.beat(held, slots=2)).preview_tokens) == []
    async with bench.hub.subscribe(None, previews=True) as ticks:
        # The agent is told at once, not at its next beat.
        assert list((await agent.next("heartbeat_ack")).heartbeat_ack.preview_tokens) == [assign.token]
        assert list((await agent.beat(held, slots=2)).preview_tokens) == [assign.token]
        await bench.submit()
        assert (await agent.start()).previews
        picture = types_pb2.Preview(content_type="image/webp", data=b"x" * 100)
        await agent.send(preview=pb.JobPreview(job_id=first, token=assign.token, progress=50, preview=picture))
        assert (await anext(ticks)).preview == picture
        huge = types_pb2.Preview(content_type="image/webp", data=b"x" * 70_000)
        await agent.send(preview=pb.JobPreview(job_id=first, token=assign.token, progress=60, preview=huge))
        await agent.send(tick=pb.JobTick(job_id=first, token=assign.token, progress=70))
        tick = await anext(ticks)
        assert (tick.progress, tick.HasField("preview")) == (70, False)
    assert list((await agent.next("heartbeat_ack")).heartbeat_ack.preview_tokens) == []
    assert list((await agent.beat(held, slots=2)).preview_tokens) == []


def tick(job_id: str, percent: int, **fields: object) -> JobProgress:
    return JobProgress(job_id=job_id, progress=percent, **fields)  # type: ignore[arg-type]


async def test_a_slow_listener_gets_the_newest_alone() -> None:
    hub = ProgressHub(interval_seconds=0)
    async with hub.subscribe(["a", "b"]) as ticks:
        for percent in range(100):
            hub.publish(tick("a", percent))
        hub.publish(tick("b", 5))
        hub.publish(tick("c", 5))
        assert [(one.job_id, one.progress) for one in [await anext(ticks), await anext(ticks)]] == [("a", 99), ("b", 5)]


async def test_a_jobs_ticks_are_spread_and_another_jobs_do_not_wait() -> None:
    hub = ProgressHub(interval_seconds=30)
    async with hub.subscribe() as ticks:
        hub.publish(tick("a", 1))
        assert (await anext(ticks)).progress == 1
        hub.publish(tick("a", 2))
        waiting = asyncio.ensure_future(anext(ticks))
        await asyncio.wait([waiting], timeout=0.05)
        assert not waiting.done()
        waiting.cancel()
        await asyncio.wait([waiting])


async def test_a_new_job_does_not_wait_behind_one_that_must() -> None:
    hub = ProgressHub(interval_seconds=30)
    async with hub.subscribe() as ticks:
        hub.publish(tick("a", 1))
        await anext(ticks)
        hub.publish(tick("a", 2))
        waiting = asyncio.ensure_future(anext(ticks))
        await asyncio.wait([waiting], timeout=0.05)
        hub.publish(tick("b", 1))
        assert (await waiting).job_id == "b"


async def test_text_that_continues_is_joined_and_previews_are_kept() -> None:
    hub = ProgressHub(interval_seconds=0)
    async with hub.subscribe(["a"], True) as ticks:
        hub.publish(tick("a", 1, text="ab", text_offset=0))
        hub.publish(tick("a", 2, preview=types_pb2.Preview(data=b"p")))
        hub.publish(tick("a", 3, text="cd", text_offset=2))
        one = await anext(ticks)
        assert (one.progress, one.text, one.text_offset, one.preview.data) == (3, "abcd", 0, b"p")
    async with hub.subscribe(["a"]) as ticks:
        hub.publish(tick("a", 4, preview=types_pb2.Preview(data=b"p")))
        assert not (await anext(ticks)).HasField("preview")
    latest = hub.latest("a")
    assert latest is not None and not latest.HasField("preview")


async def test_what_is_kept_is_bounded() -> None:
    hub = ProgressHub(interval_seconds=0, jobs_limit=3, backlog=2)
    async with hub.subscribe() as ticks:
        for number in range(6):
            hub.publish(tick(f"j{number}", number))
        assert [(await anext(ticks)).job_id for _ in range(2)] == ["j4", "j5"]
    assert hub.latest("j2") is None
    assert hub.latest("j5") is not None
    hub.forget("j5")
    assert hub.latest("j5") is None


async def test_previews_are_wanted_only_by_who_asked() -> None:
    hub = ProgressHub()
    async with hub.subscribe(["a"], previews=True), hub.subscribe(["b"]), hub.subscribe(["a"], previews=True):
        assert hub.previews_wanted("a")
        assert not hub.previews_wanted("b")
    assert not hub.previews_wanted("a")
    async with hub.subscribe(previews=True):
        assert hub.previews_wanted("anything")
    assert not hub.previews_wanted("anything")
