"""Groups: n images of one request are n jobs, spread over nodes, told of and ended as one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from tests.services.calls.desk import Desk, asked
from tests.waiting import wait_until

QUEUED, RUNNING = types_pb2.JOB_STATUS_QUEUED, types_pb2.JOB_STATUS_RUNNING
SUCCEEDED, FAILED = types_pb2.JOB_STATUS_SUCCEEDED, types_pb2.JOB_STATUS_FAILED
CANCELLED = types_pb2.JOB_STATUS_CANCELLED


@pytest.fixture(autouse=True)
async def _nodes(desk: Desk) -> None:
    await desk.add_node("agx0", slots=2)
    await desk.add_node("agx1", slots=2)


async def group_of(desk: Desk, n: int = 3, **fields: Any) -> types_pb2.Job:
    payload = {"prompt": "a sea", "seed": 7, "n": n, **fields.pop("payload", {})}
    return await desk.queue.get(await desk.submit(payload=payload, **fields))


async def listed(desk: Desk, **fields: Any) -> list[str]:
    jobs, _ = await desk.queue.list(asked(queue_pb2.ListJobsRequest, **fields))
    return [job.job_id for job in jobs]


async def test_each_image_is_a_job_with_the_next_seed(desk: Desk) -> None:
    group = await group_of(desk, payload={"seed": str(2**64 - 2)}, target_cluster="vision", priority="high")
    children = [await desk.queue.get(job_id) for job_id in group.child_job_ids]
    assert len(children) == 3 and len(set(group.child_job_ids)) == 3
    assert [child.group_job_id for child in children] == [group.job_id] * 3
    seeds = [dict(child.payload)["seed"] for child in children]
    assert seeds == [str(2**64 - 2), str(2**64 - 1), 0]
    assert [dict(child.payload)["n"] for child in children] == [1, 1, 1]
    assert all(child.priority == types_pb2.JOB_PRIORITY_HIGH for child in children)
    assert (group.status, dict(group.payload)["n"]) == (QUEUED, 3)
    assert not group.HasField("queue_position") and not group.HasField("group_job_id")
    assert sorted(child.queue_position for child in children) == [1, 2, 3]


async def test_lists_show_the_group_and_its_images_where_they_are_asked_for(desk: Desk) -> None:
    group = await group_of(desk)
    alone = await desk.submit()
    assert await listed(desk) == [alone, group.job_id]
    assert await listed(desk, group_job_id=group.job_id) == list(group.child_job_ids)[::-1]
    assert await listed(desk, group_job_id=group.job_id, status=["running"]) == []
    assert await listed(desk, group_job_id=alone) == []


async def test_the_images_go_to_all_nodes_and_their_outputs_are_the_groups_in_order(desk: Desk) -> None:
    group = await group_of(desk)
    claims = [await desk.start("agx1"), await desk.start("agx0"), await desk.start("agx1")]
    assert {claim.job.job_id for claim in claims} == set(group.child_job_ids)
    assert (await desk.queue.get(group.job_id)).status == RUNNING
    made: dict[str, str] = {}
    for claim in claims[::-1]:
        made[claim.job.job_id] = (await desk.complete(claim)).filename
    group = await desk.queue.get(group.job_id)
    assert (group.status, group.progress) == (SUCCEEDED, 100)
    assert [output.filename for output in group.result.outputs] == [made[job_id] for job_id in group.child_job_ids]
    assert [output.seed for output in group.result.outputs] == [7, 8, 9]


async def test_its_progress_is_the_mean_of_theirs(desk: Desk) -> None:
    group = await group_of(desk, n=4)
    first, second = await desk.start(), await desk.start()
    await desk.complete(first)
    tick = types_pb2.JobProgress(job_id=second.job.job_id, progress=50, generation=1, attempt=1)
    desk.ticks.publish(tick)
    assert (await desk.queue.get(group.job_id)).progress == (100 + 50) // 4


async def test_who_watches_a_group_sees_its_progress_and_its_end(desk: Desk) -> None:
    group = await group_of(desk, n=2)
    seen: list[tuple[str, int]] = []

    async def watch() -> types_pb2.Event:
        async for event in desk.hub.watch_job(group.job_id):
            kind = event.WhichOneof("data")
            assert kind is not None
            data = getattr(event, kind)
            assert data.job_id == group.job_id
            seen.append((kind, data.progress))
        return event

    watching = asyncio.create_task(watch())
    # It has seen the group as it is: what comes after that is told.
    await wait_until(lambda: seen)
    first, second = await desk.start(), await desk.start()
    for claim, progress in ((first, 40), (second, 60)):
        tick = types_pb2.JobProgress(job_id=claim.job.job_id, progress=progress, generation=1, attempt=1)
        want = ("job_progress", 20 if claim is first else 50)

        def told(want: tuple[str, int] = want, tick: types_pb2.JobProgress = tick) -> bool:
            # Ticks are lossy: a running job says again how far it is.
            again = types_pb2.JobProgress()
            again.CopyFrom(tick)
            desk.ticks.publish(again)
            return want in seen

        await wait_until(told)
    await desk.complete(first)
    await desk.complete(second)
    last = await asyncio.wait_for(watching, 50)
    assert len(last.job_complete.result.outputs) == 2
    assert [kind for kind, _ in seen if kind != "job_progress"] == ["job_update", "job_update", "job_complete"]


async def test_cancel_reaches_the_images_wherever_they_are(desk: Desk) -> None:
    group = await group_of(desk)
    done, running = await desk.start(), await desk.start("agx1")
    await desk.complete(done)
    assert (await desk.queue.cancel(group.job_id)).status == CANCELLED
    statuses = {job_id: (await desk.queue.get(job_id)).status for job_id in group.child_job_ids}
    assert statuses.pop(done.job.job_id) == SUCCEEDED
    assert set(statuses.values()) == {CANCELLED}
    assert desk.bell.stopped == [(running.job.job_id, "agx1", running.token)]
    group = await desk.queue.get(group.job_id)
    # What was made stays.
    assert [output.job_id for output in group.result.outputs] == [done.job.job_id]


async def test_retry_reaches_those_that_did_not_succeed(desk: Desk) -> None:
    group = await group_of(desk, n=2, max_retries=0)
    good, bad = await desk.start(), await desk.start()
    await desk.complete(good)
    await desk.fail(bad, "OUT_OF_MEMORY")
    failed = await desk.queue.get(group.job_id)
    assert (failed.status, failed.error.reason) == (FAILED, "OUT_OF_MEMORY")
    assert len(failed.result.outputs) == 1
    again = await desk.queue.retry(asked(queue_pb2.RetryJobRequest, job_id=group.job_id), owner="", key=None)
    assert (again.status, again.generation, again.progress) == (QUEUED, 2, 50)
    assert (await desk.queue.get(good.job.job_id)).generation == 1
    assert (await desk.run_next()).job.job_id == bad.job.job_id
    ended = await desk.queue.get(group.job_id)
    assert ended.status == SUCCEEDED and len(ended.result.outputs) == 2


async def test_a_group_waits_and_says_why_like_any_job(desk: Desk) -> None:
    parent = await desk.submit()
    waiting = await group_of(desk, after=[parent])
    assert waiting.wait_reason == "DEPENDENCY"
    for job_id in waiting.child_job_ids:
        assert (await desk.queue.get(job_id)).wait_reason == "DEPENDENCY"
    nowhere = await group_of(desk, target_cluster="moon")
    assert nowhere.wait_reason == "NO_NODE"
    await desk.run_next()
    assert not (await desk.queue.get(waiting.job_id)).HasField("wait_reason")


async def test_vision_takes_n_too_and_the_receipt_is_the_groups(desk: Desk) -> None:
    request = asked(vision_pb2.VisionGenerateRequest, prompt="a city", n=4, request_id="k")
    receipt = await desk.queue.create_image(request, owner="", key="k")
    assert receipt.status == QUEUED and not receipt.HasField("queue_position")
    assert len((await desk.queue.get(receipt.job_id)).child_job_ids) == 4
    assert await desk.queue.create_image(request, owner="", key="k") == receipt
    assert await listed(desk) == [receipt.job_id]


async def test_a_batch_of_groups_gives_one_receipt_each_and_has_its_limit(desk: Desk) -> None:
    def jobs(count: int, n: int) -> queue_pb2.BatchCreateJobsRequest:
        one = {"job_type": "image_gen", "payload": {"prompt": "x", "n": n}}
        return asked(queue_pb2.BatchCreateJobsRequest, jobs=[one] * count)

    receipts = await desk.queue.create_many(jobs(3, 2), owner="", key=None)
    assert await listed(desk) == [receipt.job_id for receipt in receipts][::-1]
    with pytest.raises(FleetError, match=r"^jobs: ") as caught:
        await desk.queue.create_many(jobs(70, 64), owner="", key=None)
    assert caught.value.reason == "INVALID_FIELD"
    assert len(await listed(desk)) == 3


async def test_a_group_is_no_work_of_its_own_in_the_stats(desk: Desk) -> None:
    await group_of(desk, n=2)
    await desk.run_next()
    await desk.run_next()

    async def counted() -> tuple[int, int]:
        stats = await desk.board.queue_stats()
        rates = stats.submitted_per_second, stats.ended_per_second
        return round(rates[0] * stats.window_seconds), round(rates[1] * stats.window_seconds)

    async def both_ended() -> bool:
        return (await counted())[1] >= 2

    # Rates come with the events of the two images and of their group, which are read a moment later.
    await wait_until(both_ended)
    assert await counted() == (2, 2)


async def test_a_groups_outputs_are_inputs_in_order(desk: Desk) -> None:
    group = await group_of(desk, n=2)
    training = await desk.submit(
        job_type="training", after=[group.job_id], payload={"image": "t:1", "inputs": [f"job:{group.job_id}"]}
    )
    upscale = await desk.submit(after=[group.job_id], payload={"prompt": "x", "init_image": f"job:{group.job_id}"})
    await desk.run_next()
    await desk.run_next()
    outputs = [output.filename for output in (await desk.queue.get(group.job_id)).result.outputs]
    resolver = desk.filing.resolver
    for job_id, expected in ((training, outputs), (upscale, outputs[:1])):
        spec = types_pb2.JobSpec.FromString((await desk.record(job_id)).spec)
        assert [one.filename for one in await resolver.resolve(spec.payload)] == expected
