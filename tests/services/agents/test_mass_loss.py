"""Most of a fleet vanishes at once: its work is left to it until it is back, or for a bounded time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import node_pb2 as pb

from fleet_server.domain.job import JobState
from fleet_server.domain.massloss import MassLossRule
from fleet_server.services.reaper import Reaper, ReaperSettings
from fleet_server.store import Store
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on

NODES = 4
RULE = MassLossRule(least=NODES, window_seconds=60, freeze_seconds=600)
NO_GRACE = ReaperSettings(grace_seconds=0, check_seconds=0)


@pytest.fixture
async def bench(store: Store, short_path: Path) -> AsyncIterator[Bench]:
    async with bench_on(store, short_path, settings=replace(QUICK, lease_seconds=0.3, mass_loss=RULE)) as opened:
        yield opened


def reaper_of(bench: Bench) -> Reaper:
    return Reaper(bench.store, bench.fleet, lambda: None, mass_loss=bench.sessions.mass_loss, settings=NO_GRACE)


async def dial(bench: Bench, count: int = NODES) -> list[ScriptedAgent]:
    agents = [bench.agent(f"node{n}") for n in range(count)]
    for agent in agents:
        await agent.dial()
    return agents


async def a_lease_ran_out(bench: Bench) -> None:
    """Returns when the store itself would have a job reaped."""
    room = bench.store.jobs._room

    async def overdue() -> Any:
        return await room.bulk.call("ZCOUNT", f"{room.keys.prefix}leases", "-inf", time.time_ns() // 1_000_000)

    await wait_until(overdue)


async def runner_of(bench: Bench, job_id: str) -> ScriptedAgent:
    """The agent that the job was given to, once it has said that it started."""

    async def claimed() -> str:
        return (await bench.job(job_id)).node_id

    node_id = await wait_until(claimed)
    runner = next(agent for agent in bench.agents if agent.node_id == node_id)
    await runner.start()
    return runner


async def test_jobs_of_nodes_that_vanish_together_are_left_to_them(bench: Bench) -> None:
    agents = await dial(bench)
    job_id = await bench.submit()
    runner = await runner_of(bench, job_id)
    for agent in [runner, *(agent for agent in agents if agent is not runner)][:3]:
        await agent.hang_up()
    await wait_until(lambda: bench.sessions.mass_loss() >= 3)
    reaper = reaper_of(bench)
    await a_lease_ran_out(bench)
    await reaper.sweep()
    assert (await bench.job(job_id)).state is JobState.RUNNING
    assert "nodes vanished at once" in reaper.notices()[0]


async def test_a_fleet_too_small_to_judge_is_reaped_as_ever(store: Store, short_path: Path) -> None:
    settings = replace(QUICK, lease_seconds=0.3, mass_loss=replace(RULE, least=NODES + 1))
    async with bench_on(store, short_path, settings=settings) as bench:
        await dial(bench)
        job_id = await bench.submit()
        await runner_of(bench, job_id)
        for agent in bench.agents:
            await agent.hang_up()
        await a_lease_ran_out(bench)
        reaper = reaper_of(bench)

        async def reaped() -> bool:
            await reaper.sweep()
            return (await bench.job(job_id)).losses >= 1

        await wait_until(reaped)
        assert reaper.notices() == []


async def test_it_is_over_when_they_are_back(bench: Bench) -> None:
    agents = await dial(bench)
    for agent in agents[:3]:
        await agent.hang_up()
    await wait_until(lambda: bench.sessions.mass_loss() >= 3)
    for agent in agents[:3]:
        await agent.dial()
    assert bench.sessions.mass_loss() == 0
    await agents[3].hang_up()
    await wait_until(lambda: len(bench.fleet.online()) == 3)
    assert bench.sessions.mass_loss() == 0


async def test_a_goodbye_is_no_loss(bench: Bench) -> None:
    agents = await dial(bench)
    for agent in agents[:3]:
        await agent.send(goodbye=pb.AgentGoodbye())
        await agent.finish()
    await wait_until(lambda: len(bench.fleet.online()) == 1)
    assert bench.sessions.mass_loss() == 0
