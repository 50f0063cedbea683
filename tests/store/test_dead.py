"""The dead list by filters, in bounded steps; redrive as many retries."""

from __future__ import annotations

from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, Lane
from fleet_server.store import Store
from tests.store.making import ERRORS, LANE, ManualClock, claim, error, kinds, submit

DREAM = Lane("lane-b", "vision", "image_gen", "dream")
AUDIO = Lane("lane-c", "audio", "transcription", "whisper")


async def failed(store: Store, clock: ManualClock, reason: str = "ENGINE_FAILED", lane: Lane = LANE) -> str:
    job_id = await submit(store, lane=lane)
    claimed = await claim(store, lane=lane, job_id=job_id)
    await store.jobs.fail(job_id, claimed.token, error=error(reason), attempt=b"a", retryable=False)
    clock.tick(1)
    return job_id


async def dead(store: Store, **options: Any) -> list[str]:
    """All pages of the list."""
    found: list[str] = []
    before = None
    while True:
        records, before = await store.jobs.list_dead(before=before, **options)
        found += [record.job_id for record in records]
        if before is None:
            return found


async def test_filters_combine(store: Store, clock: ManualClock) -> None:
    oom = await failed(store, clock, "OUT_OF_MEMORY")
    dream = await failed(store, clock, "OUT_OF_MEMORY", DREAM)
    audio = await failed(store, clock, "ENGINE_FAILED", AUDIO)
    assert await dead(store) == [audio, dream, oom]
    assert await dead(store, job_type="image_gen") == [dream, oom]
    assert await dead(store, cluster="audio") == [audio]
    assert await dead(store, model="dream") == [dream]
    assert await dead(store, reason="OUT_OF_MEMORY") == [dream, oom]
    assert await dead(store, reason="OUT_OF_MEMORY", model="sketch", cluster="vision") == [oom]
    assert await dead(store, reason="TIMEOUT") == []


async def test_a_page_examines_a_bounded_number(store: Store, clock: ManualClock) -> None:
    wanted = [await failed(store, clock, "OUT_OF_MEMORY") for _ in range(3)]
    for _ in range(12):
        await failed(store, clock)
    records, following = await store.jobs.list_dead(reason="OUT_OF_MEMORY", examine=5)
    assert records == []
    assert following is not None
    assert await dead(store, reason="OUT_OF_MEMORY", examine=5) == wanted[::-1]
    assert await dead(store, reason="OUT_OF_MEMORY", limit=1) == wanted[::-1]
    assert len(await dead(store, limit=4)) == 15
    page, following = await store.jobs.list_dead(limit=15)
    assert (len(page), following) == (15, None)


async def test_what_the_store_ends_has_a_reason_too(store: Store, clock: ManualClock) -> None:
    expired = await submit(store, queue_ttl_ms=10)
    clock.tick(10)
    await store.jobs.reap(ERRORS)
    slow = await submit(store, timeout_ms=10, max_retries=0)
    claimed = await claim(store)
    await store.jobs.started(slow, claimed.token)
    clock.tick(20_000)
    await store.jobs.reap(ERRORS)
    poison = await submit(store)
    for node_id in ("n1", "n2", "n3"):
        claimed = await claim(store, node_id)
        await store.jobs.started(poison, claimed.token)
        clock.tick(30_000)
        await store.jobs.reap(ERRORS)
    for job_id, reason in ((expired, "QUEUE_TTL_EXPIRED"), (slow, "TIMEOUT"), (poison, "POISON")):
        assert await dead(store, reason=reason) == [job_id]


async def test_a_reason_may_be_given(store: Store, clock: ManualClock) -> None:
    for given, found in (("WHY", "WHY"), (None, "")):
        job_id = await submit(store)
        claimed = await claim(store)
        done = await store.jobs.fail(
            job_id, claimed.token, error=b"\xff\xff", attempt=b"", retryable=False, reason=given
        )
        assert done.record is not None and done.record.reason == found


async def test_redrive_retries_each_and_says_which_it_could_not(store: Store, clock: ManualClock) -> None:
    one, two = await failed(store, clock), await failed(store, clock)
    waiting = await submit(store)
    done = await store.jobs.retry_many([one, "unknown", waiting, two], operation="op-1")
    assert [getattr(reply, "reason", None) or reply.state for reply in done] == [  # type: ignore[union-attr]
        JobState.QUEUED,
        "JOB_NOT_FOUND",
        "JOB_NOT_FAILED",
        JobState.QUEUED,
    ]
    assert await dead(store) == []
    assert await store.jobs.retry_many([], operation="op-2") == []


async def test_a_redrive_said_twice_is_one(store: Store, clock: ManualClock) -> None:
    job_id = await failed(store, clock)
    (first,) = await store.jobs.retry_many([job_id], operation="op-1")
    before = await kinds(store)
    (second,) = await store.jobs.retry_many([job_id], operation="op-1")
    assert isinstance(first, JobRecord) and second == first
    assert await kinds(store) == before
    claimed = await claim(store)
    await store.jobs.fail(job_id, claimed.token, error=error("X"), attempt=b"a", retryable=False)
    (third,) = await store.jobs.retry_many([job_id], operation="op-1")
    assert isinstance(third, JobRecord) and third.state is JobState.FAILED
    (other,) = await store.jobs.retry_many([job_id], operation="op-2")
    assert isinstance(other, JobRecord) and other.generation == 3
    assert not isinstance(other, FleetError)
