"""The end of an attempt, however often and however late it is reported."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.domain.job import JobState, WaitReason
from fleet_server.domain.retry import backoff_ms
from tests.services.agents.agent import uploaded, wait_until
from tests.services.agents.bench import Bench

OK = pb.CompleteOutcome.COMPLETE_OUTCOME_OK
ALREADY = pb.CompleteOutcome.COMPLETE_OUTCOME_ALREADY
REFUSED = pb.CompleteOutcome.COMPLETE_OUTCOME_REFUSED
PICTURE = bytes(range(256)) * 40


async def test_a_completed_job_has_its_result_and_its_outputs(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    outcome = await agent.complete(
        assign,
        outputs=[uploaded(receipt, width=64, height=48, seed=7)],
        load_seconds=0.25,
        run_seconds=1.5,
        upload_seconds=0.1,
        metadata=types_pb2.OutputMetadata(prompt="a sunset", engine="sketch", model="no"),
    )
    assert outcome == OK
    record = await bench.job(job_id)
    assert (record.state, record.progress) == (JobState.SUCCEEDED, 100)
    assert (record.load_ms, record.run_ms, record.upload_ms) == (250, 1500, 100)
    (output,) = types_pb2.JobResult.FromString(record.result).outputs
    assert output.filename == receipt.filename
    assert (output.size_bytes, output.sha256) == (len(PICTURE), hashlib.sha256(PICTURE).hexdigest())
    assert (output.width, output.height, output.seed) == (64, 48, 7)
    assert (output.job_id, output.node_id, list(output.sources)) == (job_id, "agx0", ["local"])
    assert not output.HasField("metadata")
    (row,) = await bench.store.outputs.by_job(job_id)
    indexed = types_pb2.Output.FromString(row.record)
    assert (indexed.metadata.prompt, indexed.metadata.engine) == ("a sunset", "sketch")
    assert (indexed.metadata.model, indexed.metadata.resolved_model) == ("SDXL_4GB_FP8.safetensors", "sketch")
    assert await bench.outputs.read(receipt.filename) == PICTURE


async def test_a_report_takes_effect_once(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    outputs = [uploaded(receipt)]
    assert await agent.complete(assign, outputs=outputs) == OK
    version = (await bench.job(job_id)).version
    assert await agent.complete(assign, outputs=outputs) == ALREADY
    assert (await bench.job(job_id)).version == version
    # The gallery may have lost the file since: that is no reason to take the success back.
    await bench.outputs.delete(receipt.filename)
    assert await agent.complete(assign, outputs=outputs) == ALREADY
    assert (await bench.job(job_id)).state is JobState.SUCCEEDED


async def test_two_reports_at_once_are_one(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    assign = await agent.start()
    message = pb.JobComplete(job_id=assign.job_id, token=assign.token)
    for _ in range(3):
        await agent.send(complete=message)
    first = (await agent.next("complete_ack")).complete_ack
    assert first.outcome == OK
    assert await agent.complete(assign) in {OK, ALREADY}
    assert (await bench.job(assign.job_id)).state is JobState.SUCCEEDED


async def test_a_report_survives_the_stream(bench: Bench) -> None:
    """The acknowledgement was lost: the agent reports again on its next stream."""
    agent = bench.agent()
    await agent.dial()
    await bench.submit()
    assign = await agent.start()
    await agent.send(complete=pb.JobComplete(job_id=assign.job_id, token=assign.token))
    await agent.hang_up()
    await agent.dial(spooled=[pb.HeldAttempt(job_id=assign.job_id, token=assign.token)])
    assert await agent.complete(assign) in {OK, ALREADY}
    assert (await bench.job(assign.job_id)).state is JobState.SUCCEEDED


async def test_a_late_result_counts_while_the_job_waits(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    await agent.send(goodbye=pb.AgentGoodbye())
    await wait_until(lambda: bench.fleet.nodes()[0].draining)
    await bench.store.jobs.release(job_id, assign.token)
    assert await agent.complete(assign, outputs=[uploaded(receipt)]) == OK
    record = await bench.job(job_id)
    assert (record.state, record.node_id) == (JobState.SUCCEEDED, "agx0")


async def test_a_late_result_is_refused_after_a_new_claim(bench: Bench) -> None:
    """Its file goes, since no job has it; the new attempt is not disturbed."""
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    await bench.store.jobs.release(job_id, assign.token)
    other = bench.agent("agx1")
    await other.dial()
    again = await other.start()
    assert await agent.complete(assign, outputs=[uploaded(receipt)]) == REFUSED
    await wait_until(lambda: gone(bench, receipt.filename))
    record = await bench.job(job_id)
    assert (record.state, record.token) == (JobState.RUNNING, again.token)
    assert await other.complete(again) == OK


async def test_a_report_of_a_forgotten_job_leaves_the_gallery_alone(bench: Bench) -> None:
    """The job's record is past its days; its picture is not."""
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    assert await agent.complete(assign, outputs=[uploaded(receipt)]) == OK
    assert await bench.store.jobs.purge(keep_count=0) == 1
    assert await bench.store.jobs.get(job_id) is None
    assert await agent.complete(assign, outputs=[uploaded(receipt)]) == REFUSED
    await agent.beat()
    assert await bench.outputs.read(receipt.filename) == PICTURE


async def gone(bench: Bench, filename: str) -> bool:
    return await bench.outputs.stat(filename) is None


