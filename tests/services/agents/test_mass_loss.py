"""Servers of one fleet look after each other's nodes: most of them vanish at once, or a server does."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from fleet.v1 import node_pb2 as pb

from fleet_server.domain.job import JobState
from fleet_server.domain.massloss import MassLossRule
from fleet_server.services.reaper import Reaper, ReaperSettings
from tests.services.agents.agent import ScriptedAgent, wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on
from tests.services.agents.pair import Pair, opened

HALF_OF_FOUR = MassLossRule(least=4, window_seconds=600, freeze_seconds=600)
ANY = MassLossRule(share=0, least=1, window_seconds=600, freeze_seconds=600)
"""Each node that vanished is a mass loss: what is counted is seen."""
SHORT_LIFE = ReaperSettings(grace_seconds=600, sweep_seconds=0.001, lease_seconds=0.003)


def reaper_of(bench: Bench, name: str, settings: ReaperSettings) -> Reaper:
    return Reaper(bench.store, bench.fleet, lambda: None, replica=name, settings=settings)


def counting(bench: Bench, name: str, rule: MassLossRule) -> Reaper:
    return reaper_of(bench, name, ReaperSettings(grace_seconds=0, check_seconds=0, mass_loss=rule))


async def missed(reaper: Reaper) -> int:
    """How many nodes the servers miss, by what an operator reads."""
    await reaper.sweep()
    notices = reaper.notices()
    return int(notices[0].split()[0]) if notices else 0


async def miss(reaper: Reaper, count: int) -> bool:
    return await missed(reaper) == count


async def lease_ends(bench: Bench, job_id: str) -> None:
    """The lease has run out, whatever the clock says."""
    room = bench.store.jobs._room
    await room.bulk.call("ZADD", f"{room.keys.prefix}leases", "XX", 1, job_id)


async def lapsed(bench: Bench, name: str) -> bool:
    """Whether the life sign of a server is over."""
    room = bench.store.jobs._room
    sign = await room.bulk.call("GET", f"{room.keys.prefix}life:{name}")
    seconds, micros = await room.bulk.call("TIME")
    return int(sign.split()[1]) < int(seconds) * 1000 + int(micros) // 1000


async def runner_of(job_id: str, *benches: Bench) -> ScriptedAgent:
    """The agent that the job was given to, once the store knows that it started."""

    async def claimed() -> str:
        return (await benches[0].job(job_id)).node_id

    node_id = await wait_until(claimed)
    (runner,) = [agent for bench in benches for agent in bench.agents if agent.node_id == node_id]
    await runner.start()
    await wait_until(lambda: benches[0].started(job_id))
    return runner


async def test_a_mass_loss_is_that_of_the_whole_fleet_and_holds_at_each_server(pair: Pair) -> None:
    one, other = counting(pair.a, "a", HALF_OF_FOUR), counting(pair.b, "b", HALF_OF_FOUR)
    agents = await pair.dial(pair.a, "n0", "n1") + await pair.dial(pair.b, "n2", "n3")
    job_id = await pair.a.submit()
    runner = await runner_of(job_id, pair.a, pair.b)
    gone = [runner, *(agent for agent in agents if agent is not runner)][:3]
    for agent in gone[:2]:
        await agent.hang_up()
    assert await missed(one) == await missed(other) == 0
    await gone[2].hang_up()
    await wait_until(lambda: miss(one, 3))
    await lease_ends(pair.a, job_id)
    assert await missed(other) == 3
    assert (await pair.b.job(job_id)).state is JobState.RUNNING
    assert "vanished at once" in other.notices()[0]
    await pair.b.agent(gone[1].node_id).dial()
    assert await missed(one) == await missed(other) == 0
    assert (await pair.a.job(job_id)).losses == 1, "reassigned, as ever"


async def test_goodbyes_of_either_side_are_no_loss(pair: Pair) -> None:
    """Neither an agent's nor a server's, nor what a server finds in the store at its start."""
    polite, _, lost = await pair.dial(pair.a, "polite", "left", "lost")
    reaper = counting(pair.b, "b", ANY)
    await polite.send(goodbye=pb.AgentGoodbye())
    await polite.finish()
    await wait_until(lambda: pair.a.status_is("down", "polite"))
    assert await missed(reaper) == 0
    await lost.hang_up()
    await wait_until(lambda: miss(reaper, 1))
    await lost.dial()
    assert await missed(reaper) == 0
    await pair.a.sessions.shutdown()
    for node_id in ("left", "lost"):
        assert await pair.a.status(node_id) == "disconnected"
    assert await missed(reaper) == 0
    await pair.dial(pair.b, "left")
    await pair.die(pair.b)
    assert await pair.a.status("left") == "online"
    again = await opened(pair.stack, pair.a.store, "b")
    await again.sessions.loaded()
    assert await again.status("left") == "disconnected"
    assert await missed(reaper) == 0


async def test_jobs_of_a_dead_servers_agents_wait_for_them_to_dial_another(pair: Pair) -> None:
    (agent,) = await pair.dial(pair.a, "n0")
    job_id = await pair.a.submit()
    assign = await agent.start()
    await reaper_of(pair.a, "a", SHORT_LIFE).sweep()
    survivor = reaper_of(pair.b, "b", SHORT_LIFE)
    await survivor.sweep()
    survivor._hold_until = 0.0  # It has run for long.
    await pair.die(pair.a)
    await wait_until(lambda: lapsed(pair.b, "a"))
    await lease_ends(pair.b, job_id)
    await survivor.sweep()
    record = await pair.b.job(job_id)
    assert (record.state, record.token) == (JobState.RUNNING, assign.token)
    back = pair.b.agent("n0")
    welcome = await back.dial(held=[pb.HeldAttempt(job_id=job_id, token=assign.token)])
    assert list(welcome.keep_tokens) == [assign.token]
    assert await back.complete(assign) == pb.CompleteOutcome.COMPLETE_OUTCOME_OK
    record = await pair.b.job(job_id)
    assert (record.state, record.attempt, record.losses) == (JobState.SUCCEEDED, 1, 0)


async def test_nodes_that_a_dead_server_leaves_for_good_are_lost(pair: Pair) -> None:
    await pair.dial(pair.a, "n0")
    settings = replace(QUICK, persist_seconds=0.01, heartbeat_seconds=0.01)
    folder = Path(pair.stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp")))
    third = await pair.stack.enter_async_context(bench_on(pair.a.store, folder, settings=settings, replica="c"))
    reaper = counting(third, "c", ANY)
    await pair.die(pair.a)
    await wait_until(lambda: miss(reaper, 1))
