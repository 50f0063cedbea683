"""Why a job waits, and where one would go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.speeds import Unit, Work
from tests.services.calls.desk import Desk, asked

PIXEL_STEPS = 512 * 512 * 10


def job(**more: object) -> queue_pb2.CreateJobRequest:
    payload = {"prompt": "a fox", "width": 512, "height": 512, "steps": 10, "model": "sketch"}
    return asked(queue_pb2.CreateJobRequest, job_type="image_gen", payload=payload, **more)


async def submit(desk: Desk, **more: object) -> str:
    receipt = await desk.queue.create(job(**more), owner="ann", key=None)
    return receipt.job_id


def verdicts(explanation: types_pb2.Explanation) -> list[tuple[str, bool, str, int]]:
    return [(node.node_id, node.feasible, node.reason, node.rank) for node in explanation.nodes]


async def test_each_node_is_judged_and_the_warm_one_expected(desk: Desk) -> None:
    await desk.add_node("cold", models=["sketch"])
    await desk.add_node("other", models=["ink"])
    await desk.add_node("warm", models=["sketch"], loaded=["sketch"])
    job_id = await submit(desk)
    seen = await desk.explainer.explain(job_id)
    assert (seen.job_id, seen.queue_position, seen.node_id) == (job_id, 1, "warm")
    assert seen.summary == "warm has the model loaded and has a free slot"
    assert verdicts(seen) == [
        ("warm", True, "", 1),
        ("cold", True, "", 2),
        ("other", False, "MODEL_MISSING", 0),
    ]
    warm, cold, other = seen.nodes
    assert warm.load_seconds == 0
    assert cold.HasField("load_seconds")
    assert not other.HasField("rank") and not other.HasField("load_seconds") and not other.HasField("eta_seconds")
    assert "ink" not in other.detail and "sketch" in other.detail
    # Nothing has run yet: nobody knows for how long.
    assert not seen.HasField("eta_seconds")


async def test_the_end_is_estimated_from_measured_speeds(desk: Desk) -> None:
    await desk.add_node("fast", models=["sketch"], loaded=["sketch"])
    await desk.add_node("slow", models=["sketch"], loaded=["sketch"])
    desk.speeds.book.ran("fast", "sketch", "sketch", Work(Unit.PIXEL_STEPS, PIXEL_STEPS), 2.0)
    desk.speeds.book.ran("slow", "sketch", "sketch", Work(Unit.PIXEL_STEPS, PIXEL_STEPS), 8.0)
    seen = await desk.explainer.dry_run(job(), owner="ann")
    assert (seen.node_id, seen.eta_seconds) == ("fast", 2.0)
    assert [(node.node_id, node.eta_seconds) for node in seen.nodes] == [("fast", 2.0), ("slow", 8.0)]


async def test_a_dry_run_stores_nothing_and_judges_as_a_submit_does(desk: Desk) -> None:
    await desk.add_node("agx0", loaded=["sketch"])
    seen = await desk.explainer.dry_run(job(priority="low"), owner="ann")
    assert not seen.HasField("job_id")
    assert (seen.queue_position, seen.node_id) == (1, "agx0")
    assert sum((await desk.store.jobs.counts()).values()) == 0
    assert await desk.store.jobs.lanes() == []
    with pytest.raises(FleetError, match="target_node_id") as refused:
        await desk.explainer.dry_run(job(target_node_id="nowhere"), owner="ann")
    assert refused.value.reason == "NODE_NOT_FOUND"


async def test_a_dry_run_counts_what_would_go_before_it(desk: Desk) -> None:
    await desk.add_node("agx0", loaded=["sketch"])
    await submit(desk)
    await submit(desk)
    normal = await desk.explainer.dry_run(job(), owner="ann")
    assert normal.queue_position == 3
    assert normal.summary.endswith("; 2 jobs are before it")
    assert (await desk.explainer.dry_run(job(priority="high"), owner="ann")).queue_position == 1


async def test_without_a_node_the_reasons_are_named(desk: Desk) -> None:
    assert (await desk.explainer.dry_run(
        asked(queue_pb2.CreateJobRequest, job_type="image_gen", payload={"prompt": "x"}), owner=""
    )).summary.startswith("no node has joined")  # fmt: skip
    await desk.add_node("pinned")
    await desk.add_node("agx1", labels={"zone": "b"})
    job_id = await submit(desk, target_node_id="pinned", target_labels={"zone": "a"})
    seen = await desk.explainer.explain(job_id)
    assert not seen.HasField("node_id")
    assert [(node.node_id, node.reason) for node in seen.nodes] == [
        ("agx1", "PINNED_ELSEWHERE"),
        ("pinned", "LABELS_DIFFER"),
    ]
    assert seen.summary.startswith("no node could run it now: agx1: the job runs on pinned only; pinned: it lacks")


async def test_what_does_not_wait_has_no_verdicts(desk: Desk) -> None:
    await desk.add_node("agx0")
    running = await submit(desk)
    claim = await desk.start()
    seen = await desk.explainer.explain(running)
    assert (seen.summary, len(seen.nodes)) == ("it runs on agx0", 0)
    await desk.complete(claim, b"")
    assert (await desk.explainer.explain(running)).summary == "it has succeeded"
    cancelled = await submit(desk)
    await desk.queue.cancel(cancelled)
    assert (await desk.explainer.explain(cancelled)).summary == "it was cancelled"
    with pytest.raises(FleetError) as unknown:
        await desk.explainer.explain("nothing")
    assert unknown.value.reason == "JOB_NOT_FOUND"


async def test_a_scheduled_job_waits_for_its_time(desk: Desk) -> None:
    await desk.add_node("agx0")
    soon = datetime.now(UTC) + timedelta(hours=1)
    scheduled = await desk.explainer.explain(await submit(desk, schedule_time=soon.isoformat()))
    assert scheduled.summary == "it waits for its schedule_time"
    assert not scheduled.HasField("queue_position")
