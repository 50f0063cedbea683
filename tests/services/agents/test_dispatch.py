"""From a waiting job to an accepted attempt: what is sent where, and what goes back."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobState, Priority
from fleet_server.domain.placement import place
from fleet_server.services.dispatch import Decision
from fleet_server.services.reaper import Reaper, ReaperSettings
from fleet_server.store import Store, open_store
from tests.services.agents.agent import ScriptedAgent, image_engine, wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on
from tests.store.conftest import Server


def assigns(agent: ScriptedAgent) -> list[pb.Assign]:
    """The Assigns heard and not yet taken."""
    return [message.assign for message in agent.heard if message.HasField("assign")]


async def test_an_assign_says_all_that_the_agent_needs(bench: Bench) -> None:
    agent = bench.agent(models=[pb.ModelFile(name="sketch", kind="checkpoint", sha256="ab" * 32, engine="sketch")])
    await agent.dial()
    job_id = await bench.submit(prompt="a night city")
    assign = await agent.take()
    assert assign.job_id == job_id
    assert (assign.generation, assign.attempt) == (1, 1)
    assert assign.job_type == types_pb2.JobType.JOB_TYPE_IMAGE_GEN
    assert assign.payload.image_gen.prompt == "a night city"
    assert (assign.model, assign.target_model) == ("sketch", "SDXL_4GB_FP8.safetensors")
    assert assign.model_sha256 == "ab" * 32
    assert assign.timeout_seconds == 60
    assert not assign.previews
    record = await bench.job(job_id)
    assert (record.state, record.node_id, record.token) == (JobState.RUNNING, "agx0", assign.token)
    assert record.started_ms is None
    await agent.send(started=pb.JobStarted(job_id=job_id, token=assign.token))
    await wait_until(lambda: bench.started(job_id))


async def test_a_node_never_gets_more_than_its_free_slots(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        agent = bench.agent(slots=3)
        await agent.dial()
        for _ in range(5):
            await bench.submit()
        assert await bench.dispatcher.round() == 3
        assert await bench.dispatcher.round() == 0
        # Heartbeats that were written before the Assigns came do not free their slots.
        for _ in range(3):
            await agent.beat(slots=3)
        assert await bench.dispatcher.round() == 0
        first = await agent.take()
        await agent.complete(first)
        assert await bench.dispatcher.round() == 1
        await wait_until(lambda: len(assigns(agent)) == 3)


async def test_the_agent_may_report_fewer_free_slots_than_it_has(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        agent = bench.agent(slots=4)
        await agent.dial()
        await agent.beat(slots=4, slots_free=1)
        for _ in range(4):
            await bench.submit()
        assert await bench.dispatcher.round() == 1


async def test_a_freed_slot_takes_the_next_job(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    first, second = await bench.submit(), await bench.submit()
    assign = await agent.start()
    assert assign.job_id == first
    await agent.complete(assign)
    assert (await agent.take()).job_id == second


async def test_jobs_are_shared_by_nodes_alike(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        agents = [bench.agent(f"n{number}", slots=4) for number in range(3)]
        for agent in agents:
            await agent.dial()
        for _ in range(6):
            await bench.submit()
        assert await bench.dispatcher.round() == 6
        for agent in agents:
            await agent.next("assign")
            await agent.next("assign")


async def test_the_node_with_the_model_in_memory_is_first(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        big = pb.ModelFile(name="sketch", kind="checkpoint", size_bytes=4_000_000_000, engine="sketch")
        cold = bench.agent("a-cold", models=[big])
        warm = bench.agent("z-warm", models=[big], loaded_models=[pb.LoadedFile(name="sketch", engine="sketch")])
        await cold.dial()
        await warm.dial()
        await bench.submit()
        assert await bench.dispatcher.round() == 1
        await warm.next("assign")


async def test_nothing_goes_to_a_node_that_cannot_run_it(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        await bench.agent("other-model", models=[pb.ModelFile(name="x", kind="checkpoint")]).dial()
        await bench.agent("no-engine", engines=[image_engine(status="failed")]).dial()
        await bench.agent("other-cluster", clusters=["lab"]).dial()
        job_id = await bench.submit(target_node_id="elsewhere")
        await bench.submit()
        assert await bench.dispatcher.round() == 0
        able = bench.agent("elsewhere")
        await able.dial()
        assert await bench.dispatcher.round() == 1
        assert (await able.next("assign")).assign.job_id in {job_id, *[one.job_id for one in assigns(able)]}


async def test_a_job_that_is_not_accepted_goes_back_uncounted(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    silent = (await agent.next("assign")).assign
    bench.time_is_up()
    cancel = (await agent.next("cancel")).cancel
    assert (cancel.job_id, cancel.token) == (job_id, silent.token)
    again = await agent.take()
    assert (again.job_id, again.attempt) == (job_id, 1)
    assert again.token != silent.token
    assert bench.sessions.counters.unaccepted == 1
    # Too late: the job is another attempt's now.
    await agent.send(accepted=pb.JobAccepted(job_id=job_id, token=silent.token))
    assert (await agent.next("cancel")).cancel.token == silent.token
    record = await bench.job(job_id)
    assert (record.token, record.losses, record.attempt) == (again.token, 0, 1)


async def test_a_job_that_is_not_accepted_goes_elsewhere(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, settings=replace(QUICK, avoid_seconds=60)) as bench:
        deaf = bench.agent("a-deaf", loaded_models=[pb.LoadedFile(name="sketch")])
        await deaf.dial()
        job_id = await bench.submit()
        await deaf.next("assign")
        bench.time_is_up("a-deaf")
        await deaf.next("cancel")
        other = bench.agent("b-other")
        await other.dial()
        assert (await other.take()).job_id == job_id
        assert not assigns(deaf)


async def test_a_rejected_job_goes_elsewhere_uncounted(store: Store, short_path: Path) -> None:
    """Its node is left alone for that lane for a moment."""
    async with bench_on(store, short_path, settings=replace(QUICK, avoid_seconds=60)) as bench:
        picky = bench.agent("a-picky", loaded_models=[pb.LoadedFile(name="sketch")])
        await picky.dial()
        job_id = await bench.submit()
        assign = (await picky.next("assign")).assign
        await picky.send(rejected=pb.JobRejected(job_id=job_id, token=assign.token, reason="SLOTS_FULL"))
        other = bench.agent("b-other")
        await other.dial()
        again = await other.take()
        assert (again.job_id, again.attempt) == (job_id, 1)
        assert not assigns(picky)
        assert bench.sessions.counters.rejected == 1


async def test_released_work_goes_back_uncounted(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await agent.send(released=pb.JobReleased(job_id=job_id, token=assign.token))
    again = await agent.take()
    assert (again.job_id, again.attempt) == (job_id, 1)
    assert (await bench.job(job_id)).losses == 0


async def test_a_cancelled_attempt_keeps_its_slot_until_it_has_stopped(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    first, second = await bench.submit(), await bench.submit()
    assign = await agent.start()
    await wait_until(lambda: bench.started(first))
    await bench.store.jobs.cancel(first)
    await bench.sessions.cancel_attempt(first, "agx0", assign.token)
    cancel = (await agent.next("cancel")).cancel
    assert (cancel.job_id, cancel.token) == (first, assign.token)
    bench.dispatcher.wake()
    ack = await agent.beat([(first, assign.token)])
    assert list(ack.drop_tokens) == [assign.token]
    assert await bench.dispatcher.round() == 0
    assert not assigns(agent)
    await agent.send(stopped=pb.JobStopped(job_id=first, token=assign.token))
    assert (await agent.take()).job_id == second
    assert (await bench.job(first)).state is JobState.CANCELLED


async def test_a_lost_cancel_heals_with_the_next_heartbeat(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    assert list((await agent.beat([(job_id, assign.token)])).drop_tokens) == []
    await bench.store.jobs.cancel(job_id)
    assert list((await agent.beat([(job_id, assign.token)])).drop_tokens) == [assign.token]
    await agent.send(tick=pb.JobTick(job_id=job_id, token=assign.token, progress=40))
    await agent.beat([(job_id, assign.token)])
    assert bench.hub.latest(job_id) is None


async def test_a_stale_token_is_dropped(bench: Bench) -> None:
    """The job was given back behind the agent's back and runs elsewhere."""
    agent, other = bench.agent(), bench.agent("agx1", slots=0)
    await agent.dial()
    await other.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await wait_until(lambda: bench.started(job_id))
    await other.beat(slots=1)
    await bench.store.jobs.release(job_id, assign.token)
    bench.dispatcher.wake()
    again = await other.take()
    ack = await agent.beat([(job_id, assign.token)])
    assert list(ack.drop_tokens) == [assign.token]
    assert list((await other.beat([(job_id, again.token)])).drop_tokens) == []


