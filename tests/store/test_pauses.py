"""What is paused does not start, by cluster, type and priority; nothing else changes."""

from __future__ import annotations

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Lane, Pause, PauseKey, Priority, paused, pauses_lane
from fleet_server.store import Store
from fleet_server.store.pauses import MAX_PAUSES
from tests.store.making import LANE, ManualClock, claim, drain, kinds, running, submit, wish

AUDIO = Lane("lane-b", "audio", "transcription")
VIDEO = Lane("lane-c", "vision", "video_gen")
EVERYTHING = PauseKey()


def test_a_pause_holds_what_matches_all_of_its_fields() -> None:
    pauses = [Pause(PauseKey("vision", None, Priority.LOW), 1), Pause(PauseKey(job_type="training"), 2)]
    assert paused(pauses, "vision", "image_gen", Priority.LOW)
    assert not paused(pauses, "vision", "image_gen", Priority.HIGH)
    assert not paused(pauses, "audio", "image_gen", Priority.LOW)
    assert paused(pauses, "audio", "training", Priority.HIGH)
    assert pauses_lane(pauses, "vision", "image_gen") == {Priority.LOW}
    assert pauses_lane(pauses, "vision", "training") == set(Priority)
    assert pauses_lane(pauses, "other", "") == set()
    assert pauses_lane([], "vision", "training") == set()


@pytest.mark.parametrize(
    ("key", "left"),
    [
        (EVERYTHING, set()),
        (PauseKey(cluster="vision"), {"audio"}),
        (PauseKey(job_type="video_gen"), {"high", "low", "audio"}),
        (PauseKey(priority=Priority.HIGH), {"low", "video", "audio"}),
        (PauseKey("vision", "image_gen", Priority.LOW), {"high", "video", "audio"}),
        (PauseKey("elsewhere"), {"high", "low", "video", "audio"}),
    ],
)
async def test_claims_pass_by_what_is_paused(store: Store, key: PauseKey, left: set[str]) -> None:
    names = {
        await submit(store, priority=Priority.HIGH): "high",
        await submit(store, priority=Priority.LOW): "low",
        await submit(store, lane=VIDEO): "video",
        await submit(store, lane=AUDIO): "audio",
    }
    await store.pauses.pause(key)
    lanes = {view.lane.lane_id: view for view in await store.jobs.lanes()}
    started = {names[job_id] for lane in (LANE, VIDEO, AUDIO) for job_id in await drain(store, lane=lane)}
    assert started == left
    assert lanes["lane-a"].paused == (not left & {"high", "low"})
    assert lanes["lane-b"].paused == ("audio" not in left)
    assert lanes["lane-c"].paused == ("video" not in left)
    await store.pauses.resume(key)
    assert {names[job_id] for lane in (LANE, VIDEO, AUDIO) for job_id in await drain(store, lane=lane)} == (
        {"high", "low", "video", "audio"} - left
    )


async def test_a_lane_shows_the_head_that_may_go(store: Store, clock: ManualClock) -> None:
    await submit(store, priority=Priority.HIGH, owner="a")
    clock.tick(10)
    await submit(store, priority=Priority.LOW, owner="b")
    await store.pauses.pause(PauseKey(priority=Priority.HIGH))
    (view,) = await store.jobs.lanes()
    assert (view.paused, view.head_priority, view.head_owner, view.waiting) == (False, Priority.LOW, "b", 2)
    assert view.head_effective_ms == clock.now + 600_000
    await store.pauses.pause(EVERYTHING)
    (view,) = await store.jobs.lanes()
    assert (view.paused, view.head_priority, view.head_owner) == (True, Priority.HIGH, "a")


async def test_a_job_chosen_by_id_is_held_too(store: Store) -> None:
    """So a mixed lane's jobs, whose types differ, are judged one by one; a look at the lane leaves them out."""
    job_id = await submit(store)
    await store.pauses.pause(PauseKey(job_type="image_gen"))
    assert await store.jobs.claim([wish(job_id=job_id)]) == [None]
    assert await store.jobs.peek("lane-a") == []
    await store.pauses.resume(PauseKey(job_type="image_gen"))
    assert [record.job_id for record in await store.jobs.peek("lane-a")] == [job_id]
    await claim(store, job_id=job_id)


async def test_running_jobs_go_on_and_no_job_hears_of_it(store: Store) -> None:
    held = await running(store)
    await submit(store)
    before = await kinds(store)
    await store.pauses.pause(EVERYTHING)
    assert await kinds(store) == before
    assert (await store.jobs.complete(held.job.job_id, held.token, result=b"")).outcome == "ok"
    await submit(store)


async def test_pauses_are_listed_and_kept_once(store: Store, clock: ManualClock) -> None:
    first, second = PauseKey("vision", "image_gen", Priority.LOW), PauseKey(job_type="video_gen")
    begin = clock.now
    assert await store.pauses.pause(first) == (Pause(first, begin),)
    clock.tick(5)
    assert await store.pauses.pause(second) == (Pause(first, begin), Pause(second, begin + 5))
    clock.tick(5)
    assert await store.pauses.pause(first) == (Pause(first, begin), Pause(second, begin + 5))
    assert await store.pauses.list() == (Pause(first, begin), Pause(second, begin + 5))
    assert await store.pauses.resume(first) == (Pause(second, begin + 5),)
    with pytest.raises(FleetError) as caught:
        await store.pauses.resume(PauseKey("vision"))
    assert caught.value.reason == "PAUSE_NOT_FOUND"


async def test_the_number_of_pauses_is_bounded(store: Store) -> None:
    for number in range(MAX_PAUSES):
        await store.pauses.pause(PauseKey(f"c{number}"))
    assert len(await store.pauses.pause(PauseKey("c7"))) == MAX_PAUSES
    with pytest.raises(FleetError, match="resume"):
        await store.pauses.pause(PauseKey("one-more"))
