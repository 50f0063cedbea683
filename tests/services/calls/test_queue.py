"""Submit, look, list, cancel and retry, on a real store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Priority
from fleet_server.domain.node import NodeStatus
from tests.services.calls.desk import ALIAS, Desk, asked, now_ms

JOB: dict[str, Any] = {"job_type": "image_gen", "payload": {"prompt": "a sea"}}


LORA_WEIGHT = "payload.loras[0].weight"


async def refused(step: Any) -> FleetError:
    with pytest.raises(FleetError) as caught:
        await step
    return caught.value


async def test_the_documented_submit_gives_the_documented_receipt(desk: Desk) -> None:
    await desk.add_node()
    request = asked(
        queue_pb2.CreateJobRequest,
        job_type="image_gen",
        priority="high",
        payload={"prompt": "beautiful landscape", "width": 1024, "height": 1024},
        target_cluster="vision",
        callback_url="https://your-app.com/webhook?token=secret",
        max_retries=3,
        timeout_seconds=3600,
    )
    receipt = await desk.queue.create(request, owner="", key=None)
    assert receipt.status == types_pb2.JOB_STATUS_QUEUED
    assert (receipt.queue_position, receipt.target_model, receipt.resolved_model) == (1, ALIAS, "sketch")
    assert not receipt.HasField("wait_reason")
    assert desk.bell.rung == 1

    job = await desk.queue.get(receipt.job_id)
    assert job.callback_url == "https://your-app.com/webhook"
    assert (job.priority, job.max_retries, job.timeout_seconds) == (types_pb2.JOB_PRIORITY_HIGH, 3, 3600)
    assert (job.target_cluster, job.generation, job.attempt, job.progress) == ("vision", 1, 0, 0)
    assert job.queue_position == 1
    assert not job.HasField("result") and not job.HasField("error") and not job.HasField("owner")
    payload: dict[str, Any] = dict(job.payload)
    assert payload["prompt"] == "beautiful landscape" and payload["steps"] == 20 and payload["model"] == ALIAS
    assert 0 <= job.payload.fields["seed"].number_value < 2**53 - 64
    assert "init_image" not in payload and "strength" not in payload


async def test_of_many_submits_a_few_take_their_claims_along(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others go together in one step: where many come, a claim for each would cost more than it saves."""
    await desk.add_node()
    monkeypatch.setattr(desk.bell, "rides", lambda: True)
    submit = desk.store.jobs.submit
    riding: list[bool] = []

    async def noted(*args: Any, **more: Any) -> Any:
        riding.append(more["posted"] is not None)
        return await submit(*args, **more)

    monkeypatch.setattr(desk.store.jobs, "submit", noted)
    job_ids = await asyncio.gather(*(desk.submit() for _ in range(10)))
    assert riding == [True] * 4 + [False] * 6
    assert len(set(job_ids)) == 10
    await desk.submit()
    assert riding[-1], "nobody is on the way any more"


