"""Groups: children are jobs of their own, the last of them ends the group."""

from __future__ import annotations

from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, NewJob, WaitReason
from fleet_server.store import Idempotency, Store
from tests.store.making import ERRORS, ManualClock, claim, drain, error, new_job, reasons, submit, wish

S, F, C, Q, R = "succeeded", "failed", "cancelled", "queued", "running"


def group(size: int, **changes: Any) -> list[NewJob]:
    """A group and its children, in order."""
    group_job_id = new_job().job_id
    children = [new_job(group_job_id=group_job_id, max_retries=0) for _ in range(size)]
    return [new_job(group_job_id, child_job_ids=tuple(child.job_id for child in children), **changes), *children]


async def made(store: Store, size: int, **changes: Any) -> tuple[str, list[str]]:
    """A group in the store: its id and its children's."""
    jobs = group(size, **changes)
    submitted = await store.jobs.submit(jobs)
    assert (submitted.job_ids, submitted.positions) == ((jobs[0].job_id,), (None,))
    return jobs[0].job_id, [job.job_id for job in jobs[1:]]


async def get(store: Store, job_id: str) -> JobRecord:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record


async def states(store: Store, *job_ids: str) -> list[str]:
    return [(await get(store, job_id)).state.value for job_id in job_ids]


async def end(store: Store, job_id: str, how: str) -> None:
    """Ends a child that waits in line."""
    if how == C:
        await store.jobs.cancel(job_id)
        return
    claimed = await claim(store, job_id=job_id)
    await store.jobs.started(job_id, claimed.token)
    if how == S:
        assert (await store.jobs.complete(job_id, claimed.token, result=b"r")).outcome == "ok"
    else:
        what = error(f"BAD_{job_id}")
        failed = await store.jobs.fail(job_id, claimed.token, error=what, attempt=b"a", retryable=True)
        assert failed.outcome == "ok"


async def test_a_group_is_never_in_line_and_its_children_are(store: Store) -> None:
    parent, children = await made(store, 3)
    record = await get(store, parent)
    assert (record.state, record.children, record.group_job_id) == (JobState.QUEUED, 3, "")
    assert (await get(store, children[0])).group_job_id == parent
    assert await store.jobs.claim([wish(job_id=parent)]) == [None]
    assert await drain(store) == children


async def test_lists_leave_children_out(store: Store, clock: ManualClock) -> None:
    parent, children = await made(store, 3)
    clock.tick(1)
    plain = await submit(store)
    records, _ = await store.jobs.list()
    assert [record.job_id for record in records] == [plain, parent]
    page, following = await store.jobs.list(group=parent, limit=2)
    assert [record.job_id for record in page] == [children[2], children[1]]
    page, following = await store.jobs.list(group=parent, limit=2, before=following)
    assert ([record.job_id for record in page], following) == ([children[0]], None)
    await end(store, children[1], C)
    page, _ = await store.jobs.list(group=parent, states=[JobState.CANCELLED])
    assert [record.job_id for record in page] == [children[1]]
    assert (await store.jobs.list(group=parent, created_before_ms=clock.now - 1))[0] == []
    assert (await store.jobs.list(group="unknown"))[0] == []
    counts = await store.jobs.counts()
    assert (counts[JobState.QUEUED], counts[JobState.CANCELLED]) == (4, 1)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((S, S, S), S), ((S, F, S), F), ((F, C, F), F), ((S, C, S), C), ((C, C, F), F), ((C, C, C), C)],
)
async def test_the_last_child_ends_the_group(
    store: Store, clock: ManualClock, ends: tuple[str, ...], expected: str
) -> None:
    parent, children = await made(store, 3)
    order = [2, 0, 1]
    for place in order[:-1]:
        await end(store, children[place], ends[place])
        assert (await get(store, parent)).ended_ms is None
    clock.tick(7)
    await end(store, children[order[-1]], ends[order[-1]])
    record = await get(store, parent)
    assert (record.state.value, record.ended_ms) == (expected, clock.now)
    if expected == F:
        assert reasons([record.error]) == [record.reason] == [f"BAD_{children[ends.index(F)]}"]
    events, _ = await store.events.read("0")
    last = [event for event in events if event.type == "job_complete"][-1]
    assert last.fields["id"].decode() == parent


