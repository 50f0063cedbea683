"""Attempts of an exclusive job never overlap: it comes back only when its lease has surely ended."""

from __future__ import annotations

from fleet_server.domain.job import JobRecord, JobState
from fleet_server.store import Held, Store
from tests.store.making import ERRORS, LEASE_MS, ManualClock, claim, reasons, running, wish

MARGIN_MS = 5_000


async def get(store: Store, job_id: str) -> JobRecord:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record


async def test_a_lost_one_waits_for_the_margin(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, exclusive=True)
    assert claimed.job.exclusive
    clock.tick(20_000)
    assert await store.jobs.renew([Held(claimed.job.job_id, claimed.token)], LEASE_MS) == []
    clock.tick(LEASE_MS + MARGIN_MS - 1)
    assert (await store.jobs.reap(ERRORS)).requeued == ()
    clock.tick(1)
    assert len((await store.jobs.reap(ERRORS)).requeued) == 1


async def test_a_claim_that_was_never_started_waits_too(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, exclusive=True)
    await store.jobs.release(claimed.job.job_id, claimed.token)
    await claim(store)
    clock.tick(LEASE_MS + MARGIN_MS - 1)
    assert (await store.jobs.reap(ERRORS)).requeued == ()
    clock.tick(1)
    assert len((await store.jobs.reap(ERRORS)).requeued) == 1


async def test_a_new_boot_gives_it_back_with_its_lease(store: Store, clock: ManualClock) -> None:
    """What the crashed agent ran may outlive it."""
    await store.nodes.connect("agx0", session="agx0-s1", instance_id="one", info=b"", replica="r")
    claimed = await running(store, exclusive=True)
    await store.nodes.connect("agx0", session="agx0-s2", instance_id="two", info=b"", replica="r")
    assert await store.jobs.lose_session("agx0", "agx0-s1", error=b"e") == []
    assert (await get(store, claimed.job.job_id)).state is JobState.RUNNING
    clock.tick(LEASE_MS + MARGIN_MS)
    assert len((await store.jobs.reap(ERRORS)).requeued) == 1


async def test_an_overdue_one_is_told_to_stop_first(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, exclusive=True, timeout_ms=20_000, max_retries=0)
    held = [Held(claimed.job.job_id, claimed.token)]
    clock.tick(25_000)
    assert await store.jobs.renew(held, LEASE_MS) == []
    clock.tick(5_000)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    assert await store.jobs.renew(held, LEASE_MS) == [claimed.token]
    clock.tick(LEASE_MS - 5_000 + MARGIN_MS - 1)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    clock.tick(1)
    (record,) = (await store.jobs.reap(ERRORS)).failed
    assert (record.reason, reasons([record.error])) == ("TIMEOUT", ["TIMEOUT"])
    assert record.losses == 0


async def test_an_overdue_one_may_still_bring_its_result(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, exclusive=True, timeout_ms=15_000)
    clock.tick(25_000)
    await store.jobs.reap(ERRORS)
    assert (await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"")).outcome == "ok"
    assert (await store.jobs.retry_many([claimed.job.job_id], operation="x"))[0] is not None


async def test_what_a_server_gives_back_may_run(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, exclusive=True)
    job_id = claimed.job.job_id
    assert await store.jobs.release(job_id, claimed.token, stopped=False)
    assert await store.jobs.release(job_id, claimed.token, stopped=False)
    assert await store.jobs.claim([wish("agx1")]) == [None]
    assert await store.jobs.renew([Held(job_id, claimed.token)], LEASE_MS) == [claimed.token]
    clock.tick(LEASE_MS + MARGIN_MS)
    (record,) = (await store.jobs.reap(ERRORS)).requeued
    assert (record.attempt, record.losses) == (0, 0)
    again = await claim(store)
    await store.jobs.started(job_id, again.token)
    assert await store.jobs.release(job_id, again.token, stopped=True)
    assert (await claim(store, "agx1")).job.job_id == job_id


async def test_others_come_back_at_once(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    assert await store.jobs.release(claimed.job.job_id, claimed.token, stopped=False)
    assert (await claim(store)).job.job_id == claimed.job.job_id
    clock.tick(LEASE_MS)
    assert len((await store.jobs.reap(ERRORS)).requeued) == 1
