"""What a sweep spares: work of a fleet that vanished at once, and of nodes whose replica is gone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleet_server.domain.job import Claim
from fleet_server.domain.massloss import MassLossRule
from fleet_server.store import Held, ReapResult, ReapWatch, Store
from tests.store.making import ERRORS, LEASE_MS, ManualClock, claim, running, submit

LIFE_MS, GRACE_MS, MARGIN_MS = 10_000, 60_000, 10_000
WINDOW_MS, FREEZE_MS = 60_000, 300_000
A = ReapWatch("a", "boot-1", LIFE_MS, GRACE_MS, MassLossRule())
B = replace(A, replica="b")


async def connect(store: Store, node_id: str = "agx0", session: str = "", replica: str = "a") -> None:
    session = session or f"{node_id}-s1"
    await store.nodes.connect(node_id, session=session, instance_id="boot", info=b"", replica=replica)


async def sweep(store: Store, watch: ReapWatch = B, *, hold: bool = False) -> ReapResult:
    return await store.jobs.reap(ERRORS, watch=watch, hold=hold, margin_ms=MARGIN_MS)


async def work_at(store: Store, node_id: str = "agx0", replica: str = "a", **changes: int) -> Claim:
    """A node with a stream through a living replica, and a job that runs there."""
    await connect(store, node_id, replica=replica)
    await sweep(store, replace(A, replica=replica))
    return await running(store, node_id, **changes)


async def token_of(store: Store, claimed: Claim) -> str:
    record = await store.jobs.get(claimed.job.job_id)
    assert record is not None
    return record.token


async def fleet(store: Store, count: int) -> None:
    """So many nodes, one after the other at two replicas."""
    for n in range(count):
        await connect(store, f"n{n}", replica="ab"[n % 2])


async def vanish(store: Store, *numbers: int) -> None:
    for n in numbers:
        assert await store.nodes.disconnect(f"n{n}", f"n{n}-s1")


# Replicas that are gone.


async def test_the_jobs_of_a_dead_replicas_agents_get_one_extension(store: Store, clock: ManualClock) -> None:
    """60 s from the end of its life sign; what has not come back by then is lost as ever."""
    claimed = await work_at(store)
    clock.tick(LEASE_MS)
    first = await sweep(store)
    assert (first.requeued, first.extended) == ((), 1)
    assert await sweep(store) == ReapResult((), (), (), False)
    clock.tick(LIFE_MS + GRACE_MS - LEASE_MS - 1)
    assert await sweep(store) == ReapResult((), (), (), False)
    clock.tick(1)
    (record,) = (await sweep(store)).requeued
    assert (record.job_id, record.losses) == (claimed.job.job_id, 1)


async def test_who_dials_another_replica_goes_on_with_its_lease(store: Store, clock: ManualClock) -> None:
    claimed = await work_at(store)
    clock.tick(LEASE_MS)
    await sweep(store)
    clock.tick(5_000)
    await connect(store, session="s2", replica="b")
    assert await store.jobs.renew([Held(claimed.job.job_id, claimed.token)], LEASE_MS) == []
    clock.tick(LEASE_MS - 1)
    assert await sweep(store) == ReapResult((), (), (), False)
    clock.tick(1)
    assert len((await sweep(store)).requeued) == 1


async def test_an_attempt_is_extended_once_whoever_dies_next(store: Store, clock: ManualClock) -> None:
    claimed = await work_at(store)
    clock.tick(LEASE_MS)
    assert (await sweep(store)).extended == 1
    await connect(store, session="s2", replica="b")
    await store.jobs.renew([Held(claimed.job.job_id, claimed.token)], LEASE_MS)
    clock.tick(LEASE_MS)
    third = replace(A, replica="c")
    result = await sweep(store, third)
    assert (len(result.requeued), result.extended) == (1, 0)
    await claim(store, session="s2")
    clock.tick(LEASE_MS)
    assert (await sweep(store, third)).extended == 1, "another attempt has an extension of its own"


async def test_a_living_replicas_agents_get_none(store: Store, clock: ManualClock) -> None:
    """`a` sweeps on, and the node's stream is no older than it."""
    await sweep(store, A)
    await work_at(store)
    for _ in range(3):
        clock.tick(LEASE_MS // 3)
        result = await sweep(store, A)
    assert (len(result.requeued), result.extended) == (1, 0)


async def test_a_life_sign_is_good_for_its_whole_time(store: Store, clock: ManualClock) -> None:
    await sweep(store, A)
    await work_at(store)
    clock.tick(LEASE_MS - LIFE_MS)
    await sweep(store, A)
    clock.tick(LIFE_MS)
    assert len((await sweep(store)).requeued) == 1


async def test_a_replica_that_began_anew_is_waited_for_like_a_dead_one(store: Store, clock: ManualClock) -> None:
    """The other replica does not reap what the new start leaves alone for its first 60 s."""
    await work_at(store)
    clock.tick(LEASE_MS - 1)
    again = replace(A, boot="boot-2")
    assert await sweep(store, again, hold=True) == ReapResult((), (), (), False)
    clock.tick(1)
    assert (await sweep(store)).extended == 1
    for _ in range(12):
        clock.tick(GRACE_MS // 12)
        await sweep(store, again, hold=True)
    clock.now -= 2
    assert len((await sweep(store)).requeued) == 0
    clock.tick(1)
    assert len((await sweep(store)).requeued) == 1


async def test_a_server_alone_extends_nothing_after_its_own_grace(store: Store, clock: ManualClock) -> None:
    await work_at(store)
    clock.tick(LEASE_MS)
    again = replace(A, boot="boot-2")
    await sweep(store, again, hold=True)
    clock.tick(GRACE_MS)
    result = await sweep(store, again)
    assert (len(result.requeued), result.extended) == (1, 0)


async def test_a_lease_that_outlasts_all_that_gets_none(store: Store, clock: ManualClock) -> None:
    """Its node has had time enough to dial again: nobody swept meanwhile, or all replicas waited."""
    await work_at(store)
    clock.tick(LIFE_MS + GRACE_MS)
    result = await sweep(store)
    assert (len(result.requeued), result.extended) == (1, 0)


async def test_an_overdue_run_waits_with_its_lease(store: Store, clock: ManualClock) -> None:
    """Its node may have ended it in time, and nobody was there to be told."""
    claimed = await work_at(store, timeout_ms=5_000, max_retries=0)
    clock.tick(5_000 + MARGIN_MS)
    assert (await sweep(store)).extended == 1
    clock.tick(LEASE_MS)
    assert await sweep(store) == ReapResult((), (), (), False)
    assert await token_of(store, claimed) == claimed.token
    clock.tick(LIFE_MS + GRACE_MS - 5_000 - MARGIN_MS - LEASE_MS)
    result = await sweep(store)
    assert len(result.requeued + result.failed) == 1


async def test_an_extension_never_shortens_a_lease(store: Store, clock: ManualClock) -> None:
    claimed = await work_at(store, timeout_ms=5_000)
    await store.jobs.renew([Held(claimed.job.job_id, claimed.token)], 10 * GRACE_MS)
    clock.tick(5_000 + MARGIN_MS)
    assert (await sweep(store)).extended == 1
    clock.tick(LIFE_MS + GRACE_MS - 5_000 - MARGIN_MS)
    (record,) = (await sweep(store)).requeued
    assert record.wait_reason == "BACKOFF", "its time was over, not its lease"


async def test_what_a_server_gave_back_is_not_extended(store: Store, clock: ManualClock) -> None:
    claimed = await work_at(store, exclusive=True)
    await store.jobs.release(claimed.job.job_id, claimed.token, stopped=False)
    clock.tick(LEASE_MS + 5_000)
    result = await sweep(store)
    assert (len(result.requeued), result.extended) == (1, 0)


async def test_a_server_gives_back_nothing_of_a_node_that_is_at_another(store: Store, clock: ManualClock) -> None:
    claimed = await work_at(store)
    job_id, token = claimed.job.job_id, claimed.token
    await connect(store, session="s2", replica="b")
    assert not await store.jobs.release(job_id, token, stopped=False, session="agx0-s1")
    assert await token_of(store, claimed) == token
    assert await store.jobs.release(job_id, token, stopped=False, session="s2")
    assert await token_of(store, claimed) == ""


async def test_a_hold_spends_no_extension(store: Store, clock: ManualClock) -> None:
    await work_at(store)
    clock.tick(LEASE_MS)
    assert (await sweep(store, hold=True)).extended == 0
    assert (await sweep(store)).extended == 1


async def test_a_silent_node_is_its_own_replicas_business_while_that_lives(store: Store, clock: ManualClock) -> None:
    """The store was away: nobody's readings are fresh, and nobody is gone."""
    await connect(store)
    await sweep(store, A)
    clock.tick(LIFE_MS)
    assert not await store.nodes.silent("agx0", "agx0-s1")
    clock.tick(1)
    assert not await store.nodes.silent("agx0", "s0")
    assert await store.nodes.silent("agx0", "agx0-s1")
    row = await store.nodes.get("agx0")
    assert row is not None and row.status == "disconnected"
    sharp = replace(B, mass_loss=MassLossRule(share=0, least=1))
    assert (await sweep(store, sharp)).missing == 1


# A mass loss.


@pytest.mark.parametrize(
    ("away", "known", "missing"),
    [
        (6, 10, 6),
        (5, 10, 0),
        (11, 20, 11),
        (8, 9, 0),  # too few to judge
        (0, 12, 0),
    ],
)
async def test_more_than_half_of_at_least_ten_nodes_is_a_mass_loss(
    store: Store, clock: ManualClock, away: int, known: int, missing: int
) -> None:
    """Over the nodes of all replicas, and each replica that sweeps hears of it."""
    await fleet(store, known)
    await vanish(store, *range(away))
    for watch in (A, B):
        assert (await sweep(store, watch)).missing == missing


async def test_nothing_is_reassigned_by_any_replica_while_it_lasts(store: Store, clock: ManualClock) -> None:
    await fleet(store, 10)
    lease, late = await running(store, "n0"), await running(store, "n9", timeout_ms=1_000)
    due = await submit(store, schedule_ms=clock.now + LEASE_MS)
    await vanish(store, *range(6))
    await sweep(store, A)
    clock.tick(LEASE_MS)
    result = await sweep(store, B)
    assert (result.requeued, result.failed, result.missing) == ((), (), 6)
    assert [job.job_id for job in result.promoted] == [due], "all else goes on"
    assert [await token_of(store, one) for one in (lease, late)] == [lease.token, late.token]
    clock.tick(FREEZE_MS - LEASE_MS - 1)
    assert (await sweep(store, A)).missing == 6
    clock.tick(1)
    result = await sweep(store, B)
    assert (len(result.requeued), result.missing) == (2, 0)
    assert (await sweep(store, A)).missing == 0, "the same loss does not begin again"


async def test_it_ends_when_half_are_back_on_whatever_replica(store: Store, clock: ManualClock) -> None:
    await fleet(store, 12)
    await vanish(store, *range(10))
    assert (await sweep(store)).missing == 10
    for n in range(4):
        await connect(store, f"n{n}", session="s2", replica="b")
    assert (await sweep(store)).missing == 0
    await vanish(store, 10, 11)
    assert (await sweep(store)).missing == 0, "who was counted once is not counted again"


async def test_nodes_that_left_one_by_one_over_a_longer_time_are_none(store: Store, clock: ManualClock) -> None:
    await fleet(store, 20)
    for n in range(15):
        await vanish(store, n)
        assert (await sweep(store)).missing == 0
        clock.tick(WINDOW_MS // 3)


async def test_who_is_back_deleted_or_said_goodbye_is_not_counted(store: Store, clock: ManualClock) -> None:
    await fleet(store, 15)
    await vanish(store, *range(4))
    await store.nodes.disconnect("n4", "n4-s1", lost=False)
    await store.nodes.disconnect("n5", "n5-s1", lost=False)
    await vanish(store, 6)
    assert await store.nodes.heartbeat("n6", "n6-s1", b""), "its stream was there all the time"
    await vanish(store, 7)
    assert await store.nodes.delete("n7") is not None
    await vanish(store, 8, 9)
    assert (await sweep(store)).missing == 0, "6 of 12"
    await vanish(store, 10)
    assert (await sweep(store)).missing == 7
    for n in (3, 2):
        assert await store.nodes.delete(f"n{n}") is not None
    assert (await sweep(store)).missing == 0, "5 of 10"
