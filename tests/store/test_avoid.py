"""After a failure or a loss another node is tried first, for a while."""

from __future__ import annotations

from dataclasses import replace

from fleet_server.domain.job import Claim, Priority
from fleet_server.store import Store
from tests.store.making import ERRORS, LEASE_MS, ManualClock, claim, error, running, submit, wish

AVOID_MS = 30_000


async def failed(store: Store, node_id: str = "agx0", **changes: object) -> str:
    job_id = await submit(store, **changes)
    claimed = await claim(store, node_id, job_id=job_id)
    await store.jobs.fail(job_id, claimed.token, error=error("X"), attempt=b"a", retryable=True)
    return job_id


async def elsewhere(store: Store, node_id: str = "agx0") -> Claim | None:
    (claimed,) = await store.jobs.claim([replace(wish(node_id), avoid=True)])
    return claimed


async def test_a_failure_is_tried_on_another_node(store: Store, clock: ManualClock) -> None:
    job_id = await failed(store)
    record = await store.jobs.get(job_id)
    assert record is not None
    assert (record.avoid_node, record.avoid_until_ms) == ("agx0", clock.now + AVOID_MS)
    assert await elsewhere(store) is None
    claimed = await elsewhere(store, "agx1")
    assert claimed is not None
    assert (claimed.job.job_id, claimed.job.avoid_node) == (job_id, "")


async def test_where_no_other_node_can_it_is_tried_again_at_once(store: Store) -> None:
    job_id = await failed(store)
    assert (await claim(store)).job.job_id == job_id


async def test_avoidance_ends(store: Store, clock: ManualClock) -> None:
    job_id = await failed(store)
    clock.tick(AVOID_MS - 1)
    assert await elsewhere(store) is None
    clock.tick(1)
    claimed = await elsewhere(store)
    assert claimed is not None and claimed.job.job_id == job_id


async def test_a_lost_node_is_avoided_too(store: Store, clock: ManualClock) -> None:
    for started in (True, False):
        job_id = await submit(store)
        claimed = await claim(store)
        if started:
            await store.jobs.started(job_id, claimed.token)
        clock.tick(LEASE_MS)
        await store.jobs.reap(ERRORS, avoid_ms=500)
        assert await elsewhere(store) is None
        clock.tick(500)
        again = await elsewhere(store)
        assert again is not None
        await store.jobs.complete(job_id, again.token, result=b"")
    overdue = await running(store, timeout_ms=10)
    clock.tick(20_000)
    await store.jobs.reap(ERRORS, backoff_ms=0)
    assert await elsewhere(store) is None
    assert (await claim(store, job_id=overdue.job.job_id)).job.job_id == overdue.job.job_id


async def test_a_new_boots_losses_are_avoided(store: Store) -> None:
    await store.nodes.connect("agx0", session="agx0-s1", instance_id="one", info=b"", replica="r")
    await running(store)
    await store.nodes.connect("agx0", session="agx0-s2", instance_id="two", info=b"", replica="r")
    await store.jobs.lose_session("agx0", "agx0-s1", error=b"e", avoid_ms=700)
    assert await store.jobs.claim([replace(wish(session="agx0-s2"), avoid=True)]) == [None]
    assert await elsewhere(store, "agx1") is not None


async def test_the_next_in_line_is_taken_instead(store: Store, clock: ManualClock) -> None:
    for owner in ("a", "a", "b"):
        await failed(store, owner=owner)
        clock.tick(1)
    other = await submit(store, owner="b")
    low = await submit(store, owner="c", priority=Priority.LOW)
    assert [claimed.job.job_id for claimed in (await elsewhere(store), await elsewhere(store)) if claimed] == [
        other,
        low,
    ]


async def test_eight_are_looked_at(store: Store, clock: ManualClock) -> None:
    for _ in range(7):
        await failed(store)
        clock.tick(1)
    beyond = await submit(store)
    claimed = await elsewhere(store)
    assert claimed is not None and claimed.job.job_id == beyond
    clock.tick(-10_000)
    await failed(store)
    await submit(store, priority=Priority.LOW)
    assert await elsewhere(store) is None
