"""Who is next: age, boosts, every second claim for `high`, owners in turn, requeues at their old place."""

from __future__ import annotations

import asyncio
from collections import Counter

from fleet_server.domain.job import Lane, Priority
from fleet_server.store import Store
from tests.store.making import LANE, ManualClock, claim, drain, running, submit, token, wish

MINUTE = 60_000


async def test_oldest_first(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(5):
        ids.append(await submit(store))
        clock.tick(1)
    assert await drain(store) == ids


async def test_high_is_next_and_low_is_last(store: Store, clock: ManualClock) -> None:
    low = await submit(store, priority=Priority.LOW)
    normal = await submit(store)
    clock.tick(1)
    high = await submit(store, priority=Priority.HIGH)
    assert await drain(store) == [high, normal, low]


async def test_every_second_claim_is_by_age_however_many_highs_wait(store: Store, clock: ManualClock) -> None:
    """Normal jobs older than the boost share the lane with a flood of urgent ones, one to one."""
    normals = [await submit(store) for _ in range(3)]
    clock.tick(11 * MINUTE)
    highs = [await submit(store, priority=Priority.HIGH) for _ in range(5)]
    order = await drain(store)
    assert order == [highs[0], normals[0], highs[1], normals[1], highs[2], normals[2], highs[3], highs[4]]


async def test_high_that_trickles_in_starves_nobody(store: Store, clock: ManualClock) -> None:
    """One new high before each claim: half of the claims still go to the oldest."""
    normals = [await submit(store) for _ in range(4)]
    clock.tick(11 * MINUTE)
    taken: list[str] = []
    for _ in range(8):
        clock.tick(1)
        await submit(store, priority=Priority.HIGH)
        taken.append((await claim(store)).job.job_id)
    assert [job_id for job_id in taken if job_id in normals] == normals


async def test_low_is_overtaken_by_twenty_minutes_of_later_highs_at_most(store: Store, clock: ManualClock) -> None:
    low = await submit(store, priority=Priority.LOW)
    clock.tick(20 * MINUTE - 1)
    early = [await submit(store, priority=Priority.HIGH) for _ in range(3)]
    clock.tick(2)
    late = [await submit(store, priority=Priority.HIGH) for _ in range(3)]
    order = await drain(store)
    assert set(order[: order.index(low)]) <= {*early, late[0]}


async def test_an_old_job_of_a_busy_owner_is_not_hidden_by_a_new_owner(store: Store, clock: ManualClock) -> None:
    """Priorities are compared by their oldest job, not by the one whose owner's turn it is."""
    old = await submit(store, owner="busy")
    clock.tick(30 * MINUTE)
    low = await submit(store, owner="other", priority=Priority.LOW)
    new = await submit(store, owner="new")
    order = await drain(store)
    assert order.index(old) < order.index(low)
    assert order.index(new) < order.index(low)


async def test_owners_take_turns(store: Store, clock: ManualClock) -> None:
    owner_of: dict[str, str] = {}
    for owner, many in (("big", 60), ("mid", 20), ("tiny", 5)):
        for _ in range(many):
            owner_of[await submit(store, owner=owner)] = owner
            clock.tick(1)
    order = [owner_of[job_id] for job_id in await drain(store)]
    assert Counter(order[:15]) == {"big": 5, "mid": 5, "tiny": 5} or max(Counter(order[:15]).values()) <= 7
    assert "tiny" not in order[18:]
    assert "mid" not in order[50:]


async def test_an_owner_who_comes_back_for_each_job_gains_nothing(store: Store, clock: ManualClock) -> None:
    backlog = {await submit(store, owner="zed") for _ in range(20)}
    taken = []
    for _ in range(20):
        await submit(store, owner="abe")
        clock.tick(1)
        taken.append((await claim(store)).job.job_id in backlog)
    assert 9 <= sum(taken) <= 11


async def test_a_job_given_back_keeps_its_place(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(3):
        ids.append(await submit(store))
        clock.tick(1)
    first = await claim(store)
    assert first.job.job_id == ids[0]
    assert await store.jobs.release(first.job.job_id, first.token)
    assert await store.jobs.queue_positions([("vision", ids[0])]) == [1]
    assert await drain(store) == ids


async def test_lanes_show_the_head_after_boosts(store: Store, clock: ManualClock) -> None:
    begin = clock.now
    await submit(store, priority=Priority.LOW)
    clock.tick(1000)
    await submit(store, priority=Priority.HIGH)
    other = Lane("lane-b", "vision", "image_gen", "dream", ("glow",), "agx1", (("zone", "a"),), 3)
    await submit(store, lane=other)
    await submit(store, lane=other)
    views = {view.lane.lane_id: view for view in await store.jobs.lanes()}
    assert set(views) == {"lane-a", "lane-b"}
    view = views["lane-a"]
    assert (view.waiting, view.running, view.head_priority) == (2, 0, Priority.HIGH)
    assert (view.head_effective_ms, view.oldest_enqueued_ms) == (begin + 1000 - 10 * MINUTE, begin)
    assert views["lane-b"].lane == other
    await claim(store, lane=other)
    await drain(store)
    assert [v.lane.lane_id for v in await store.jobs.lanes()] == ["lane-b"]
    idle = {view.lane.lane_id: view for view in await store.jobs.lanes(idle=True)}
    assert (idle["lane-a"].running, idle["lane-a"].waiting, idle["lane-a"].head_effective_ms) == (2, 0, None)


async def test_peek_looks_without_claiming(store: Store, clock: ManualClock) -> None:
    low = await submit(store, priority=Priority.LOW)
    normal = await submit(store, owner="x")
    high = await submit(store, priority=Priority.HIGH)
    assert [record.job_id for record in await store.jobs.peek("lane-a")] == [high, normal, low]
    assert [record.job_id for record in await store.jobs.peek("lane-a", 1)] == [high]
    assert (await store.jobs.lanes())[0].waiting == 3


async def test_a_claim_by_id_takes_that_job_or_none(store: Store) -> None:
    first, second = await submit(store), await submit(store)
    assert (await claim(store, job_id=second)).job.job_id == second
    assert await store.jobs.claim([wish(job_id=second)]) == [None]
    assert await store.jobs.claim([wish(job_id=first, lane=Lane("lane-z", "vision", "x"))]) == [None]
    assert await store.jobs.claim([wish(job_id="unknown")]) == [None]
    assert (await claim(store)).job.job_id == first


async def test_claims_at_once_never_share_a_job(store: Store) -> None:
    ids = {await submit(store) for _ in range(30)}
    batches = await asyncio.gather(*(store.jobs.claim([wish(f"n{i}") for _ in range(4)]) for i in range(10)))
    got = [claimed.job.job_id for batch in batches for claimed in batch if claimed is not None]
    assert len(got) == len(set(got)) == 30
    assert set(got) == ids


async def test_the_same_token_gives_the_same_claim(store: Store) -> None:
    await submit(store, spec=b"first")
    await submit(store)
    attempt = token()
    (one,) = await store.jobs.claim([wish(attempt=attempt)])
    (two,) = await store.jobs.claim([wish(attempt=attempt)])
    assert one is not None
    assert one == two
    assert one.job.spec == b"first"
    assert one.job.attempt == 1
    assert await store.jobs.held_by("agx0") == {attempt: one.job.job_id}


async def test_a_session_that_is_not_its_nodes_claims_nothing(store: Store) -> None:
    await store.nodes.connect("agx0", session="new", instance_id="boot", info=b"", replica="r")
    await submit(store)
    assert await store.jobs.claim([wish("agx0", session="old")]) == [None]
    assert (await claim(store, "agx0", session="new")).job.session == "new"
    assert await store.jobs.claim([]) == []


async def test_claiming_counts_the_attempt(store: Store, clock: ManualClock) -> None:
    await submit(store)
    clock.tick(7)
    claimed = await claim(store, "agx7")
    job = claimed.job
    assert (job.state.value, job.attempt, job.node_id, job.token) == ("running", 1, "agx7", claimed.token)
    assert (job.started_ms, job.version, job.updated_ms) == (None, 2, clock.now)
    again = await running(store)
    assert again.job.lane_id == LANE.lane_id
