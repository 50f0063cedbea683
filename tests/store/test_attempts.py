"""Attempts: who may write, what each report does, once, twice and too late."""

from __future__ import annotations

import asyncio

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, WaitReason
from fleet_server.store import Completion, Held, Idempotency, OutputRow, Store, decode_job
from tests.store.making import (
    ERRORS,
    LEASE_MS,
    ManualClock,
    claim,
    error,
    kinds,
    new_job,
    running,
    submit,
    token,
    wish,
)


async def get(store: Store, job_id: str) -> JobRecord:
    record = await store.jobs.get(job_id)
    assert record is not None
    return record


async def fail(store: Store, job_id: str, attempt: str, *, retryable: bool = True, backoff_ms: int = 0) -> Completion:
    return await store.jobs.fail(
        job_id,
        attempt,
        error=error("ENGINE_FAILED"),
        attempt=b"attempt-row",
        retryable=retryable,
        backoff_ms=backoff_ms,
        result=b"partial",
    )


async def test_started_once(store: Store, clock: ManualClock) -> None:
    await submit(store)
    claimed = await claim(store)
    clock.tick(10)
    one = await store.jobs.started(claimed.job.job_id, claimed.token)
    assert one is not None
    assert (one.started_ms, one.version) == (clock.now, 3)
    clock.tick(10)
    assert await store.jobs.started(claimed.job.job_id, claimed.token) == one
    assert await store.jobs.started(claimed.job.job_id, token()) is None
    assert await store.jobs.started("unknown", claimed.token) is None
    assert await kinds(store) == ["job_update queued 1", "job_update running 3"]


