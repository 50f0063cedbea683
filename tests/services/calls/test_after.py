"""Jobs that wait for others: in line once all have succeeded, cancelled with the first that does not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.inputs import has_inputs
from fleet_server.store import InputRow
from tests.services.calls.desk import Desk, asked, now_ms

QUEUED, CANCELLED = types_pb2.JOB_STATUS_QUEUED, types_pb2.JOB_STATUS_CANCELLED


def job(**fields: Any) -> queue_pb2.CreateJobRequest:
    return asked(queue_pb2.CreateJobRequest, **{"job_type": "image_gen", "payload": {"prompt": "a sea"}, **fields})


@pytest.fixture(autouse=True)
async def _node(desk: Desk) -> None:
    await desk.add_node()


async def test_a_job_waits_until_all_have_succeeded(desk: Desk) -> None:
    parents = [await desk.submit() for _ in range(2)]
    receipt = await desk.queue.create(job(after=[*parents, parents[0]]), owner="", key=None)
    assert receipt.wait_reason == "DEPENDENCY" and not receipt.HasField("queue_position")
    child = await desk.queue.get(receipt.job_id)
    assert (list(child.after), child.wait_reason) == (parents, "DEPENDENCY")
    await desk.run_next()
    assert (await desk.queue.get(child.job_id)).wait_reason == "DEPENDENCY"
    await desk.run_next()
    child = await desk.queue.get(child.job_id)
    assert (child.status, child.queue_position) == (QUEUED, 1) and not child.HasField("wait_reason")
    assert (await desk.run_next()).job.job_id == child.job_id


async def test_parents_that_have_succeeded_are_not_waited_for(desk: Desk) -> None:
    parent = await desk.submit()
    await desk.run_next()
    receipt = await desk.queue.create(job(after=[parent]), owner="", key=None)
    assert receipt.queue_position == 1 and not receipt.HasField("wait_reason")


@pytest.mark.parametrize("how", ["failed", "cancelled"])
async def test_one_that_does_not_succeed_cancels_it(desk: Desk, how: str) -> None:
    parent = await desk.submit(max_retries=0)
    child = await desk.submit(after=[parent])
    grandchild = await desk.submit(after=[child])
    if how == "failed":
        await desk.fail(await desk.start())
    else:
        await desk.queue.cancel(parent)
    for job_id in (child, grandchild):
        found = await desk.queue.get(job_id)
        assert found.status == CANCELLED and found.HasField("result") and not found.HasField("error")
    # One that comes later is accepted and ends the same way.
    receipt = await desk.queue.create(job(after=[parent]), owner="", key=None)
    assert receipt.status == CANCELLED and not receipt.HasField("wait_reason")


async def test_an_unknown_parent_is_named_by_its_place(desk: Desk) -> None:
    parent = await desk.submit()
    for after, field in ((["nobody"], "after[0]"), ([parent, "nobody"], "after[1]")):
        with pytest.raises(FleetError) as caught:
            await desk.queue.create(job(after=after), owner="", key=None)
        assert (caught.value.reason, caught.value.violations[0].field) == ("JOB_NOT_FOUND", field)
    batch = queue_pb2.BatchCreateJobsRequest(jobs=[job(), job(after=[parent, "nobody"])])
    with pytest.raises(FleetError) as caught:
        await desk.queue.create_many(batch, owner="", key=None)
    assert caught.value.violations[0].field == "jobs[1].after[1]"
    assert sum((await desk.store.jobs.counts()).values()) == 1


async def test_in_a_batch_each_receipt_says_its_own(desk: Desk) -> None:
    parent = await desk.submit()
    batch = queue_pb2.BatchCreateJobsRequest(jobs=[job(), job(after=[parent]), job(job_type="video_gen")])
    receipts = await desk.queue.create_many(batch, owner="", key=None)
    assert [(one.wait_reason, one.HasField("queue_position")) for one in receipts] == [
        ("", True), ("DEPENDENCY", False), ("NO_NODE", False),
    ]  # fmt: skip


async def test_a_scheduled_job_waits_for_its_time_and_says_so(desk: Desk) -> None:
    at = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    receipt = await desk.queue.create(job(schedule_time=at), owner="", key=None)
    assert receipt.wait_reason == "SCHEDULED"
    assert (await desk.queue.get(receipt.job_id)).wait_reason == "SCHEDULED"


async def test_the_same_key_gives_the_same_waiting_job(desk: Desk) -> None:
    parent = await desk.submit()
    first = await desk.queue.create(job(after=[parent], request_id="k"), owner="", key="k")
    assert await desk.queue.create(job(after=[parent], request_id="k"), owner="", key="k") == first


async def test_exclusive_is_kept_and_shown(desk: Desk) -> None:
    found = await desk.queue.get(await desk.submit(exclusive=True))
    assert found.exclusive and (await desk.record(found.job_id)).exclusive
    assert not (await desk.queue.get(await desk.submit())).exclusive


async def resolved(desk: Desk, job_id: str) -> list[tuple[str, str]]:
    """What an agent would be told to read."""
    spec = types_pb2.JobSpec.FromString((await desk.record(job_id)).spec)
    assert has_inputs(spec.payload)
    inputs = await desk.filing.resolver.resolve(spec.payload)
    assert all(len(one.sha256) == 64 and one.size_bytes and one.content_type == "image/png" for one in inputs)
    return [(one.reference, one.filename) for one in inputs]


async def test_a_parents_output_is_the_childs_input(desk: Desk) -> None:
    parent = await desk.submit()
    reference = f"job:{parent}"
    child = await desk.submit(
        after=[parent], payload={"prompt": "more", "init_image": reference, "mask_image": reference, "strength": 0.2}
    )
    row = await desk.complete(await desk.start())
    assert (await desk.queue.get(child)).queue_position == 1
    assert await resolved(desk, child) == [(reference, row.filename)]
    named = await desk.submit(payload={"prompt": "x", "init_image": f"output:{row.filename}"})
    assert await resolved(desk, named) == [(f"output:{row.filename}", row.filename)]


async def test_an_output_that_is_gone_by_then_is_named(desk: Desk) -> None:
    parent = await desk.submit()
    row = await desk.complete(await desk.start())
    child = await desk.submit(payload={"prompt": "x", "init_image": f"output:{row.filename}"})
    await desk.gallery.delete(row.filename)
    with pytest.raises(FleetError, match=r"payload\.init_image: there is no file") as caught:
        await resolved(desk, child)
    assert caught.value.reason == "INPUT_NOT_FOUND"
    assert parent


async def test_a_job_that_waits_is_cancelled_like_any_other(desk: Desk) -> None:
    parent = await desk.submit()
    child = await desk.submit(after=[parent])
    assert (await desk.queue.cancel(child)).status == CANCELLED
    assert (await desk.queue.get(parent)).queue_position == 1


async def test_a_job_keeps_the_inputs_that_it_names(desk: Desk) -> None:
    row = InputRow("brought", "a.png", "image/png", 5, "ff", "here", "", now_ms() + 60_000)
    await desk.store.inputs.put(row)

    async def jobs() -> int:
        found = await desk.store.inputs.get("brought")
        assert found is not None
        return found.jobs

    job_id = await desk.submit(payload={"prompt": "x", "init_image": "input:brought"})
    assert await jobs() == 1
    await desk.store.jobs.cancel(job_id)
    assert await jobs() == 0
