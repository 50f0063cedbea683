"""Direct generation: wait, join, leave, fail."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import fleet_pb2, node_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord, JobState, Priority
from fleet_server.services import completion
from fleet_server.services.completion import Completions
from fleet_server.services.events import EventHub
from fleet_server.services.generation import Generated, GenerationSettings
from fleet_server.store import Claim, Store, StoredEvent
from tests.services.calls.desk import ALIAS, Desk, asked, desk_on, picture
from tests.waiting import wait_until


def begin(desk: Desk, *, key: str | None = None, **fields: Any) -> asyncio.Task[Generated]:
    request = asked(fleet_pb2.FleetGenerateRequest, **{"prompt": "a beautiful sunset", **fields})
    return asyncio.create_task(desk.generation.generate(request, owner="", key=key))


async def claimed(desk: Desk) -> Claim:
    """The job of a generation just begun, on its node."""
    await desk.in_line()
    return await desk.start()


async def failure_of(task: asyncio.Task[Generated]) -> FleetError:
    with pytest.raises(FleetError) as caught:
        await asyncio.wait_for(task, 50)
    return caught.value


async def test_the_picture_comes_back_with_what_made_it(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk, seed=7)
    claim = await claimed(desk)
    record = await desk.record(claim.job.job_id)
    spec = types_pb2.JobSpec.FromString(record.spec)
    assert (record.priority, record.job_type, spec.direct) == (Priority.HIGH, "image_gen", True)
    status = await desk.generation.status()
    assert [job.job_id for job in status.jobs] == [record.job_id]
    assert (status.queued, status.running, status.slots) == (0, 1, 1)
    data = picture(64, 64, "blue")
    row = await desk.complete(claim, data)
    made = await asyncio.wait_for(task, 50)
    assert made == Generated(data, "image/png", row.filename, 7, record.job_id, "sketch")
    assert not (await desk.generation.status()).jobs


async def test_an_end_that_this_process_wrote_down_needs_neither_an_event_nor_a_second_look(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_on(store, tmp_path, generation=GenerationSettings(poll_seconds=3600)) as desk:
        await desk.add_node()
        task = begin(desk, seed=7)
        claim = await claimed(desk)
        row = await desk.save_output(claim, picture())

        async def unheard(self: EventHub, entry: StoredEvent) -> None: ...

        monkeypatch.setattr(EventHub, "_take", unheard)
        report = node_pb2.JobComplete(job_id=claim.job.job_id, token=claim.token)
        output = report.outputs.add(content_type="image/png", seed=7)
        output.receipt.MergeFrom(node_pb2.OutputReceipt(filename=row.filename, size_bytes=row.size_bytes))
        monkeypatch.setattr(completion, "output_stem", lambda token, index: row.filename.partition(".")[0])
        completions = Completions(store, desk.files, endings=desk.endings)
        looked: list[list[str]] = []
        get_many = store.jobs.get_many

        async def noted(job_ids: list[str]) -> list[JobRecord | None]:
            looked.append(job_ids)
            return await get_many(job_ids)

        monkeypatch.setattr(store.jobs, "get_many", noted)
        await completions.settle("agx0", report, claim.job.spec)
        made = await asyncio.wait_for(task, 50)
        assert made == Generated(picture(), "image/png", row.filename, 7, claim.job.job_id, "sketch")
        assert looked == []
        assert (await desk.record(claim.job.job_id)).state is JobState.SUCCEEDED


async def test_a_real_name_is_no_alias(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk, model="sketch")
    await desk.complete(await claimed(desk))
    assert (await asyncio.wait_for(task, 50)).resolved_model is None


async def test_without_a_node_that_could_run_it_nothing_is_stored(desk: Desk) -> None:
    error = await failure_of(begin(desk))
    assert error.reason == "NO_NODE" and error.retry_after_seconds
    await desk.add_node("agx1", clusters=["lab"])
    assert (await failure_of(begin(desk))).reason == "NO_NODE"
    assert (await desk.generation.status()).status == "unavailable"
    assert sum((await desk.store.jobs.counts()).values()) == 0
    await desk.add_node()
    assert (await failure_of(begin(desk, model="none"))).reason == "MODEL_NOT_FOUND"
    status = await desk.generation.status()
    assert (status.status, status.slots, status.slots_free) == ("ready", 1, 1)
    assert not status.HasField("eta_seconds")


async def test_status_is_busy_and_estimates_from_what_was_measured(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk)
    await desk.complete(await claimed(desk))
    await asyncio.wait_for(task, 50)
    status = await desk.generation.status()
    assert status.status == "ready" and status.HasField("eta_seconds")
    desk.nodes.occupy("agx0", slots_free=0, running=("a",))
    busy = await desk.generation.status()
    assert busy.status == "busy" and busy.eta_seconds >= status.eta_seconds


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("ENGINE_FAILED", "ENGINE_FAILED"),
        ("OUT_OF_MEMORY", "OUT_OF_MEMORY"),
        ("TIMEOUT", "TIMEOUT"),
        ("QUEUE_TTL_EXPIRED", "TIMEOUT"),
        ("DISK_FULL", "DISK_FULL"),
        ("NODE_LOST", "NO_NODE"),
        ("POISON", "ENGINE_FAILED"),
        ("EXIT_NONZERO", "ENGINE_FAILED"),
        ("SOMETHING_NEW", "ENGINE_FAILED"),
    ],
)
async def test_a_failed_job_fails_the_call_with_a_documented_reason(desk: Desk, reason: str, told: str) -> None:
    await desk.add_node()
    task = begin(desk)
    await desk.fail(await claimed(desk), reason)
    error = await failure_of(task)
    assert error.reason == told and "it broke" in error.detail


async def test_a_job_cancelled_by_another_call_is_told(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk)
    claim = await claimed(desk)
    await desk.queue.cancel(claim.job.job_id)
    assert (await failure_of(task)).reason == "JOB_ENDED"


async def test_a_caller_who_leaves_cancels_the_job(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk)
    claim = await claimed(desk)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert (await desk.record(claim.job.job_id)).state is JobState.CANCELLED
    assert desk.bell.stopped == [(claim.job.job_id, "agx0", claim.token)]


async def test_a_caller_who_leaves_at_any_moment_leaves_nothing_waiting(desk: Desk) -> None:
    await desk.add_node()
    for turns in range(30):
        task = begin(desk)
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
    await desk.generation.aclose()
    counts = await desk.store.jobs.counts()
    assert counts[JobState.QUEUED] == counts[JobState.RUNNING] == 0
    assert not (await desk.generation.status()).jobs


async def test_leaving_is_bounded_even_if_the_cancel_is_cancelled(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk)
    claim = await claimed(desk)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await desk.generation.aclose()
    assert (await desk.record(claim.job.job_id)).state is JobState.CANCELLED


async def test_the_same_key_joins_the_job_and_the_last_to_leave_cancels_it(desk: Desk) -> None:
    await desk.add_node()
    one, two = begin(desk, key="k"), begin(desk, key="k")
    claim = await claimed(desk)
    await wait_until(lambda: desk.generation.waiting(claim.job.job_id) == 2)
    one.cancel()
    await asyncio.wait([one])
    assert (await desk.record(claim.job.job_id)).state is JobState.RUNNING
    await desk.complete(claim)
    made = await asyncio.wait_for(two, 50)
    again = await asyncio.wait_for(begin(desk, key="k"), 50)
    assert again == made and again.job_id == claim.job.job_id
    other = await failure_of(begin(desk, key="k", steps=3))
    assert other.reason == "IDEMPOTENCY_KEY_REUSED"
    assert sum((await desk.store.jobs.counts()).values()) == 1


async def test_failures_are_not_remembered_by_a_key(desk: Desk) -> None:
    await desk.add_node()
    failed = begin(desk, key="k")
    await desk.fail(await claimed(desk))
    await failure_of(failed)
    left = begin(desk, key="k")
    await claimed(desk)
    left.cancel()
    await asyncio.wait([left])
    task = begin(desk, key="k")
    claim = await claimed(desk)
    await desk.complete(claim)
    made = await asyncio.wait_for(task, 50)
    assert made.job_id == claim.job.job_id
    assert await asyncio.wait_for(begin(desk, key="k"), 50) == made
    assert sum((await desk.store.jobs.counts()).values()) == 3


async def test_a_lost_event_costs_time_and_not_the_picture(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = GenerationSettings(poll_seconds=0.05)
    async with desk_on(store, tmp_path, generation=settings) as desk:
        await desk.add_node()
        task = begin(desk)
        claim = await claimed(desk)
        monkeypatch.setattr(desk.hub._endings, "tell", lambda job_id: None)
        await desk.complete(claim)
        assert (await asyncio.wait_for(task, 50)).job_id == claim.job.job_id


async def test_the_default_model_and_its_alias_are_in_the_job(desk: Desk) -> None:
    await desk.add_node()
    task = begin(desk)
    claim = await claimed(desk)
    job = await desk.queue.get(claim.job.job_id)
    assert (job.target_model, job.resolved_model) == (ALIAS, "sketch")
    await desk.complete(claim)
    await asyncio.wait_for(task, 50)