async def test_the_result_of_a_cancelled_job_is_refused(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await bench.store.jobs.cancel(job_id)
    assert await agent.complete(assign) == REFUSED
    assert (await bench.job(job_id)).state is JobState.CANCELLED


async def test_an_unknown_job_is_refused(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    assert await agent.complete(pb.Assign(job_id="nobody", token="x")) == REFUSED


async def test_a_failure_that_may_pass_is_tried_again(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit(max_retries=1)
    assign = await agent.start()
    error = types_pb2.JobError(detail="the engine died", reason="ENGINE_FAILED")
    assert await agent.complete(assign, error=error, retryable=True) == OK
    record = await bench.job(job_id)
    assert (record.state, record.wait_reason) == (JobState.QUEUED, WaitReason.BACKOFF)
    attempt = types_pb2.JobAttempt.FromString(record.attempts[0])
    assert (attempt.attempt, attempt.node_id, attempt.generation) == (1, "agx0", 1)
    assert (attempt.error.reason, attempt.error.code) == ("ENGINE_FAILED", "INTERNAL")
    assert attempt.end_time.ToMilliseconds() >= attempt.start_time.ToMilliseconds() > 0
    assert await agent.complete(assign, error=error, retryable=True) == ALREADY


@pytest.mark.parametrize(("max_retries", "retryable"), [(3, False), (0, True)])
async def test_a_failure_for_good(bench: Bench, max_retries: int, retryable: bool) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit(max_retries=max_retries)
    assign = await agent.start()
    error = types_pb2.JobError(detail="no memory left", reason="OUT_OF_MEMORY")
    assert await agent.complete(assign, error=error, retryable=retryable, text="so far") == OK
    record = await bench.job(job_id)
    assert record.state is JobState.FAILED
    assert types_pb2.JobError.FromString(record.error).detail == "no memory left"
    assert types_pb2.JobResult.FromString(record.result).text == "so far"


@pytest.mark.parametrize("spoil", ["missing", "foreign"])
async def test_a_success_without_its_files_is_none(bench: Bench, spoil: str) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit(max_retries=0)
    assign = await agent.start()
    receipt = await agent.upload(assign, PICTURE)
    if spoil == "missing":
        await bench.outputs.delete(receipt.filename)
    else:
        receipt.filename = "0" * 32 + ".png"
    assert await agent.complete(assign, outputs=[uploaded(receipt)]) == OK
    record = await bench.job(job_id)
    assert record.state is JobState.FAILED
    assert types_pb2.JobError.FromString(record.error).reason == "OUTPUT_NOT_FOUND"


def test_backoff_doubles_up_to_a_minute() -> None:
    assert [backoff_ms(number) for number in range(1, 9)] == [1000, 2000, 4000, 8000, 16000, 32000, 60000, 60000]
    assert backoff_ms(1, 0.0) == 800
    assert backoff_ms(1, 1.0) == 1200
    assert backoff_ms(10_000) == 60_000
    assert [backoff_ms(number, first_ms=100) for number in (1, 2, 3)] == [100, 200, 400]


def small(data: bytes = PICTURE, **receipt: Any) -> pb.UploadedOutput:
    """An output that rides in its report."""
    told = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), **receipt}
    return pb.UploadedOutput(receipt=pb.OutputReceipt(**told), content_type="image/png", data=data)


async def test_small_outputs_come_in_the_report(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    assert await agent.complete(assign, outputs=[small(), small(b"other")]) == OK
    record = await bench.job(job_id)
    first, second = types_pb2.JobResult.FromString(record.result).outputs
    assert (first.size_bytes, first.sha256) == (len(PICTURE), hashlib.sha256(PICTURE).hexdigest())
    assert await bench.outputs.read(first.filename) == PICTURE
    assert await bench.outputs.read(second.filename) == b"other"
    assert await agent.complete(assign, outputs=[small(), small(b"other")]) == ALREADY
    assert len(await bench.store.outputs.by_job(job_id)) == 2
    assert await bench.outputs.read(first.filename) == PICTURE


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (small(sha256="0" * 64), "hash"),
        (small(size_bytes=len(PICTURE) + 1), "fewer bytes"),
        (small(size_bytes=len(PICTURE) - 1), "more bytes"),
        (small(bytes(65_537)), "more than 65536"),
    ],
    ids=["hash", "short", "long", "large"],
)
async def test_a_small_output_that_is_not_what_it_says_is_a_failure(
    bench: Bench, output: pb.UploadedOutput, told: str
) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit(max_retries=0)
    assign = await agent.start()
    assert await agent.complete(assign, outputs=[output]) == OK
    record = await bench.job(job_id)
    assert record.state is JobState.FAILED
    assert told in types_pb2.JobError.FromString(record.error).detail
    assert not list((bench.folder / "outputs").iterdir())


async def test_a_small_output_of_an_attempt_that_is_over_leaves_no_file(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    await bench.store.jobs.cancel(job_id)
    assert await agent.complete(assign, outputs=[small()]) == REFUSED
    assert not list((bench.folder / "outputs").iterdir())


async def test_a_report_that_the_disk_has_no_room_for_is_taken_when_it_comes_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = bench.agent()
    await agent.dial()
    job_id = await bench.submit()
    assign = await agent.start()
    free = bench.outputs.free_bytes
    asked: list[int] = []

    def full() -> int:
        asked.append(0)
        return 0

    monkeypatch.setattr(bench.outputs, "free_bytes", full)
    report = pb.JobComplete(job_id=assign.job_id, token=assign.token, outputs=[small()])
    await agent.send(complete=report)
    await wait_until(lambda: asked and not bench.sessions._live["agx0"]._settling)
    assert (await bench.job(job_id)).state is JobState.RUNNING
    monkeypatch.setattr(bench.outputs, "free_bytes", free)
    assert await agent.complete(assign, outputs=[small()]) == OK
    assert (await bench.job(job_id)).state is JobState.SUCCEEDED
