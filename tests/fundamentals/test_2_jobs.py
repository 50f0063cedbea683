"""Work that nobody waits for: it is accepted, kept, and run when a node is free."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

import pytest
from fleet_client import FleetCommander, JobFailedError

QUICK: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}
LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 150}


def test_queue_a_job_and_wait_for_it(fleet: FleetCommander) -> None:
    """`queue_job` answers at once with a receipt; `wait` gives the job once it has succeeded."""
    receipt = fleet.queue_job("a beautiful landscape", **QUICK)
    assert receipt["status"] == "queued"
    job = fleet.wait(receipt["job_id"])
    assert job["status"] == "succeeded"
    filename = job["result"]["outputs"][0]["filename"]
    assert fleet.get_output(filename).startswith(b"\x89PNG")


def test_watch_the_progress(fleet: FleetCommander) -> None:
    """`watch_job` tells what happens to a job: first the job as it is, then its progress, last its end."""
    receipt = fleet.queue_job("a sea in the evening", width=1024, height=1024)
    events = list(fleet.watch_job(receipt["job_id"]))
    assert events[0]["type"] == "job_update"
    assert events[-1]["type"] == "job_complete"
    progress = [event["data"]["progress"] for event in events if event["type"] == "job_progress"]
    assert progress == sorted(progress)
    assert all(0 <= percent <= 100 for percent in progress)


def test_priorities(fleet: FleetCommander) -> None:
    """Of the jobs that wait, one of high priority runs before one of low, whichever came first."""
    busy = fleet.queue_job("something that takes a while", priority="high", **LONG)
    low = fleet.queue_job("later", priority="low", **QUICK)
    high = fleet.queue_job("sooner", priority="high", **QUICK)
    fleet.cancel_job(busy["job_id"])
    fleet.wait(low["job_id"])
    first, second = (fleet.get_job(receipt["job_id"])["start_time"] for receipt in (high, low))
    assert datetime.fromisoformat(first) < datetime.fromisoformat(second)


def test_an_idempotency_key(fleet: FleetCommander) -> None:
    """A submit that is sent again with the same `request_id` is the same job: if in doubt, repeat it."""
    key = str(uuid.uuid4())
    first = fleet.queue_job("only once", request_id=key, **QUICK)
    again = fleet.queue_job("only once", request_id=key, **QUICK)
    assert again["job_id"] == first["job_id"]


def test_a_batch(fleet: FleetCommander) -> None:
    """`submit_batch` accepts up to 1,000 jobs, all or none, in their order."""
    prompts = ["a red house", "a green house", "a blue house"]
    receipts = fleet.submit_batch(
        [{"job_type": "image_gen", "payload": {"prompt": prompt, **QUICK}} for prompt in prompts]
    )
    jobs = [fleet.wait(receipt["job_id"]) for receipt in receipts]
    assert [fleet.get_job(job["job_id"])["payload"]["prompt"] for job in jobs] == prompts


def test_cancel(fleet: FleetCommander) -> None:
    """A job can be cancelled while it waits and while it runs."""
    receipt = fleet.queue_job("not wanted any more", **LONG)
    assert fleet.cancel_job(receipt["job_id"])["status"] == "cancelled"
    with pytest.raises(JobFailedError) as ended:
        fleet.wait(receipt["job_id"])
    assert ended.value.reason == "CANCELLED"


def test_retry(fleet: FleetCommander) -> None:
    """A job that failed can be run again under its id. (This one fails since it may run for one second only.)"""
    receipt = fleet.queue_job("too slow", max_retries=0, timeout_seconds=1, **LONG)
    with pytest.raises(JobFailedError) as ended:
        fleet.wait(receipt["job_id"])
    assert ended.value.reason == "TIMEOUT"
    job = fleet.retry_job(receipt["job_id"])
    assert job["generation"] == 2
    fleet.cancel_job(receipt["job_id"])


def test_a_job_that_no_node_can_run_waits(fleet: FleetCommander) -> None:
    """Work is accepted before there is a node for it, and says what it waits for."""
    receipt = fleet.submit_job({"job_type": "llm_inference", "payload": {"prompt": "Tell me of the sea"}})
    assert (receipt["status"], receipt["wait_reason"]) == ("queued", "NO_NODE")
    fleet.cancel_job(receipt["job_id"])


def test_what_there_is(fleet: FleetCommander) -> None:
    """Jobs are listed newest first, by any of their fields, and counted."""
    receipt = fleet.queue_job("to be listed", priority="low", **QUICK)
    fleet.wait(receipt["job_id"])
    listed = fleet.list_jobs(status=["succeeded"], priority="low", limit=1)["jobs"]
    assert [job["job_id"] for job in listed] == [receipt["job_id"]]
    assert fleet.queue_stats()["jobs"]["succeeded"] >= 1