async def test_an_attempt_that_beats_do_not_name_frees_its_slot(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    second = await bench.submit()
    await agent.start()
    await agent.beat()
    assert bench.sessions.slots_free("agx0") == 0
    await agent.beat()
    assert (await agent.take()).job_id == second


@pytest.mark.parametrize("redial", [False, True], ids=["gone", "back"])
async def test_claims_of_an_ended_session_are_given_back(store: Store, short_path: Path, redial: bool) -> None:
    """The stream ends between the claim and its Assign; that the agent is back by then does not matter."""
    async with bench_on(store, short_path, dispatch=False) as bench:
        agent = bench.agent()
        await agent.dial()
        job_id = await bench.submit()
        claim = store.jobs.claim_and_look

        async def claim_and_end(requests: object) -> object:
            claims = await claim(requests)  # type: ignore[arg-type]
            await agent.hang_up()
            await wait_until(lambda: bench.sessions.slots_free("agx0") == 0)
            if redial:
                await agent.dial()
            return claims

        store.jobs.claim_and_look = claim_and_end  # type: ignore[method-assign,assignment]
        assert await bench.dispatcher.round() == 0
        record = await bench.job(job_id)
        assert (record.state, record.attempt) == (JobState.QUEUED, 0)
        assert not assigns(agent)


async def test_no_job_is_given_twice_in_a_crowd(bench: Bench) -> None:
    """Nodes come and go while forty jobs run: each is completed by exactly one attempt."""
    jobs = [await bench.submit() for _ in range(40)]
    taken: Counter[str] = Counter()

    async def work(number: int) -> None:
        agent = bench.agent(f"n{number}", slots=2)
        await agent.dial(slots=2)
        while True:
            assign = await agent.start()
            if await agent.complete(assign) == pb.CompleteOutcome.COMPLETE_OUTCOME_OK:
                taken[assign.job_id] += 1

    workers = [asyncio.create_task(work(number)) for number in range(4)]
    await wait_until(lambda: sum(taken.values()) == 40)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    assert set(taken) == set(jobs)
    for job_id in jobs:
        record = await bench.job(job_id)
        assert (record.state, record.attempt) == (JobState.SUCCEEDED, 1)


async def test_a_failed_job_goes_to_another_idle_node_at_once(bench: Bench) -> None:
    """Whichever node placement likes best: it is not asked again and again while the other stands idle."""
    nodes = [bench.agent(name) for name in ("a", "b")]
    for node in nodes:
        await node.dial()
    job_id = await bench.submit()
    first = await wait_until(lambda: next((node for node in nodes if assigns(node)), None))
    other = next(node for node in nodes if node is not first)
    assign = await first.start()
    await first.complete(assign, error=types_pb2.JobError(reason="ENGINE_FAILED", detail="once"), retryable=True)
    bench.tasks.append(asyncio.create_task(promoting(bench)))
    await wait_until(lambda: assigns(other))
    assert assigns(other)[0].job_id == job_id


async def promoting(bench: Bench) -> None:
    """What a reaper does for jobs whose backoff is over."""
    reaper = Reaper(bench.store, bench.fleet, bench.dispatcher.wake, settings=ReaperSettings(sweep_seconds=0.02))
    await reaper.run()


async def test_a_high_job_goes_before_its_turn_though_all_lines_are_older_than_its_boost(
    valkey: Server, short_path: Path
) -> None:
    """Its own lane has an older head, and so has the lane whose model is in memory."""
    now = [1_763_805_600_000]
    async with (
        open_store(valkey.url, namespace="urgent", clock=lambda: now[0]) as store,
        bench_on(store, short_path, dispatch=False, clock=lambda: now[0]) as bench,
    ):
        models = [pb.ModelFile(name=name, kind="checkpoint", engine="sketch") for name in ("sketch", "big")]
        agent = bench.agent(models=models, loaded_models=[pb.LoadedFile(name="sketch", engine="sketch")])
        await agent.dial()
        for model in ("sketch", "sketch", "sketch", "big"):
            await bench.submit(model=model)
        now[0] += 3_600_000
        high = await bench.submit(model="big", priority=Priority.HIGH)
        assert await bench.dispatcher.round() == 1
        first = await agent.start()
        assert first.job_id == high
        # Every second time the turns hold.
        await bench.submit(model="big", priority=Priority.HIGH)
        await agent.complete(first)
        await wait_until(lambda: bench.sessions.slots_free("agx0"))
        assert await bench.dispatcher.round() == 1
        assert (await agent.take()).model == "sketch"


async def test_decisions_are_told_and_give_the_same_plan_again(store: Store, short_path: Path) -> None:
    heard: list[Decision] = []
    async with bench_on(store, short_path, dispatch=False, on_decision=heard.append) as bench:
        agent = bench.agent(slots=2)
        await agent.dial()
        assert await bench.dispatcher.round() == 0
        await bench.submit()
        await bench.submit()
        assert await bench.dispatcher.round() == 2
    (decision,) = heard
    assert [one.node_id for one in decision.plan.placed] == ["agx0", "agx0"]
    assert place(decision.situation, timing=decision.timing) == decision.plan


async def test_a_model_in_quarantine_gets_no_work_on_its_node(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, dispatch=False) as bench:
        agent = bench.agent()
        await agent.dial()
        for _ in range(3):
            await bench.submit(max_retries=0)
            assert await bench.dispatcher.round() == 1
            assign = await agent.start()
            error = types_pb2.JobError(reason="ENGINE_FAILED", detail="cannot load")
            await agent.complete(assign, error=error)
            await wait_until(lambda: bench.sessions.slots_free("agx0"))
        await bench.submit()
        assert await bench.dispatcher.round() == 0
        healthy = bench.agent("agx1")
        await healthy.dial()
        assert await bench.dispatcher.round() == 1
        await healthy.next("assign")