async def test_a_job_through_its_whole_life_reads_as_documented(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    claim = await desk.start()
    tick = types_pb2.JobProgress(job_id=job_id, progress=40, step=8, steps=20, generation=1, attempt=1, eta_seconds=1.5)
    desk.ticks.publish(tick)
    job = await desk.queue.get(job_id)
    assert (job.status, job.node_id, job.attempt) == (types_pb2.JOB_STATUS_RUNNING, "agx0", 1)
    assert (job.progress, job.step, job.steps, job.eta_seconds) == (40, 8, 20, 1.5)
    assert not job.HasField("queue_position") and job.HasField("start_time") and not job.HasField("end_time")
    assert job.timings.HasField("queued_seconds") and not job.timings.HasField("run_seconds")

    row = await desk.complete(claim)
    job = await desk.queue.get(job_id)
    assert (job.status, job.progress) == (types_pb2.JOB_STATUS_SUCCEEDED, 100)
    assert not job.HasField("eta_seconds") and not job.HasField("error")
    assert [output.filename for output in job.result.outputs] == [row.filename]
    assert not job.result.outputs[0].HasField("metadata")
    assert (job.timings.load_seconds, job.timings.run_seconds, job.timings.upload_seconds) == (0.005, 0.07, 0.002)


async def test_a_failed_job_has_its_error_an_empty_result_and_its_attempts(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit(max_retries=0)
    await desk.fail(await desk.start(), "OUT_OF_MEMORY")
    job = await desk.queue.get(job_id)
    assert job.status == types_pb2.JOB_STATUS_FAILED
    assert (job.error.reason, job.error.detail, job.error.code) == ("OUT_OF_MEMORY", "it broke", "INTERNAL")
    assert job.HasField("result") and not job.result.outputs
    assert [attempt.error.reason for attempt in job.attempts] == ["OUT_OF_MEMORY"]

    again = await desk.queue.retry(asked(queue_pb2.RetryJobRequest, job_id=job_id), owner="", key=None)
    assert (again.status, again.generation, again.attempt) == (types_pb2.JOB_STATUS_QUEUED, 2, 0)
    assert not again.HasField("error") and not again.HasField("result")
    assert dict(again.payload) == dict(job.payload)
    error = await refused(desk.queue.retry(asked(queue_pb2.RetryJobRequest, job_id=job_id), owner="", key=None))
    assert error.reason == "JOB_NOT_FAILED"


async def test_backoff_is_a_wait_reason_and_no_place_in_line(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    await desk.fail(await desk.start(), retryable=True)
    job = await desk.queue.get(job_id)
    assert (job.status, job.wait_reason) == (types_pb2.JOB_STATUS_QUEUED, "BACKOFF")
    assert not job.HasField("queue_position")


async def test_a_tick_of_an_attempt_that_is_over_does_not_count(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    await desk.fail(await desk.start(), retryable=True, backoff_ms=0)
    await desk.start()
    desk.ticks.publish(types_pb2.JobProgress(job_id=job_id, progress=90, generation=1, attempt=1, eta_seconds=1))
    job = await desk.queue.get(job_id)
    assert (job.attempt, job.progress, job.HasField("eta_seconds")) == (2, 0, False)
    assert [attempt.attempt for attempt in job.attempts] == [1]
    desk.ticks.publish(types_pb2.JobProgress(job_id=job_id, progress=5, generation=1, attempt=2))
    assert (await desk.queue.get(job_id)).progress == 5


async def test_a_type_that_no_node_serves_waits_and_says_why(desk: Desk) -> None:
    receipt = await desk.queue.create(asked(queue_pb2.CreateJobRequest, **JOB), owner="", key=None)
    assert receipt.wait_reason == "NO_NODE" and not receipt.HasField("queue_position")
    assert receipt.target_model == ALIAS
    job = await desk.queue.get(receipt.job_id)
    assert job.wait_reason == "NO_NODE" and not job.HasField("queue_position")
    await desk.add_node()
    job = await desk.queue.get(receipt.job_id)
    assert not job.HasField("wait_reason") and job.queue_position == 1


@pytest.mark.parametrize(
    ("job_type", "cluster", "payload"),
    [
        ("video_gen", "vision", {"prompt": "waves"}),
        ("llm_inference", "llm", {"messages": [{"role": "user", "content": "hi"}]}),
        ("training", "compute", {"image": "trainer:1", "env": {"A": "b"}, "mounts": ["/data:/data:ro"]}),
        ("custom", "compute", {"engine": "container", "deep": {"list": [None, 1, []]}}),
    ],
)
async def test_each_type_has_its_cluster_and_its_payload(
    desk: Desk, job_type: str, cluster: str, payload: dict[str, Any]
) -> None:
    await desk.add_node()
    job_id = await desk.submit(job_type=job_type, payload=payload)
    job = await desk.queue.get(job_id)
    assert (job.target_cluster, job.wait_reason) == (cluster, "NO_NODE")
    assert not job.HasField("target_model")
    shown = queue_pb2.CreateJobRequest(payload=job.payload)
    for name, value in payload.items():
        given = asked(queue_pb2.CreateJobRequest, job_type=job_type, payload={name: value}).payload
        assert shown.payload.fields[name] == given.fields[name]


@pytest.mark.parametrize(
    ("fields", "reason", "path"),
    [
        ({"payload": {"prompt": "x", "steps": 0}}, "INVALID_FIELD", "payload.steps"),
        ({"payload": {"prompt": "x", "width": 100}}, "INVALID_FIELD", "payload.width"),
        ({"payload": {"prompt": "x", "width": "64"}}, "INVALID_FIELD", "payload.width"),
        ({"payload": {"prompt": "x", "width": 64.5}}, "INVALID_FIELD", "payload.width"),
        ({"payload": {"prompt": "x", "seed": "-1"}}, "INVALID_FIELD", "payload.seed"),
        ({"payload": {"prompt": " "}}, "INVALID_FIELD", "payload.prompt"),
        ({"payload": {}}, "INVALID_FIELD", "payload.prompt"),
        ({"payload": {"prompt": "x", "colour": "red"}}, "UNKNOWN_FIELD", "payload.colour"),
        ({"payload": {"prompt": "x", "strength": 0.5}}, "INVALID_FIELD", "payload.strength"),
        ({"payload": {"prompt": "x", "n": 65}}, "INVALID_FIELD", "payload.n"),
        ({"payload": {"prompt": "x", "init_image": "output:a.png"}}, "INPUT_NOT_FOUND", "payload.init_image"),
        ({"payload": {"prompt": "x", "init_image": "job:a"}}, "INVALID_FIELD", "payload.init_image"),
        ({"payload": {"prompt": "x", "init_image": "http://a/b.png"}}, "INVALID_FIELD", "payload.init_image"),
        ({"payload": {"prompt": "x", "mask_image": "output:a.png"}}, "INVALID_FIELD", "payload.mask_image"),
        ({"payload": {"workflow": [1]}}, "INVALID_FIELD", "payload.workflow"),
        ({"payload": {"prompt": "x", "model": "none"}}, "MODEL_NOT_FOUND", "payload.model"),
        ({"payload": {"prompt": "x", "loras": [{"name": "ink"}]}}, "LORA_NOT_FOUND", "payload.loras[0].name"),
        ({"payload": {"prompt": "x", "loras": [{"name": "a", "weight": 3}]}}, "INVALID_FIELD", LORA_WEIGHT),
        ({"after": ["a"]}, "JOB_NOT_FOUND", "after[0]"),
        ({"after": ["a b"]}, "JOB_NOT_FOUND", "after[0]"),
        ({"target_node_id": "agx9"}, "NODE_NOT_FOUND", "target_node_id"),
        ({"callback_url": "http://127.0.0.1/x"}, "CALLBACK_FORBIDDEN", "callback_url"),
        ({"callback_url": "ftp://example.com"}, "INVALID_FIELD", "callback_url"),
        ({"schedule_time": "2100-01-01T00:00:00Z"}, "INVALID_FIELD", "schedule_time"),
        ({"job_type": "transcription", "payload": {"audio": "talk.wav"}}, "INVALID_FIELD", "payload.audio"),
        ({"job_type": "transcription", "payload": {"audio": "input:1"}}, "INPUT_NOT_FOUND", "payload.audio"),
        ({"job_type": "transcription", "payload": {"audio": "output:a"}}, "INPUT_NOT_FOUND", "payload.audio"),
        ({"job_type": "transcription", "payload": {"audio": "s3://other/a"}}, "INVALID_FIELD", "payload.audio"),
        ({"job_type": "transcription", "payload": {"audio": "s3://fleet-loras/.."}}, "INVALID_FIELD", "payload.audio"),
        ({"job_type": "training", "payload": {"image": "a", "mounts": ["data"]}}, "INVALID_FIELD", "payload.mounts[0]"),
        ({"job_type": "training", "payload": {"image": "a", "command": "a 'b"}}, "INVALID_FIELD", "payload.command"),
        ({"job_type": "llm_inference", "payload": {}}, "INVALID_FIELD", "payload"),
        ({"job_type": "custom", "payload": {"engine": 7}}, "INVALID_FIELD", "payload.engine"),
    ],
)  # fmt: skip
async def test_bad_input_names_its_field_and_stores_nothing(
    desk: Desk, fields: dict[str, Any], reason: str, path: str
) -> None:
    await desk.add_node()
    error = await refused(desk.submit(**fields))
    assert error.reason == reason
    assert error.detail.startswith(f"{path}:") or path == "payload"
    assert [violation.field for violation in error.violations] == [path]
    assert sum((await desk.store.jobs.counts()).values()) == 0 and desk.bell.rung == 0

    batch = {"jobs": [JOB, {**JOB, **fields}]}
    error = await refused(desk.queue.create_many(asked(queue_pb2.BatchCreateJobsRequest, **batch), owner="", key=None))
    assert (error.reason, error.violations[0].field) == (reason, f"jobs[1].{path}")
    assert sum((await desk.store.jobs.counts()).values()) == 0


async def test_while_its_nodes_are_away_a_job_waits_in_line(desk: Desk) -> None:
    await desk.add_node()
    desk.nodes.set_status("agx0", NodeStatus.DOWN)
    receipt = await desk.queue.create(asked(queue_pb2.CreateJobRequest, **JOB), owner="", key=None)
    assert receipt.queue_position == 1 and not receipt.HasField("wait_reason")
    assert (await desk.queue.get(receipt.job_id)).queue_position == 1


async def test_a_cluster_need_not_have_a_node_yet(desk: Desk) -> None:
    await desk.add_node()
    job = await desk.queue.get(await desk.submit(target_cluster="lab"))
    assert (job.target_cluster, job.wait_reason) == ("lab", "NO_NODE")
    await desk.add_node("agx1", clusters=["lab"], labels={"zone": "a"})
    assert (await desk.queue.get(job.job_id)).queue_position == 1
    for fields, reason in (({"target_labels": {"zone": "a"}}, ""), ({"target_labels": {"zone": "b"}}, "NO_NODE"),
                           ({"target_node_id": "agx0"}, "NO_NODE"), ({"target_node_id": "agx1"}, "")):  # fmt: skip
        job = await desk.queue.get(await desk.submit(target_cluster="lab", **fields))
        assert job.wait_reason == reason
        assert dict(job.target_labels) == fields.get("target_labels", {})
        assert job.target_node_id == fields.get("target_node_id", "")


async def test_a_payload_beyond_a_million_bytes_is_refused_and_one_just_below_is_taken(desk: Desk) -> None:
    room = 1_000_000 - len('{"fill":""}')
    error = await refused(desk.submit(job_type="custom", payload={"fill": "x" * (room + 1)}))
    assert (error.reason, error.violations[0].field) == ("INVALID_FIELD", "payload")
    await desk.submit(job_type="custom", payload={"fill": "x" * room})


@pytest.mark.parametrize(("seed", "shown"), [("18446744073709551615", "18446744073709551615"), (0, 0), (2**53, 2**53)])
async def test_seeds_are_kept_to_the_last_bit(desk: Desk, seed: int | str, shown: int | str) -> None:
    job_id = await desk.submit(payload={"prompt": "x", "seed": seed})
    assert dict((await desk.queue.get(job_id)).payload)["seed"] == shown
    spec = types_pb2.JobSpec.FromString((await desk.record(job_id)).spec)
    assert spec.payload.image_gen.seed == int(seed)


async def test_a_seed_that_a_double_rounded_is_refused(desk: Desk) -> None:
    request = asked(queue_pb2.CreateJobRequest, **JOB)
    request.payload.fields["seed"].number_value = 2.0**60
    error = await refused(desk.queue.create(request, owner="", key=None))
    assert error.violations[0].field == "payload.seed" and "must be a string" in error.detail


async def test_drawn_seeds_differ(desk: Desk) -> None:
    seeds = {dict((await desk.queue.get(await desk.submit())).payload)["seed"] for _ in range(8)}
    assert len(seeds) == 8


async def test_a_batch_keeps_its_order_and_answers_for_each(desk: Desk) -> None:
    await desk.add_node()
    jobs = [{**JOB, "payload": {"prompt": f"sea {n}"}} for n in range(60)]
    request = asked(queue_pb2.BatchCreateJobsRequest, jobs=jobs)
    receipts = await desk.queue.create_many(request, owner="", key=None)
    assert [receipt.queue_position for receipt in receipts] == list(range(1, 61))
    shown = [dict((await desk.queue.get(receipt.job_id)).payload)["prompt"] for receipt in receipts]
    assert shown == [f"sea {n}" for n in range(60)]


async def test_a_job_of_a_batch_has_no_request_id_of_its_own(desk: Desk) -> None:
    request = asked(queue_pb2.BatchCreateJobsRequest, jobs=[JOB, {**JOB, "request_id": "a"}])
    error = await refused(desk.queue.create_many(request, owner="", key=None))
    assert error.violations[0].field == "jobs[1].request_id"


async def test_a_repeated_request_is_the_same_job_and_other_content_is_refused(desk: Desk) -> None:
    await desk.add_node()
    request = asked(queue_pb2.CreateJobRequest, **JOB)
    first = await desk.queue.create(request, owner="a", key="k1")
    assert (await desk.queue.create(request, owner="a", key="k1")).job_id == first.job_id
    await desk.start()
    again = await desk.queue.create(request, owner="a", key="k1")
    assert (again.job_id, again.status) == (first.job_id, types_pb2.JOB_STATUS_RUNNING)
    assert again.resolved_model == "sketch" and not again.HasField("queue_position")
    assert (await desk.queue.create(request, owner="b", key="k1")).job_id != first.job_id
    in_body = asked(queue_pb2.CreateJobRequest, **JOB, request_id="k1")
    assert (await desk.queue.create(in_body, owner="a", key="k1")).job_id == first.job_id
    other = asked(queue_pb2.CreateJobRequest, job_type="image_gen", payload={"prompt": "a wood"})
    assert (await refused(desk.queue.create(other, owner="a", key="k1"))).reason == "IDEMPOTENCY_KEY_REUSED"

    jobs = asked(queue_pb2.BatchCreateJobsRequest, jobs=[JOB, JOB])
    batch = await desk.queue.create_many(jobs, owner="a", key="k1")
    again_ids = [receipt.job_id for receipt in await desk.queue.create_many(jobs, owner="a", key="k1")]
    assert again_ids == [receipt.job_id for receipt in batch]


async def test_a_caller_who_leaves_during_a_submit_leaves_no_half_of_it(desk: Desk) -> None:
    request = asked(queue_pb2.BatchCreateJobsRequest, jobs=[JOB] * 120)
    outcomes = set()
    for turns in range(1, 16):
        before, rung = sum((await desk.store.jobs.counts()).values()), desk.bell.rung
        task = asyncio.create_task(desk.queue.create_many(request, owner="", key=None))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await desk.queue.aclose()
        after = sum((await desk.store.jobs.counts()).values())
        # All or none; and what is stored was made known to dispatch.
        assert (after - before, desk.bell.rung - rung) in {(0, 0), (120, 1)}
        outcomes.add(after - before)
    assert outcomes == {0, 120}


async def test_vision_takes_a_number_as_priority(desk: Desk) -> None:
    await desk.add_node()
    for number, priority in ((5, Priority.HIGH), (0, Priority.NORMAL), (-1, Priority.LOW)):
        request = asked(vision_pb2.VisionGenerateRequest, prompt="cyberpunk city", model=ALIAS, priority=number)
        receipt = await desk.queue.create_image(request, owner="", key=None)
        assert (receipt.target_model, receipt.resolved_model) == (ALIAS, "sketch")
        record = await desk.record(receipt.job_id)
        assert (record.priority, record.job_type, record.cluster) == (priority, "image_gen", "vision")


async def test_cancel_ends_at_once_tells_the_node_and_is_idempotent(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    claim = await desk.start()
    for _ in range(2):
        job = await desk.queue.cancel(job_id)
        assert job.status == types_pb2.JOB_STATUS_CANCELLED
        assert job.HasField("result") and not job.HasField("error")
    assert desk.bell.stopped[0] == (job_id, "agx0", claim.token)
    assert (await refused(desk.queue.cancel("nobody"))).reason == "JOB_NOT_FOUND"
    await desk.submit()
    done = await desk.run_next()
    assert (await refused(desk.queue.cancel(done.job.job_id))).reason == "JOB_ENDED"
    assert (await refused(desk.queue.get("nobody"))).reason == "JOB_NOT_FOUND"


async def test_scheduled_jobs_wait_for_their_time(desk: Desk) -> None:
    await desk.add_node()
    request = asked(queue_pb2.CreateJobRequest, **JOB)
    request.schedule_time.FromMilliseconds(now_ms() + 3_600_000)
    receipt = await desk.queue.create(request, owner="", key=None)
    assert receipt.wait_reason == "SCHEDULED" and not receipt.HasField("queue_position")
    job = await desk.queue.get(receipt.job_id)
    assert job.wait_reason == "SCHEDULED" and job.schedule_time == request.schedule_time
    request.schedule_time.FromMilliseconds(now_ms() - 1_000)
    receipt = await desk.queue.create(request, owner="", key=None)
    assert receipt.queue_position == 1
