"""Jobs that wait for others: in line when all have succeeded, cancelled when one has not."""

from __future__ import annotations

from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, WaitReason
from fleet_server.store import Store
from tests.store.making import (
    ERRORS,
    LANE,
    LEASE_MS,
    ManualClock,
    claim,
    drain,
    error,
    kinds,
    new_job,
    running,
    submit,
    wish,
)

HOUR = 3_600_000


async def get(store: Store, job_id: str) -> JobRecord:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record


async def state(store: Store, job_id: str) -> str:
    return (await get(store, job_id)).state.value


async def succeed(store: Store, job_id: str) -> None:
    claimed = await claim(store, job_id=job_id)
    assert (await store.jobs.complete(job_id, claimed.token, result=b"r")).outcome == "ok"


async def fail(store: Store, job_id: str) -> None:
    claimed = await claim(store, job_id=job_id)
    failed = await store.jobs.fail(job_id, claimed.token, error=error("X"), attempt=b"a", retryable=False)
    assert failed.outcome == "ok"


async def test_a_job_is_in_line_when_all_before_it_have_succeeded(store: Store, clock: ManualClock) -> None:
    one, two = await submit(store), await submit(store)
    begin = clock.now
    last = await submit(store, after=(one, two))
    record = await get(store, last)
    assert (record.state, record.wait_reason, record.waits) == (JobState.QUEUED, WaitReason.DEPENDENCY, 2)
    assert await store.jobs.queue_positions([("vision", last)]) == [None]
    assert await store.jobs.claim([wish(job_id=last)]) == [None]
    await succeed(store, two)
    assert (await get(store, last)).waits == 1
    clock.tick(HOUR)
    await succeed(store, one)
    record = await get(store, last)
    assert (record.wait_reason, record.waits, record.enqueued_ms) == (WaitReason.NONE, 0, clock.now)
    assert record.created_ms == begin
    assert (await kinds(store))[-1] == "job_update queued 2"
    assert await drain(store) == [last]


async def test_a_retry_of_a_failing_parent_is_no_end(store: Store, clock: ManualClock) -> None:
    parent = await submit(store)
    child = await submit(store, after=(parent,))
    claimed = await claim(store)
    await store.jobs.fail(parent, claimed.token, error=error("X"), attempt=b"a", retryable=True)
    assert (await get(store, child)).wait_reason is WaitReason.DEPENDENCY
    await succeed(store, parent)
    assert await drain(store) == [child]


@pytest.mark.parametrize("how", ["failed", "cancelled", "expired"])
async def test_a_parent_without_success_cancels_whoever_waits(store: Store, clock: ManualClock, how: str) -> None:
    parent = await submit(store, queue_ttl_ms=1000)
    child = await submit(store, after=(parent,))
    grandchild = await submit(store, after=(child,))
    other = await submit(store, after=(await submit(store),))
    if how == "failed":
        await fail(store, parent)
    elif how == "cancelled":
        await store.jobs.cancel(parent)
    else:
        clock.tick(1000)
        await store.jobs.reap(ERRORS)
    assert [await state(store, job_id) for job_id in (child, grandchild, other)] == ["cancelled", "cancelled", "queued"]
    ends = [one for one in await kinds(store) if one.startswith("job_complete")]
    assert len(ends) == 3


async def test_a_retried_parent_does_not_bring_them_back(store: Store) -> None:
    parent = await submit(store)
    child = await submit(store, after=(parent,))
    await fail(store, parent)
    await store.jobs.retry(parent)
    later = await submit(store, after=(parent,))
    assert await state(store, child) == "cancelled"
    with pytest.raises(FleetError, match="cancelled"):
        await store.jobs.retry(child)
    await succeed(store, parent)
    assert await state(store, child) == "cancelled"
    assert await drain(store) == [later]


@pytest.mark.parametrize("batch", [False, True])
async def test_ends_before_the_submit_count_alike(store: Store, clock: ManualClock, batch: bool) -> None:
    good, bad = await submit(store), await submit(store)
    await succeed(store, good)
    await fail(store, bad)
    jobs = [new_job(after=(good,)), new_job(after=(good, bad))]
    if batch:
        submitted = await store.jobs.submit(jobs)
        assert submitted.positions == (1, None)
    else:
        for job in jobs:
            await store.jobs.submit([job])
    assert [await state(store, job.job_id) for job in jobs] == ["queued", "cancelled"]
    assert await drain(store) == [jobs[0].job_id]
    assert (await store.jobs.submit([jobs[1]])).job_ids == (jobs[1].job_id,)


async def test_an_unknown_parent_is_named(store: Store) -> None:
    known = await submit(store)
    with pytest.raises(FleetError) as caught:
        await submit(store, after=(known, "nobody"))
    assert (caught.value.reason, caught.value.violations[0].field) == ("JOB_NOT_FOUND", "after[1]")
    first = new_job()
    for jobs, field in (
        ([new_job(), new_job(after=(known, "nobody"))], "jobs[1].after[1]"),
        ([new_job(after=(first.job_id,)), first], "jobs[0].after[0]"),
        ([new_job(), *group(2, after=("nobody",))], "jobs[1].after[0]"),
    ):
        with pytest.raises(FleetError) as caught:
            await store.jobs.submit(jobs)
        assert (caught.value.reason, caught.value.violations[0].field) == ("JOB_NOT_FOUND", field)
    assert (await store.jobs.counts())[JobState.QUEUED] == 1


def group(size: int, **changes: Any) -> list[Any]:
    """A group with its children."""
    parent = new_job(**changes)
    children = [new_job(group_job_id=parent.job_id) for _ in range(size)]
    return [new_job(parent.job_id, child_job_ids=tuple(child.job_id for child in children), **changes), *children]