async def test_a_group_runs_from_the_first_start_on(store: Store, clock: ManualClock) -> None:
    parent, _ = await made(store, 2)
    claimed = await claim(store)
    assert await states(store, parent) == [Q]
    clock.tick(5)
    await store.jobs.started(claimed.job.job_id, claimed.token)
    record = await get(store, parent)
    assert (record.state, record.started_ms, record.version) == (JobState.RUNNING, clock.now, 2)
    second = await claim(store)
    await store.jobs.started(second.job.job_id, second.token)
    assert (await get(store, parent)).version == 2


async def test_cancel_reaches_all_children(store: Store) -> None:
    parent, children = await made(store, 64)
    await end(store, children[0], S)
    held = await claim(store, job_id=children[1])
    assert (await store.jobs.cancel(parent)).state is JobState.CANCELLED
    assert await states(store, *children[:3], children[63]) == [S, C, C, C]
    assert (await store.jobs.complete(children[1], held.token, result=b"")).outcome == "refused"
    assert (await store.jobs.cancel(parent)).state is JobState.CANCELLED
    events, _ = await store.events.read("0")
    ends = [event.fields["id"].decode() for event in events if event.type == "job_complete"]
    assert sorted(ends) == sorted([parent, *children])
    with pytest.raises(FleetError, match="cancelled"):
        await store.jobs.retry(parent)


async def test_a_child_is_cancelled_alone(store: Store) -> None:
    parent, children = await made(store, 2)
    await store.jobs.cancel(children[0])
    assert await states(store, parent, *children) == [Q, C, Q]


async def test_retry_takes_up_what_did_not_succeed(store: Store, clock: ManualClock) -> None:
    parent, children = await made(store, 3)
    for child, how in zip(children, (S, F, C), strict=True):
        await end(store, child, how)
    clock.tick(10)
    record = await store.jobs.retry(parent)
    assert (record.state, record.generation, record.error, record.reason) == (JobState.QUEUED, 2, b"", "")
    found = await store.jobs.get_many(children)
    assert [(job.state.value, job.generation) for job in found if job] == [(S, 1), (Q, 2), (Q, 2)]
    assert (await store.jobs.list_dead())[0] == []
    assert set(await drain(store)) == set(children[1:])
    for child in children[1:]:
        job = await get(store, child)
        await store.jobs.complete(child, job.token, result=b"")
    assert await states(store, parent) == [S]


async def test_a_child_retried_takes_its_group_along(store: Store) -> None:
    parent, children = await made(store, 3)
    await end(store, children[0], F)
    assert (await store.jobs.retry(children[0])).generation == 2
    for child, how in zip(children, (F, F, S), strict=True):
        assert (await get(store, parent)).ended_ms is None
        await end(store, child, how)
    assert (await store.jobs.retry(children[0])).generation == 3
    assert (await get(store, parent)).generation == 2
    assert await states(store, parent, *children) == [Q, Q, F, S]
    await end(store, children[0], S)
    assert reasons([(await get(store, parent)).error]) == [f"BAD_{children[1]}"]
    await store.jobs.retry(parent)
    await store.jobs.cancel(parent)
    other, failed = await made(store, 2)
    await end(store, failed[0], F)
    await store.jobs.cancel(other)
    with pytest.raises(FleetError, match=f"its group {other} is cancelled"):
        await store.jobs.retry(failed[0])


async def test_only_the_group_is_on_the_dead_list(store: Store) -> None:
    parent, children = await made(store, 2)
    await end(store, children[0], F)
    assert (await store.jobs.list_dead())[0] == []
    await end(store, children[1], F)
    assert [job.job_id for job in (await store.jobs.list_dead())[0]] == [parent]


