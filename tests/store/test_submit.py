"""The way in: one job, a batch, idempotency, limits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState, Lane, Priority, WaitReason
from fleet_server.store import Idempotency, Store, decode_job
from fleet_server.store.job_submit import MAX_ALONG
from tests.store.making import LANE, START_MS, ManualClock, claim, drain, kinds, new_job, submit, wish

KEY = Idempotency("alice", "CreateJob", "key-1", "print-1")


async def test_a_submitted_job_is_there_whole_and_announced(store: Store) -> None:
    job = new_job(spec=b"\x00\xffspec", priority=Priority.HIGH, owner="al:ice", timeout_ms=5, queue_ttl_ms=7)
    submitted = await store.jobs.submit([job])
    assert submitted.job_ids == (job.job_id,)
    assert submitted.positions == (1,)
    assert not submitted.replayed
    record = await store.jobs.get(job.job_id)
    assert record is not None
    assert (record.state, record.wait_reason) == (JobState.QUEUED, WaitReason.NONE)
    assert (record.spec, record.owner, record.priority) == (b"\x00\xffspec", "al:ice", Priority.HIGH)
    assert (record.job_type, record.cluster, record.lane_id, record.model) == (
        "image_gen",
        "vision",
        "lane-a",
        "sketch",
    )
    assert (record.generation, record.version, record.attempt, record.max_retries) == (1, 1, 0, 3)
    assert record.created_ms == record.enqueued_ms == record.updated_ms == START_MS
    assert (record.timeout_ms, record.queue_ttl_ms) == (5, 7)
    events, _ = await store.events.read("0")
    assert [event.type for event in events] == ["job_update"]
    assert events[0].time_ms == START_MS
    told = decode_job(events[0].fields)
    assert told.job_id == job.job_id
    assert told == type(record)(**{**_asdict(record), "spec": b""})


def _asdict(record: Any) -> dict[str, Any]:
    return {name: getattr(record, name) for name in record.__slots__}


async def test_the_same_job_again_changes_nothing(store: Store) -> None:
    job = new_job()
    first = await store.jobs.submit([job])
    await submit(store)
    assert await store.jobs.submit([job]) == first
    assert (await store.jobs.counts())[JobState.QUEUED] == 2
    assert len(await kinds(store)) == 2


async def test_an_id_of_another_job_is_refused(store: Store) -> None:
    job_id = await submit(store, spec=b"one")
    with pytest.raises(FleetError) as caught:
        await submit(store, job_id=job_id, spec=b"two")
    assert caught.value.reason == "INVALID_FIELD"
    assert caught.value.violations[0].field == "job_id"
    record = await store.jobs.get(job_id)
    assert record is not None
    assert record.spec == b"one"


async def test_a_key_gives_the_first_job_again(store: Store) -> None:
    first = await store.jobs.submit([new_job()], idempotency=KEY)
    again = await store.jobs.submit([new_job()], idempotency=KEY)
    assert again.job_ids == first.job_ids
    assert again.replayed
    assert again.positions == (1,)
    assert (await store.jobs.counts())[JobState.QUEUED] == 1


async def test_a_key_belongs_to_owner_and_method(store: Store) -> None:
    await store.jobs.submit([new_job()], idempotency=KEY)
    for other in (
        Idempotency("bob", "CreateJob", "key-1", "print-2"),
        Idempotency("alice", "Generate", "key-1", "print-2"),
    ):
        assert not (await store.jobs.submit([new_job()], idempotency=other)).replayed


async def test_a_key_with_other_content_is_refused(store: Store) -> None:
    await store.jobs.submit([new_job()], idempotency=KEY)
    other = Idempotency(KEY.owner, KEY.method, KEY.key, "print-2")
    for jobs in ([new_job()], [new_job(), new_job()]):
        with pytest.raises(FleetError) as caught:
            await store.jobs.submit(jobs, idempotency=other)
        assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert (await store.jobs.counts())[JobState.QUEUED] == 1


async def test_one_of_many_at_once_makes_the_job(store: Store) -> None:
    jobs = [new_job() for _ in range(20)]
    all_submitted = await asyncio.gather(*(store.jobs.submit([job], idempotency=KEY) for job in jobs))
    assert len({one.job_ids for one in all_submitted}) == 1
    assert sum(not one.replayed for one in all_submitted) == 1
    assert (await store.jobs.counts())[JobState.QUEUED] == 1


async def test_a_full_queue_refuses_but_knows_what_it_has(store: Store) -> None:
    jobs = [new_job(), new_job()]
    for job in jobs:
        await store.jobs.submit([job], limit=2)
    for more in ([new_job()], [new_job(), new_job()]):
        with pytest.raises(FleetError) as caught:
            await store.jobs.submit(more, limit=2)
        assert caught.value.reason == "QUEUE_FULL"
        assert caught.value.retry_after_seconds
    assert (await store.jobs.submit([jobs[1]], limit=2)).positions == (2,)
    await claim(store)
    await store.jobs.submit([new_job()], limit=2)


async def test_a_scheduled_job_waits_outside_the_line(store: Store, clock: ManualClock) -> None:
    later = clock.now + 5_000
    submitted = await store.jobs.submit([new_job(schedule_ms=later)])
    assert submitted.positions == (None,)
    record = await store.jobs.get(submitted.job_ids[0])
    assert record is not None
    assert (record.wait_reason, record.schedule_ms, record.enqueued_ms) == (WaitReason.SCHEDULED, later, later)
    assert await store.jobs.claim([wish()]) == [None]
    assert await store.jobs.lanes() == []
    past = await store.jobs.submit([new_job(schedule_ms=clock.now - 1)])
    assert past.positions == (1,)


async def test_a_batch_is_there_in_order(store: Store) -> None:
    jobs = [new_job(owner=f"o{i % 3}", spec=b"%d" % i) for i in range(120)]
    submitted = await store.jobs.submit(jobs)
    assert submitted.job_ids == tuple(job.job_id for job in jobs)
    assert submitted.positions == tuple(range(1, 121))
    records = await store.jobs.get_many(submitted.job_ids)
    assert [record.spec if record else None for record in records] == [job.spec for job in jobs]
    assert [kind.split()[0] for kind in await kinds(store)] == ["job_update"] * 120
    assert len(await drain(store)) == 120


async def test_a_batch_of_many_lanes_priorities_and_times(store: Store, clock: ManualClock) -> None:
    lanes = [Lane(f"lane-{i}", "vision" if i % 2 else "text", "custom") for i in range(5)]
    jobs = [
        new_job(
            lane=lanes[i % 5],
            priority=list(Priority)[i % 3],
            schedule_ms=clock.now + 1000 if i % 4 == 0 else None,
        )
        for i in range(60)
    ]
    submitted = await store.jobs.submit(jobs)
    assert [position is None for position in submitted.positions] == [i % 4 == 0 for i in range(60)]
    assert sum(view.waiting for view in await store.jobs.lanes()) == 45


async def test_a_batch_repeats_by_its_key(store: Store) -> None:
    jobs = [new_job() for _ in range(60)]
    first = await store.jobs.submit(jobs, idempotency=KEY)
    again = await store.jobs.submit([new_job() for _ in range(60)], idempotency=KEY)
    assert again.replayed
    assert again.job_ids == first.job_ids
    assert again.positions == first.positions
    assert (await store.jobs.counts())[JobState.QUEUED] == 60


async def test_a_staged_batch_does_not_exist(store: Store, raw: Any, namespace: str) -> None:
    """A crash between stage and commit leaves nothing but keys that expire."""
    jobs = [new_job() for _ in range(70)]
    await store.jobs.stage(jobs)
    assert await store.jobs.get(jobs[0].job_id) is None
    assert (await store.jobs.list())[0] == []
    assert await store.jobs.claim([wish()]) == [None]
    assert await kinds(store) == []
    keys = list(raw.scan_iter(match=f"{{{namespace}}}:*"))
    assert len(keys) == 72
    assert all(0 < raw.pttl(key) <= 60_000 for key in keys)
    submitted = await store.jobs.submit(jobs)
    assert len(submitted.job_ids) == 70
    assert all(raw.pttl(f"{{{namespace}}}:s:{job.job_id}") == -1 for job in jobs)


async def test_a_batch_whose_staging_expired_is_staged_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [new_job() for _ in range(MAX_ALONG + 1)]
    stage = store.jobs.stage
    calls = 0

    async def losing(*args: Any) -> list[str]:
        nonlocal calls
        calls += 1
        chunks = await stage(*args)
        return [*chunks[:-1], chunks[-1] + "gone"] if calls == 1 else chunks

    monkeypatch.setattr(store.jobs, "stage", losing)
    assert len((await store.jobs.submit(jobs)).job_ids) == MAX_ALONG + 1
    assert calls == 2
    assert len(await kinds(store)) == MAX_ALONG + 1


async def test_a_batch_with_a_taken_id_stores_nothing(store: Store) -> None:
    taken = await submit(store)
    jobs = [new_job() for _ in range(55)] + [new_job(job_id=taken, spec=b"other")]
    with pytest.raises(FleetError) as caught:
        await store.jobs.submit(jobs)
    assert caught.value.violations[0].field == "jobs[55].job_id"
    assert (await store.jobs.counts())[JobState.QUEUED] == 1
    with pytest.raises(FleetError):
        twice = new_job()
        await store.jobs.submit([twice, twice])


async def test_the_513th_lane_is_the_clusters_mixed_one(store: Store, clock: ManualClock) -> None:
    jobs = [new_job(lane=Lane(f"lane-{i}", "vision", "custom", f"m{i}")) for i in range(514)]
    await store.jobs.submit(jobs)
    views = await store.jobs.lanes()
    assert len(views) == 513
    (mixed,) = [view for view in views if view.mixed]
    assert (mixed.lane.lane_id, mixed.lane.cluster, mixed.waiting) == ("mixed:vision", "vision", 2)
    heads = await store.jobs.peek("mixed:vision")
    assert [record.job_id for record in heads] == [jobs[512].job_id, jobs[513].job_id]
    picked = await claim(store, lane=mixed.lane, job_id=jobs[513].job_id)
    assert picked.job.job_id == jobs[513].job_id
    assert picked.job.model == "m513"


async def test_positions_follow_priority_and_clusters(store: Store, clock: ManualClock) -> None:
    normal = await submit(store)
    clock.tick(1000)
    high = await submit(store, priority=Priority.HIGH)
    low = await submit(store, priority=Priority.LOW)
    other = await submit(store, lane=Lane("lane-b", "text", "llm_inference"))
    pairs = [("vision", normal), ("vision", high), ("vision", low), ("text", other), ("text", "unknown")]
    assert await store.jobs.queue_positions(pairs) == [2, 1, 3, 1, None]
    assert await store.jobs.waiting_by_priority() == {Priority.HIGH: 1, Priority.NORMAL: 2, Priority.LOW: 1}


async def test_counts_of_nothing(store: Store) -> None:
    assert set((await store.jobs.counts()).values()) == {0}
    assert await store.jobs.lanes(idle=True) == []
    assert await store.jobs.get("unknown") is None
    with pytest.raises(ValueError, match="jobs: give 1"):
        await store.jobs.submit([])
    assert LANE.cluster == "vision"
