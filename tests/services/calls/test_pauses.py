"""Pauses: what is held back does not start, says so when read, and goes on after the very same resume."""

from __future__ import annotations

from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from tests.services.calls.desk import Desk, asked

HIGH, LOW = types_pb2.JOB_PRIORITY_HIGH, types_pb2.JOB_PRIORITY_LOW


def pause(**fields: Any) -> queue_pb2.PauseQueueRequest:
    return asked(queue_pb2.PauseQueueRequest, **fields)


def resume(**fields: Any) -> queue_pb2.ResumeQueueRequest:
    return asked(queue_pb2.ResumeQueueRequest, **fields)


@pytest.mark.parametrize(
    "fields", [{}, {"target_cluster": "vision"}, {"job_type": "image_gen"}, {"priority": "normal"},
               {"target_cluster": "vision", "job_type": "image_gen", "priority": "normal"}],
)  # fmt: skip
async def test_what_is_held_back_does_not_start_and_says_so(desk: Desk, fields: dict[str, Any]) -> None:
    await desk.add_node()
    (made,) = await desk.pauses.pause(pause(**fields))
    assert made.HasField("create_time")
    assert {field.name for field, _ in made.ListFields()} - {"create_time"} == set(fields)
    job_id = await desk.submit()
    job = await desk.queue.get(job_id)
    assert (job.status, job.wait_reason) == (types_pb2.JOB_STATUS_QUEUED, "PAUSED")
    assert not job.HasField("queue_position")
    with pytest.raises(AssertionError, match="no job waits"):
        await desk.claim()
    rung = desk.bell.rung
    assert await desk.pauses.resume(resume(**fields)) == []
    assert desk.bell.rung == rung + 1
    job = await desk.queue.get(job_id)
    assert not job.HasField("wait_reason") and job.queue_position == 1
    await desk.run_next()


@pytest.mark.parametrize("fields", [{"target_cluster": "llm"}, {"job_type": "video_gen"}, {"priority": "low"}])
async def test_what_it_does_not_name_goes_on(desk: Desk, fields: dict[str, Any]) -> None:
    await desk.add_node()
    await desk.pauses.pause(pause(**fields))
    job_id = await desk.submit()
    assert not (await desk.queue.get(job_id)).HasField("wait_reason")
    await desk.run_next()


async def test_a_receipt_says_it_too_and_running_jobs_go_on(desk: Desk) -> None:
    await desk.add_node()
    running = await desk.submit()
    claim = await desk.start()
    await desk.pauses.pause(pause())
    request = asked(queue_pb2.CreateJobRequest, job_type="image_gen", payload={"prompt": "a sea"})
    receipt = await desk.queue.create(request, owner="", key=None)
    assert receipt.wait_reason == "PAUSED" and not receipt.HasField("queue_position")
    await desk.complete(claim)
    assert (await desk.queue.get(running)).status == types_pb2.JOB_STATUS_SUCCEEDED


async def test_what_a_job_waits_for_by_itself_comes_first(desk: Desk) -> None:
    await desk.add_node()
    await desk.pauses.pause(pause())
    parent = await desk.submit()
    child = await desk.submit(after=[parent])
    assert (await desk.queue.get(child)).wait_reason == "DEPENDENCY"
    assert (await desk.queue.get(parent)).wait_reason == "PAUSED"


async def test_a_pause_ends_by_its_own_resume_alone(desk: Desk) -> None:
    await desk.pauses.pause(pause(target_cluster="vision"))
    for fields in ({}, {"target_cluster": "llm"}, {"target_cluster": "vision", "priority": "high"}):
        with pytest.raises(FleetError) as caught:
            await desk.pauses.resume(resume(**fields))
        assert caught.value.reason == "PAUSE_NOT_FOUND"
    both = await desk.pauses.pause(pause())
    assert [made.target_cluster for made in both] == ["vision", ""]
    # Again is the same pause.
    assert await desk.pauses.pause(pause()) == both
    assert [made.target_cluster for made in await desk.pauses.resume(resume())] == ["vision"]


async def test_stats_name_the_pauses_and_the_lanes_that_they_stop(desk: Desk) -> None:
    await desk.add_node()
    await desk.submit()
    await desk.submit(job_type="llm_inference", payload={"prompt": "hi"})
    await desk.pauses.pause(pause(target_cluster="vision"))
    stats = await desk.board.queue_stats()
    assert {lane.target_cluster: lane.paused for lane in stats.lanes} == {"vision": True, "llm": False}
    assert [made.target_cluster for made in stats.pauses] == ["vision"]
    assert stats.queued_by_priority.normal == 2


async def test_of_a_lane_only_the_priority_named_stops(desk: Desk) -> None:
    await desk.add_node()
    low, high = await desk.submit(priority="low"), await desk.submit(priority="high")
    await desk.pauses.pause(pause(priority="low"))
    assert (await desk.queue.get(low)).wait_reason == "PAUSED"
    assert (await desk.run_next()).job.job_id == high
    with pytest.raises(AssertionError, match="no job waits"):
        await desk.claim()
    stats = await desk.board.queue_stats()
    assert [lane.paused for lane in stats.lanes] == [True]