async def test_children_wait_for_what_their_group_waits_for(store: Store, clock: ManualClock) -> None:
    before = await submit(store)
    parent, children = await made(store, 2, after=(before,), schedule_ms=clock.now + 1000)
    after = await submit(store, after=(parent,))
    assert {(await get(store, one)).wait_reason for one in (parent, *children)} == {WaitReason.DEPENDENCY}
    claimed = await claim(store)
    await store.jobs.complete(before, claimed.token, result=b"")
    assert {(await get(store, one)).wait_reason for one in (parent, *children)} == {WaitReason.SCHEDULED}
    clock.tick(1000)
    await store.jobs.reap(ERRORS)
    assert {(await get(store, one)).wait_reason for one in (parent, *children)} == {WaitReason.NONE}
    for child in children:
        await end(store, child, S)
    assert await drain(store) == [after]


async def test_a_failed_parent_cancels_the_whole_group(store: Store) -> None:
    before = await submit(store)
    parent, children = await made(store, 64, after=(before,))
    after = await submit(store, after=(parent,))
    await store.jobs.cancel(before)
    while (await store.jobs.reap(ERRORS)).more:
        pass
    assert set(await states(store, parent, after, *children)) == {C}
    late, late_children = await made(store, 2, after=(before,))
    assert set(await states(store, late, *late_children)) == {C}


async def test_a_group_that_expired_can_be_retried(store: Store, clock: ManualClock) -> None:
    jobs = group(2)
    await store.jobs.submit(jobs)
    clock.tick(86_400_000)
    assert len((await store.jobs.reap(ERRORS)).failed) == 2
    parent = jobs[0].job_id
    assert ((await get(store, parent)).state, (await get(store, parent)).reason) == (
        JobState.FAILED,
        "QUEUE_TTL_EXPIRED",
    )
    await store.jobs.retry(parent)
    assert len(await drain(store)) == 2


async def test_repeating_a_submit_answers_with_the_group_alone(store: Store) -> None:
    key = Idempotency("a", "m", "k", "print")
    jobs = [new_job(), *group(3)]
    first = await store.jobs.submit(jobs, idempotency=key)
    assert first.job_ids == (jobs[0].job_id, jobs[1].job_id)
    assert first.positions == (1, None)
    again = await store.jobs.submit([new_job(), *group(3)], idempotency=key)
    assert (again.job_ids, again.replayed) == (first.job_ids, True)
    assert (await store.jobs.counts())[JobState.QUEUED] == 5


async def test_a_group_comes_with_all_its_children(store: Store) -> None:
    parent, first, second = group(2)
    for jobs in ([parent], [parent, first], [parent, second, first], [new_job(), first]):
        with pytest.raises(ValueError, match="submit"):
            await store.jobs.submit(jobs)
    many = [job for _ in range(63) for job in group(64)]
    with pytest.raises(FleetError, match="several calls"):
        await store.jobs.submit(many)


async def test_a_thousand_jobs_may_make_four_thousand(store: Store) -> None:
    many = [job for _ in range(1000) for job in group(3)]
    assert len((await store.jobs.submit(many)).job_ids) == 1000
    assert (await store.jobs.counts())[JobState.QUEUED] == 4000
    assert (await store.jobs.lanes())[0].waiting == 3000


async def test_a_group_is_purged_with_its_children_once_all_have_ended(store: Store, clock: ManualClock) -> None:
    parent, children = await made(store, 3)
    for child in children:
        await end(store, child, C)
    clock.tick(1000)
    assert await store.jobs.purge(keep_ms=500) == 1
    assert await store.jobs.get_many([parent, *children]) == [None] * 4


async def test_a_group_stays_while_a_child_lives(store: Store, clock: ManualClock) -> None:
    """Its cancellation may have reached 64 jobs only."""
    other, second = await made(store, 64)
    bad = await submit(store)
    waiting = await submit(store, after=(bad,))
    jobs = group(64, after=(bad,))
    await store.jobs.submit(jobs)
    await store.jobs.cancel(bad)
    assert JobState.QUEUED in {(await get(store, job.job_id)).state for job in jobs[1:]}
    assert await store.jobs.purge(keep_count=0) == 2
    assert await store.jobs.get(jobs[0].job_id) is not None
    while (await store.jobs.reap(ERRORS)).more:
        pass
    assert await store.jobs.purge(keep_count=0) == 1
    assert await store.jobs.get_many([waiting, *(job.job_id for job in jobs)]) == [None] * 66
    await store.jobs.cancel(other)
    assert set(await states(store, other, *second)) == {C}
