"""Lists of jobs: pages, filters and tokens; and a queue that is full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import queue_pb2

from fleet_server.domain.job import JobState
from fleet_server.services.queue import QueueSettings
from fleet_server.store import Store
from tests.services.calls.desk import ALIAS, Desk, asked, desk_on
from tests.services.calls.test_queue import refused


async def listed(desk: Desk, **fields: Any) -> list[str]:
    """All pages of a list."""
    found: list[str] = []
    token = ""
    while True:
        request = asked(queue_pb2.ListJobsRequest, **fields, page_token=token)
        jobs, token = await desk.queue.list(request)
        assert len(jobs) <= request.limit
        found += [job.job_id for job in jobs]
        if not token:
            return found


async def test_lists_come_newest_first_in_pages_that_miss_nothing(desk: Desk) -> None:
    await desk.add_node()
    made = [await desk.submit() for _ in range(25)]
    assert await listed(desk, limit=4) == made[::-1]
    assert await listed(desk) == made[::-1]
    assert await listed(desk, limit=25) == made[::-1]


async def test_lists_are_filtered_by_all_that_is_given(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path, queue=QueueSettings(rows_examined=8, chunk=3)) as desk:
        await desk.add_node()
        await desk.add_node("agx1", models=["other"])
        sketch = [await desk.submit(priority="high" if n % 2 else "low") for n in range(10)]
        other = [await desk.submit(payload={"prompt": "x", "model": "other"}) for _ in range(3)]
        llm = await desk.submit(job_type="llm_inference", payload={"prompt": "x"})
        claim = await desk.start("agx0")
        assert await listed(desk, target_model="other") == other[::-1]
        assert await listed(desk, target_model=ALIAS, limit=2) == sketch[::-1]
        assert await listed(desk, target_model="sketch", priority="high") == sketch[1::2][::-1]
        assert await listed(desk, job_type="llm_inference") == await listed(desk, target_cluster="llm") == [llm]
        assert await listed(desk, status=["running"]) == await listed(desk, node_id="agx0") == [claim.job.job_id]
        assert len(await listed(desk, status=["queued", "running"], limit=3)) == 14
        assert await listed(desk, owner="nobody") == await listed(desk, group_job_id="g") == []
        # A page looks at few jobs: it may be empty and still lead on.
        request = asked(queue_pb2.ListJobsRequest, owner="nobody")
        jobs, token = await desk.queue.list(request)
        assert not jobs and token


async def test_lists_keep_to_times_of_creation(desk: Desk) -> None:
    made = [await desk.submit() for _ in range(3)]
    times = [(await desk.queue.get(job_id)).create_time for job_id in made]
    assert set(await listed(desk, created_after=times[0].ToJsonString())) == set(made)
    before = set(await listed(desk, created_before=times[2].ToJsonString()))
    assert made[2] not in before
    last = times[2].ToMilliseconds()
    assert before == {job_id for job_id, time in zip(made, times, strict=True) if time.ToMilliseconds() < last}


@pytest.mark.parametrize("token", ["x", "!!", "W10", "WyJhIiwxLCJiIl0", "a" * 1000])
async def test_tokens_that_are_none_are_refused(desk: Desk, token: str) -> None:
    error = await refused(desk.queue.list(asked(queue_pb2.ListJobsRequest, page_token=token)))
    assert error.reason == "INVALID_PAGE_TOKEN"


async def test_a_token_belongs_to_its_filters_but_not_to_its_limit(desk: Desk) -> None:
    for _ in range(3):
        await desk.submit()
    _, token = await desk.queue.list(asked(queue_pb2.ListJobsRequest, limit=1, priority="normal"))
    jobs, _ = await desk.queue.list(asked(queue_pb2.ListJobsRequest, limit=2, priority="normal", page_token=token))
    assert len(jobs) == 2
    other = asked(queue_pb2.ListJobsRequest, limit=1, priority="high", page_token=token)
    assert (await refused(desk.queue.list(other))).reason == "INVALID_PAGE_TOKEN"


async def test_a_full_queue_is_503_and_says_when_to_come_again(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path, queue=QueueSettings(queued_jobs=2)) as desk:
        await desk.submit()
        await desk.submit()
        error = await refused(desk.submit())
        assert error.reason == "QUEUE_FULL" and error.retry_after_seconds
        assert (await store.jobs.counts())[JobState.QUEUED] == 2
