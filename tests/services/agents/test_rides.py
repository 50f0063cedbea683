"""What dispatch does without asking the store first: claims that travel with a submit, and plans of what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fleet.v1 import types_pb2
from uuid_utils import uuid7

from fleet_server.domain.job import NewJob, Priority
from fleet_server.services.lanes import lane_of
from fleet_server.store import Store
from tests.services.agents.agent import wait_until
from tests.services.agents.bench import Bench, bench_on


def new_job(node_id: str = "") -> NewJob:
    spec = types_pb2.JobSpec(
        job_type=types_pb2.JobType.JOB_TYPE_IMAGE_GEN,
        target_cluster="vision",
        resolved_model="sketch",
        target_node_id=node_id,
    )
    raw = spec.SerializeToString()
    return NewJob(str(uuid7()), raw, lane_of(spec), Priority.NORMAL, "", 3, 60_000, 86_400_000)


async def ride(bench: Bench) -> NewJob:
    """Submits as the doors do when dispatch is at leisure."""
    job = new_job()
    assert bench.dispatcher.rides()
    await bench.store.jobs.submit([job], posted=lambda: bench.dispatcher.expect([job]))
    return job


async def test_the_claim_of_a_job_travels_with_its_submit(store: Store, short_path: Path) -> None:
    """Submit, claim and look are one batch, so that a lone job costs one round trip until it is sent."""
    client = store.jobs._room.dispatch
    exchange = client._exchange
    batches: list[list[str]] = []

    async def noted(connection: Any, batch: Any) -> None:
        names = {script.sha: name for name, script in client._scripts.items()}
        words = (next((name for sha, name in names.items() if sha.encode() in call.data), "") for call in batch)
        batches.append(list(words))
        await exchange(connection, batch)

    async with bench_on(store, short_path, poll_seconds=60) as bench:
        agent = bench.agent()
        await agent.dial()
        await ride(bench)
        await agent.complete(await agent.start())
        await wait_until(lambda: bench.sessions.slots_free("agx0"))
        client._exchange = noted  # type: ignore[method-assign]
        job = await ride(bench)
        assert (await agent.take()).job_id == job.job_id
        assert batches == [["submit", "claim", "lanes"]]


async def test_a_claim_that_rode_in_vain_costs_the_node_nothing(store: Store, short_path: Path) -> None:
    """Another replica was faster, or the submit was refused: nobody is avoided for it, and what waits goes out."""
    async with bench_on(store, short_path, dispatch=False, poll_seconds=60) as bench:
        agents = [bench.agent(name) for name in ("a", "b")]
        for agent in agents:
            await agent.dial()
        assert await bench.dispatcher.round() == 0
        never = new_job()
        bench.dispatcher.expect([never])
        assert await bench.dispatcher.round() == 0
        assert bench.fleet.avoided() == set()
        # The look that came with it found something: another round is worth it.
        job = new_job(node_id="b")
        await store.jobs.submit([job])
        bench.dispatcher.expect([never])
        assert await bench.dispatcher.round() == 1
        assert not agents[1].heard
        assert await bench.dispatcher.round() == 1
        assert (await agents[1].take()).job_id == job.job_id


async def test_a_belief_that_nothing_can_be_made_of_is_checked(store: Store, short_path: Path) -> None:
    """What waits for another node hides nothing that came in elsewhere, or went back into the queue."""
    async with bench_on(store, short_path, dispatch=False, poll_seconds=60) as bench:
        agent = bench.agent(slots=2)
        await agent.dial()
        await bench.submit(target_node_id="elsewhere")
        await bench.submit()
        assert await bench.dispatcher.round() == 1
        assert await bench.dispatcher.round() == 0
        # Another replica's: nobody here was told.
        job = new_job()
        await store.jobs.submit([job])
        await agent.complete(await agent.start())
        await wait_until(lambda: bench.sessions.slots_free("agx0") == 2)
        assert await bench.dispatcher.round() == 1
        assert (await agent.take()).job_id == job.job_id