async def test_complete_writes_all_at_once(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    clock.tick(1500)
    rows = [OutputRow(f"{i}.png", job_id, clock.now, 10 + i, b"out%d" % i) for i in (2, 1)]
    done = await store.jobs.complete(
        job_id, claimed.token, result=b"\x00result", outputs=rows, load_ms=1, run_ms=2, upload_ms=3
    )
    assert done.outcome == "ok"
    record = await get(store, job_id)
    assert (record.state, record.progress, record.ended_ms) == (JobState.SUCCEEDED, 100, clock.now)
    assert (record.result, record.load_ms, record.run_ms, record.upload_ms) == (b"\x00result", 1, 2, 3)
    assert (record.token, record.last_token, record.node_id) == ("", claimed.token, "agx0")
    assert await store.outputs.by_job(job_id) == rows
    assert await kinds(store) == ["job_update queued 1", "job_update running 3", "job_complete succeeded 4"]
    assert await store.jobs.held_by("agx0") == {}


async def test_complete_again_is_already_and_another_token_is_refused(store: Store) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    refused = await store.jobs.complete(job_id, token(), result=b"other")
    assert refused.outcome == "refused"
    assert (await store.jobs.complete(job_id, claimed.token, result=b"mine")).outcome == "ok"
    for attempt, outcome in ((claimed.token, "already"), (token(), "refused")):
        again = await store.jobs.complete(job_id, attempt, result=b"other")
        assert again.outcome == outcome
        assert again.record is not None
        assert again.record.version == 4
    assert (await get(store, job_id)).result == b"mine"
    unknown = await store.jobs.complete("unknown", claimed.token, result=b"")
    assert (unknown.outcome, unknown.record) == ("refused", None)
    assert len(await kinds(store)) == 3


async def test_renew_keeps_leases_and_progress_without_a_version(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    clock.tick(LEASE_MS - 1)
    held = [Held(job_id, claimed.token, 40, 8, 20), Held(job_id, "stale"), Held("unknown", "lost")]
    assert await store.jobs.renew(held, LEASE_MS) == ["stale", "lost"]
    record = await get(store, job_id)
    assert (record.progress, record.step, record.steps, record.version) == (40, 8, 20, 3)
    await store.jobs.renew([Held(job_id, claimed.token)], LEASE_MS)
    assert (await get(store, job_id)).progress == 40
    clock.tick(LEASE_MS - 1)
    assert (await store.jobs.reap(ERRORS)).requeued == ()
    clock.tick(1)
    assert len((await store.jobs.reap(ERRORS)).requeued) == 1
    assert await store.jobs.renew([Held(job_id, claimed.token)], LEASE_MS) == [claimed.token]
    assert await store.jobs.renew([], LEASE_MS) == []


async def test_failures_are_tried_again_up_to_max_retries(store: Store, clock: ManualClock) -> None:
    job_id = await submit(store, max_retries=2)
    for number in (1, 2):
        claimed = await claim(store)
        await store.jobs.started(job_id, claimed.token)
        outcome = await fail(store, job_id, claimed.token, backoff_ms=500)
        assert outcome.record is not None
        assert (outcome.record.state, outcome.record.wait_reason) == (JobState.QUEUED, WaitReason.BACKOFF)
        assert (outcome.record.attempt, outcome.record.node_id, outcome.record.started_ms) == (number, "", None)
        assert await store.jobs.claim([wish()]) == [None]
        clock.tick(500)
        assert [job.job_id for job in (await store.jobs.reap(ERRORS)).promoted] == [job_id]
    claimed = await claim(store)
    assert claimed.job.attempt == 3
    last = await fail(store, job_id, claimed.token)
    assert last.outcome == "ok"
    record = await get(store, job_id)
    assert (record.state, record.error, record.result) == (JobState.FAILED, error("ENGINE_FAILED"), b"partial")
    assert record.attempts == (b"attempt-row",) * 3
    assert [job.job_id for job in (await store.jobs.list_dead())[0]] == [job_id]


async def test_a_failure_that_cannot_be_retried_ends_the_job(store: Store) -> None:
    claimed = await running(store, max_retries=5)
    job_id = claimed.job.job_id
    assert (await fail(store, job_id, claimed.token, retryable=False)).outcome == "ok"
    assert (await get(store, job_id)).state is JobState.FAILED
    assert (await fail(store, job_id, claimed.token, retryable=False)).outcome == "already"
    assert (await fail(store, job_id, token())).outcome == "refused"
    assert (await fail(store, "unknown", token())).outcome == "refused"
    assert (await store.jobs.complete(job_id, claimed.token, result=b"")).outcome == "refused"
    assert len((await get(store, job_id)).attempts) == 1


async def test_a_failure_reported_twice_counts_once(store: Store) -> None:
    claimed = await running(store, max_retries=1)
    job_id = claimed.job.job_id
    assert (await fail(store, job_id, claimed.token)).outcome == "ok"
    assert (await fail(store, job_id, claimed.token)).outcome == "already"
    assert (await store.jobs.complete(job_id, claimed.token, result=b"late")).outcome == "refused"
    second = await claim(store)
    assert (await fail(store, job_id, claimed.token)).outcome == "already"
    record = await get(store, job_id)
    assert (record.state, record.attempt, record.token) == (JobState.RUNNING, 2, second.token)
    assert len(record.attempts) == 1


async def test_only_the_latest_twenty_attempts_are_kept(store: Store) -> None:
    job_id = await submit(store, max_retries=20)
    for number in range(21):
        claimed = await claim(store)
        await store.jobs.fail(job_id, claimed.token, error=error("X"), attempt=b"%d" % number, retryable=True)
    assert (await get(store, job_id)).attempts == tuple(b"%d" % number for number in range(1, 21))


async def test_a_release_is_not_counted(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    clock.tick(5)
    assert not await store.jobs.release(job_id, token())
    assert await store.jobs.release(job_id, claimed.token, attempt=b"rejected")
    assert await store.jobs.release(job_id, claimed.token, attempt=b"rejected")
    record = await get(store, job_id)
    assert (record.state, record.attempt, record.losses, record.wait_reason) == (JobState.QUEUED, 0, 0, "")
    assert record.attempts == (b"rejected",)
    assert not await store.jobs.release("unknown", claimed.token)
    second = await claim(store)
    assert second.job.attempt == 1
    assert not await store.jobs.release(job_id, claimed.token)
    assert (await get(store, job_id)).token == second.token


async def test_a_lost_attempt_may_still_complete_while_queued(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    began = (await get(store, job_id)).started_ms
    clock.tick(LEASE_MS)
    await store.jobs.reap(ERRORS)
    assert (await get(store, job_id)).last_token == claimed.token
    done = await store.jobs.complete(job_id, claimed.token, result=b"late")
    assert done.outcome == "ok"
    record = await get(store, job_id)
    assert (record.state, record.result, record.node_id, record.started_ms) == (
        JobState.SUCCEEDED,
        b"late",
        "agx0",
        began,
    )
    assert await store.jobs.claim([wish()]) == [None]


async def test_a_lost_attempt_is_refused_after_another_claim(store: Store, clock: ManualClock) -> None:
    claimed = await running(store)
    job_id = claimed.job.job_id
    clock.tick(LEASE_MS)
    await store.jobs.reap(ERRORS)
    second = await claim(store, "agx1")
    assert (await store.jobs.complete(job_id, claimed.token, result=b"late")).outcome == "refused"
    assert (await fail(store, job_id, claimed.token)).outcome == "refused"
    assert await store.jobs.started(job_id, claimed.token) is None
    assert (await store.jobs.complete(job_id, second.token, result=b"mine")).outcome == "ok"
    assert (await get(store, job_id)).result == b"mine"


async def test_cancel_ends_queued_and_running_jobs_once(store: Store) -> None:
    waiting = await submit(store)
    assert (await store.jobs.cancel(waiting)).state is JobState.CANCELLED
    claimed = await running(store)
    cancelled = await store.jobs.cancel(claimed.job.job_id)
    assert (cancelled.state, cancelled.token) == (JobState.CANCELLED, "")
    assert await store.jobs.cancel(claimed.job.job_id) == cancelled
    assert (await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"")).outcome == "refused"
    assert await store.jobs.renew([Held(claimed.job.job_id, claimed.token)], LEASE_MS) == [claimed.token]
    later = await submit(store, schedule_ms=9_999_999_999_999)
    assert (await store.jobs.cancel(later)).wait_reason == ""
    with pytest.raises(FleetError) as caught:
        await store.jobs.cancel("unknown")
    assert caught.value.reason == "JOB_NOT_FOUND"


async def test_what_ended_otherwise_cannot_be_cancelled(store: Store) -> None:
    good, bad = await running(store), await running(store)
    await store.jobs.complete(good.job.job_id, good.token, result=b"")
    await fail(store, bad.job.job_id, bad.token, retryable=False)
    for claimed in (good, bad):
        with pytest.raises(FleetError) as caught:
            await store.jobs.cancel(claimed.job.job_id)
        assert caught.value.reason == "JOB_ENDED"


async def test_retry_begins_a_new_generation(store: Store, clock: ManualClock) -> None:
    claimed = await running(store, owner="alice", max_retries=0)
    job_id = claimed.job.job_id
    await fail(store, job_id, claimed.token)
    clock.tick(1000)
    again = await store.jobs.retry(job_id)
    assert (again.state, again.generation, again.attempt, again.losses) == (JobState.QUEUED, 2, 0, 0)
    assert (again.enqueued_ms, again.ended_ms, again.error, again.last_token) == (clock.now, None, b"", "")
    record = await get(store, job_id)
    assert (record.spec, record.result, record.owner, len(record.attempts)) == (b"spec", b"", "alice", 1)
    assert (await store.jobs.list_dead())[0] == []
    assert (await store.jobs.complete(job_id, claimed.token, result=b"old")).outcome == "refused"
    second = await claim(store)
    assert (second.job.attempt, second.job.lane_id) == (1, "lane-a")
    assert (await store.jobs.complete(job_id, second.token, result=b"new")).outcome == "ok"


async def test_only_failed_jobs_are_retried(store: Store) -> None:
    job_id = await submit(store)
    with pytest.raises(FleetError) as caught:
        await store.jobs.retry(job_id)
    assert caught.value.reason == "JOB_NOT_FAILED"
    await store.jobs.cancel(job_id)
    with pytest.raises(FleetError, match="cancelled"):
        await store.jobs.retry(job_id)
    with pytest.raises(FleetError) as caught:
        await store.jobs.retry("unknown")
    assert caught.value.reason == "JOB_NOT_FOUND"


async def test_a_keyed_retry_repeats(store: Store) -> None:
    key = Idempotency("alice", "RetryJob", "k", "print")
    claimed = await running(store)
    job_id = claimed.job.job_id
    await fail(store, job_id, claimed.token, retryable=False)
    assert (await store.jobs.retry(job_id, idempotency=key)).generation == 2
    assert (await store.jobs.retry(job_id, idempotency=key)).generation == 2
    with pytest.raises(FleetError) as caught:
        await store.jobs.retry(job_id, idempotency=Idempotency("alice", "RetryJob", "k", "other"))
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_cancel_and_complete_race_to_one_end(store: Store) -> None:
    """Whichever wins, the other hears of it, and there is one end (I2, I6)."""
    for _ in range(40):
        claimed = await running(store)
        job_id = claimed.job.job_id
        cancelled, completed = await asyncio.gather(
            store.jobs.cancel(job_id),
            store.jobs.complete(job_id, claimed.token, result=b"r"),
            return_exceptions=True,
        )
        state = (await get(store, job_id)).state
        assert isinstance(completed, Completion)
        if state is JobState.CANCELLED:
            assert completed.outcome == "refused"
            assert isinstance(cancelled, JobRecord)
        else:
            assert completed.outcome == "ok"
            assert isinstance(cancelled, FleetError)
            assert cancelled.reason == "JOB_ENDED"
    ends = [kind for kind in await kinds(store) if kind.startswith("job_complete")]
    assert len(ends) == 40


async def test_reap_and_complete_race_to_one_end(store: Store, clock: ManualClock) -> None:
    for _ in range(20):
        claimed = await running(store)
        clock.tick(LEASE_MS)
        reaped, completed = await asyncio.gather(
            store.jobs.reap(ERRORS), store.jobs.complete(claimed.job.job_id, claimed.token, result=b"r")
        )
        assert completed.outcome == "ok"
        assert (await get(store, claimed.job.job_id)).state is JobState.SUCCEEDED
        assert len(reaped.requeued) <= 1


async def test_claim_and_cancel_race(store: Store) -> None:
    for _ in range(40):
        job_id = await submit(store)
        cancelled, (claimed,) = await asyncio.gather(store.jobs.cancel(job_id), store.jobs.claim([wish()]))
        assert cancelled.state is JobState.CANCELLED
        assert (await get(store, job_id)).state is JobState.CANCELLED
        if claimed is not None:
            assert await store.jobs.renew([Held(job_id, claimed.token)], LEASE_MS) == [claimed.token]


async def test_each_event_is_the_record_at_its_version(store: Store, clock: ManualClock) -> None:
    """Snapshot and event of one version are the same record, whatever happened to the job."""
    seen: dict[int, JobRecord] = {}

    async def look() -> None:
        record = await get(store, job_id)
        bare = {name: getattr(record, name) for name in record.__slots__}
        seen[record.version] = JobRecord(**{**bare, "spec": b"", "result": b"", "attempts": ()})

    job_id = await submit(store, owner="alice", max_retries=1)
    await look()
    claimed = await claim(store)
    clock.tick(3)
    await store.jobs.started(job_id, claimed.token)
    await look()
    clock.tick(3)
    await fail(store, job_id, claimed.token, backoff_ms=10)
    await look()
    clock.tick(10)
    await store.jobs.reap(ERRORS)
    await look()
    claimed = await claim(store)
    await store.jobs.release(job_id, claimed.token)
    await look()
    claimed = await claim(store, "agx1")
    await fail(store, job_id, claimed.token)
    await look()
    await store.jobs.retry(job_id)
    await look()
    await store.jobs.cancel(job_id)
    await look()
    events, _ = await store.events.read("0")
    told = {decode_job(event.fields).version: decode_job(event.fields) for event in events}
    assert told == seen
    assert [event.type for event in events].count("job_complete") == 2


async def test_a_webhook_row_is_written_at_each_end_of_jobs_that_want_one(
    store: Store, raw: object, namespace: str
) -> None:
    wanted, plain = new_job(max_retries=0), new_job()
    await store.jobs.submit([wanted], callbacks={wanted.job_id})
    await store.jobs.submit([plain])
    claimed = await claim(store, job_id=wanted.job_id)
    await fail(store, wanted.job_id, claimed.token)
    await store.jobs.cancel(plain.job_id)
    await store.jobs.retry(wanted.job_id)
    await store.jobs.cancel(wanted.job_id)
    rows = raw.zrange(f"{{{namespace}}}:hooks", 0, -1)  # type: ignore[attr-defined]
    assert sorted(row.decode() for row in rows) == [f"{wanted.job_id}.1", f"{wanted.job_id}.2"]
