"""What time does: leases, losses and poison, deadlines, queue TTLs, due jobs, retention."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord, JobState, WaitReason
from fleet_server.store import ReapResult, Store
from tests.store.making import ERRORS, LEASE_MS, ManualClock, claim, error, reasons, running, submit, wish


async def get(store: Store, job_id: str) -> JobRecord:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record


async def lose(store: Store, clock: ManualClock, node_id: str, **options: Any) -> ReapResult:
    """Claims, starts and loses the one job that waits."""
    claimed = await claim(store, node_id)
    await store.jobs.started(claimed.job.job_id, claimed.token)
    clock.tick(LEASE_MS)
    return await store.jobs.reap(ERRORS, **options)


async def test_an_expired_lease_gives_the_job_back(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, max_retries=0)
    clock.tick(LEASE_MS - 1)
    assert (await store.jobs.reap(ERRORS)).requeued == ()
    clock.tick(1)
    result = await store.jobs.reap(ERRORS)
    assert [job.job_id for job in result.requeued] == [claimed.job.job_id]
    record = await get(store, claimed.job.job_id)
    assert (record.state, record.losses, record.attempt, record.token) == (JobState.QUEUED, 1, 1, "")
    (row,) = record.attempts
    attempt = types_pb2.JobAttempt.FromString(row)
    assert (attempt.generation, attempt.attempt, attempt.node_id) == (1, 1, "agx0")
    assert attempt.error.reason == "NODE_LOST"
    assert attempt.end_time.ToMilliseconds() == clock.now
    assert attempt.start_time.ToMilliseconds() == clock.now - LEASE_MS
    assert await store.jobs.reap(ERRORS) == ReapResult((), (), (), False)


async def test_a_loss_before_the_engine_started_is_not_counted(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    for _ in range(5):
        await claim(store)
        clock.tick(LEASE_MS)
        assert len((await store.jobs.reap(ERRORS)).requeued) == 1
    record = await get(store, job_id)
    assert (record.losses, record.attempt, record.attempts) == (0, 0, ())


async def test_losses_do_not_eat_retries(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store, max_retries=1)
    for _ in range(2):
        await lose(store, clock, "agx0")
    for state in (JobState.QUEUED, JobState.FAILED):
        claimed = await claim(store)
        await store.jobs.fail(job_id, claimed.token, error=error("X"), attempt=b"", retryable=True)
        assert (await get(store, job_id)).state is state
    assert (await get(store, job_id)).attempt == 4


async def test_three_losses_on_two_nodes_are_poison(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    assert len((await lose(store, clock, "agx0")).requeued) == 1
    assert len((await lose(store, clock, "agx0")).requeued) == 1
    result = await lose(store, clock, "agx1")
    assert [job.job_id for job in result.failed] == [job_id]
    record = await get(store, job_id)
    assert (record.state, record.losses) == (JobState.FAILED, 3)
    assert reasons([record.error]) == ["POISON"]
    assert len(record.attempts) == 3


async def test_losses_on_one_node_are_the_nodes_unless_it_is_the_only_one(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    for losses in (1, 2, 3, 4):
        await lose(store, clock, "agx0")
        record = await get(store, job_id)
        assert (record.state, record.losses) == (JobState.QUEUED, losses)
    await lose(store, clock, "agx0", single_node_lanes=["lane-a"])
    assert (await get(store, job_id)).state is JobState.FAILED
    other = await submit(store)
    for _ in range(3):
        await lose(store, clock, "agx0", single_node=True)
    assert (await get(store, other)).state is JobState.FAILED


async def test_the_ninth_loss_is_poison_on_whatever_nodes(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store)
    for _ in range(8):
        await lose(store, clock, "agx0")
    assert (await get(store, job_id)).state is JobState.QUEUED
    await lose(store, clock, "agx0")
    assert (await get(store, job_id)).state is JobState.FAILED


async def test_node_ids_are_compared_whole(store: Store, clock: ManualClock) -> None:
    """agx1 is not agx10: a prefix counts as another node."""
    job_id = await submit(store)
    for node_id in ("agx10", "agx10", "agx1"):
        await lose(store, clock, node_id)
    assert (await get(store, job_id)).state is JobState.FAILED


async def test_hold_leaves_running_jobs_alone(store: Store, clock: ManualClock) -> None:
    """Downtime of the control plane never punishes work (I10)."""
    claimed = await running(store, timeout_ms=1000)
    due = await submit(store, schedule_ms=clock.now + 1000)
    clock.tick(10 * LEASE_MS)
    result = await store.jobs.reap(ERRORS, hold=True)
    assert (result.requeued, result.failed) == ((), ())
    assert [job.job_id for job in result.promoted] == [due]
    assert (await get(store, claimed.job.job_id)).state is JobState.RUNNING


async def test_an_overdue_run_is_a_failed_attempt(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, timeout_ms=1000, max_retries=1)
    job_id = claimed.job.job_id
    clock.tick(1000 + 4999)
    assert (await store.jobs.reap(ERRORS, margin_ms=5000)).requeued == ()
    clock.tick(1)
    result = await store.jobs.reap(ERRORS, margin_ms=5000, backoff_ms=100)
    assert [job.wait_reason for job in result.requeued] == [WaitReason.BACKOFF]
    clock.tick(100)
    await store.jobs.reap(ERRORS)
    again = await claim(store)
    await store.jobs.started(job_id, again.token)
    clock.tick(6000)
    assert len((await store.jobs.reap(ERRORS, margin_ms=5000)).failed) == 1
    record = await get(store, job_id)
    assert reasons([record.error]) == ["TIMEOUT"]
    assert record.attempt == 2
    assert len(record.attempts) == 2


async def test_the_queue_ttl_runs_until_the_first_start(store: Store, clock: ManualClock) -> None:
    never = await submit(store, queue_ttl_ms=1000)
    later = await submit(store, queue_ttl_ms=1000, schedule_ms=clock.now + 5000)
    clock.tick(999)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    clock.tick(1)
    assert [job.job_id for job in (await store.jobs.reap(ERRORS)).failed] == [never]
    assert reasons([(await get(store, never)).error]) == ["QUEUE_TTL_EXPIRED"]
    clock.tick(4999)
    assert [job.job_id for job in (await store.jobs.reap(ERRORS)).promoted] == [later]
    claimed = await claim(store)
    clock.tick(10)
    await store.jobs.release(later, claimed.token)
    claimed = await claim(store)
    await store.jobs.started(later, claimed.token)
    await store.jobs.release(later, claimed.token)
    clock.tick(100_000)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    assert (await get(store, later)).state is JobState.QUEUED


async def test_a_claimed_job_does_not_expire_and_a_released_one_does(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store, queue_ttl_ms=1000)
    claimed = await claim(store)
    clock.tick(2000)
    assert (await store.jobs.reap(ERRORS)).failed == ()
    await store.jobs.release(job_id, claimed.token)
    assert [job.job_id for job in (await store.jobs.reap(ERRORS)).failed] == [job_id]


async def test_a_full_sweep_says_that_there_is_more(store: Store, clock: ManualClock) -> None:
    """No page hides the rest (river#1318)."""
    for _ in range(7):
        await running(store)
    clock.tick(LEASE_MS)
    counts = []
    while True:
        result = await store.jobs.reap(ERRORS, limit=3)
        counts.append(len(result.requeued))
        if not result.more:
            break
    assert counts == [3, 3, 1]


async def test_a_stray_index_entry_hides_nothing(store: Store, clock: ManualClock, raw: Any, namespace: str) -> None:
    claimed = await running(store)
    raw.zadd(f"{{{namespace}}}:leases", {f"ghost-{i}": 1 for i in range(5)})
    clock.tick(LEASE_MS)
    first = await store.jobs.reap(ERRORS, limit=5)
    assert first.more
    assert [job.job_id for job in (await store.jobs.reap(ERRORS, limit=5)).requeued] == [claimed.job.job_id]


@pytest.mark.parametrize("limit", [2, 100])
async def test_a_new_boot_loses_the_old_sessions_at_once(store: Store, clock: ManualClock, limit: int) -> None:
    await store.nodes.connect("agx0", session="s1", instance_id="boot-1", info=b"", replica="r")
    for _ in range(3):
        await submit(store)
        claimed = await claim(store, "agx0", session="s1")
        await store.jobs.started(claimed.job.job_id, claimed.token)
    await store.nodes.connect("agx0", session="s2", instance_id="boot-1", info=b"", replica="r")
    await submit(store)
    await claim(store, "agx0", session="s2")
    other = await running(store, "agx1")
    await store.nodes.connect("agx0", session="s3", instance_id="boot-2", info=b"", replica="r")
    await submit(store)
    fresh = (await store.jobs.claim([wish("agx0", session="s3")]))[0]
    assert fresh is not None
    lost = await store.jobs.lose_session("agx0", "s2", error=ERRORS.lost, limit=limit)
    assert sorted(job.losses for job in lost) == [0, 1, 1, 1]
    assert set(await store.jobs.held_by("agx0")) == {fresh.token}
    assert set(await store.jobs.held_by("agx1")) == {other.token}
    assert await store.jobs.lose_session("agx0", "s2", error=ERRORS.lost) == []


async def test_purge_by_age_and_by_number(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(6):
        job_id = await submit(store)
        await store.jobs.cancel(job_id)
        ids.append(job_id)
        clock.tick(1000)
    waiting = await submit(store)
    assert await store.jobs.purge() == 0
    assert await store.jobs.purge(keep_ms=5500) == 1
    assert await store.jobs.purge(keep_count=3, limit=1) == 1
    assert await store.jobs.purge(keep_count=3) == 1
    assert [record is not None for record in await store.jobs.get_many([*ids, waiting])] == [False] * 3 + [True] * 4
    assert (await store.jobs.counts())[JobState.CANCELLED] == 3


async def test_ended_jobs_are_purged_by_later_ends(store: Store, clock: ManualClock) -> None:
    first = await submit(store)
    await store.jobs.cancel(first)
    clock.tick(7 * 86_400_000 + 1)
    await store.jobs.cancel(await submit(store))
    assert await store.jobs.get(first) is None


async def test_purge_leaves_outputs_and_drops_all_else(
    store: Store, clock: ManualClock, raw: Any, namespace: str
) -> None:
    claimed = await running(store)
    await store.jobs.release(claimed.job.job_id, claimed.token, attempt=b"x")
    claimed = await claim(store)
    from fleet_server.store import OutputRow

    row = OutputRow("a.png", claimed.job.job_id, clock.now, 1, b"r")
    await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"r", outputs=[row])
    clock.tick(10)
    assert await store.jobs.purge(keep_ms=5) == 1
    assert await store.outputs.by_job(claimed.job.job_id) == [row]
    left = {key.decode().split(":", 1)[1] for key in raw.scan_iter(match=f"{{{namespace}}}:*")}
    output = {"o:a.png", "outs", "outs:changes", "outs:totals", "ol:", "ou:", f"jo:{claimed.job.job_id}"}
    assert left == {"events", *output}


async def test_the_dead_list_is_cut_but_its_jobs_stay(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(4):
        job_id = await submit(store, queue_ttl_ms=1)
        clock.tick(1)
        await store.jobs.reap(ERRORS)
        ids.append(job_id)
    assert [job.job_id for job in (await store.jobs.list_dead())[0]] == ids[::-1]
    await store.jobs.purge(keep_dead=2)
    assert [job.job_id for job in (await store.jobs.list_dead())[0]] == ids[:1:-1]
    assert await store.jobs.get(ids[0]) is not None