async def test_jobs_of_one_submit_may_wait_for_each_other(store: Store) -> None:
    bad = await submit(store)
    await fail(store, bad)
    first = new_job()
    second = new_job(after=(first.job_id,))
    lost = new_job(after=(bad,))
    await store.jobs.submit([first, second, lost, new_job(after=(lost.job_id,))])
    assert await drain(store) == [first.job_id]
    assert (await store.jobs.counts())[JobState.CANCELLED] == 2


async def test_a_job_may_wait_for_others_and_for_a_time(store: Store, clock: ManualClock) -> None:
    parents = [await submit(store), await submit(store)]
    begin = clock.now
    early = await submit(store, after=(parents[0],), schedule_ms=begin + HOUR, queue_ttl_ms=HOUR)
    late = await submit(store, after=(parents[1],), schedule_ms=begin + HOUR, queue_ttl_ms=HOUR)
    await succeed(store, parents[0])
    assert (await get(store, early)).wait_reason is WaitReason.SCHEDULED
    clock.tick(HOUR)
    await store.jobs.reap(ERRORS)
    assert (await get(store, early)).wait_reason is WaitReason.NONE
    assert (await get(store, late)).wait_reason is WaitReason.DEPENDENCY
    clock.tick(5)
    await succeed(store, parents[1])
    assert (await get(store, late)).enqueued_ms == begin + HOUR + 5
    assert await drain(store) == [early, late]


async def test_the_queue_ttl_counts_from_the_submit(store: Store, clock: ManualClock) -> None:
    parent = await submit(store)
    child = await submit(store, after=(parent,), queue_ttl_ms=1000)
    waits = await submit(store, after=(await submit(store),), queue_ttl_ms=1000)
    clock.tick(900)
    await succeed(store, parent)
    claimed = await claim(store, job_id=child)
    await store.jobs.release(child, claimed.token)
    clock.tick(99)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    clock.tick(1)
    assert {job.job_id for job in (await store.jobs.reap(ERRORS)).failed} == {child, waits}


async def test_a_retry_waits_again_for_what_has_not_succeeded(store: Store, clock: ManualClock) -> None:
    """Expired while it waited, then retried: as if submitted anew."""
    good, open_, bad = [await submit(store) for _ in range(3)]
    one = await submit(store, after=(good, open_), queue_ttl_ms=1000)
    two = await submit(store, after=(bad,), queue_ttl_ms=1000)
    three = await submit(store, after=(good,), queue_ttl_ms=1000)
    clock.tick(1000)
    assert len((await store.jobs.reap(ERRORS)).failed) == 3
    await succeed(store, good)
    await fail(store, bad)
    record = await store.jobs.retry(one)
    assert (record.state, record.wait_reason, record.waits) == (JobState.QUEUED, WaitReason.DEPENDENCY, 1)
    assert (await store.jobs.retry(two)).state is JobState.CANCELLED
    assert (await store.jobs.retry(three)).wait_reason is WaitReason.NONE
    await succeed(store, open_)
    assert set(await drain(store)) == {one, three}


async def test_a_parent_that_succeeded_after_all_is_no_longer_waited_for(store: Store, clock: ManualClock) -> None:
    parent = await submit(store)
    child = await submit(store, after=(parent,), queue_ttl_ms=1000)
    clock.tick(1000)
    await store.jobs.reap(ERRORS)
    await fail(store, parent)
    await store.jobs.retry(parent)
    await succeed(store, parent)
    assert (await store.jobs.retry(child)).wait_reason is WaitReason.NONE
    assert await drain(store) == [child]


async def test_a_waiting_job_can_be_cancelled(store: Store) -> None:
    parent = await submit(store)
    child = await submit(store, after=(parent,))
    await store.jobs.cancel(child)
    await succeed(store, parent)
    assert await state(store, child) == "cancelled"
    assert (await store.jobs.lanes()) == []


@pytest.mark.parametrize("success", [True, False])
async def test_what_one_step_cannot_reach_the_next_sweeps_do(store: Store, clock: ManualClock, success: bool) -> None:
    """Each step is bounded; a parent retried or purged meanwhile changes nothing for those still to be reached."""
    parent = await submit(store)
    children = (await store.jobs.submit([new_job(after=(parent,)) for _ in range(150)])).job_ids
    await (succeed if success else fail)(store, parent)
    expected = JobState.QUEUED if success else JobState.CANCELLED
    reached = [one for one in await store.jobs.get_many(children) if one and not one.wait_reason]
    assert len(reached) == 64
    if success:
        assert await store.jobs.purge(keep_count=0) == 1
    else:
        await store.jobs.retry(parent)
    assert (await store.jobs.reap(ERRORS, limit=50)).more
    assert not (await store.jobs.reap(ERRORS, limit=50)).more
    records = await store.jobs.get_many(children)
    assert all(record is not None and record.state is expected and not record.wait_reason for record in records)


async def test_a_long_chain_falls_in_bounded_steps(store: Store) -> None:
    first = new_job()
    chain = [first]
    for _ in range(200):
        chain.append(new_job(after=(chain[-1].job_id,)))
    await store.jobs.submit(chain)
    await store.jobs.cancel(first.job_id)
    sweeps = 0
    while (await store.jobs.reap(ERRORS)).more:
        sweeps += 1
    assert sweeps == 1
    assert (await store.jobs.counts())[JobState.CANCELLED] == 201


async def test_a_late_result_of_a_parent_counts(store: Store, clock: ManualClock) -> None:
    parent = await running(store)
    child = await submit(store, after=(parent.job.job_id,))
    clock.tick(LEASE_MS)
    await store.jobs.reap(ERRORS)
    assert (await store.jobs.complete(parent.job.job_id, parent.token, result=b"")).outcome == "ok"
    assert await drain(store, lane=LANE) == [child]
