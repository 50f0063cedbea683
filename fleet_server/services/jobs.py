"""The one Job of the API, made from a record of the store and its spec."""

from __future__ import annotations

from dataclasses import dataclass

from fleet.v1 import types_pb2
from google.protobuf.struct_pb2 import Struct

from fleet_server.domain.job import JobRecord, JobState, WaitReason
from fleet_server.services.callbacks import without_query
from fleet_server.services.words import priority_number, status_number, type_number


@dataclass(frozen=True, slots=True)
class Live:
    """What is judged when a job is read: its place in line, whether it is held back, or no node could run it; its last
    tick.
    """

    position: int | None = None
    no_node: bool = False
    paused: bool = False
    tick: types_pb2.JobProgress | None = None
    eta_seconds: float | None = None


NOTHING = Live()


def wait_reason(record: JobRecord, live: Live) -> str | None:
    """Why a queued job is not in line; None if it is, or is not queued. What the store knows comes first."""
    if record.state is not JobState.QUEUED:
        return None
    if record.wait_reason is not WaitReason.NONE:
        return record.wait_reason.value
    if live.paused:
        return WaitReason.PAUSED.value
    return WaitReason.NO_NODE.value if live.no_node else None


def ready(record: JobRecord) -> bool:
    """Whether the job waits for its turn alone; a group for that of its images."""
    return record.state is JobState.QUEUED and record.wait_reason is WaitReason.NONE


def in_line(record: JobRecord) -> bool:
    """Whether the job has a place in line; a group never has."""
    return ready(record) and not record.children


def current(record: JobRecord, tick: types_pb2.JobProgress | None) -> types_pb2.JobProgress | None:
    """The tick, if it is of the attempt that runs now; after a restart it can be older than the record."""
    if tick is None or record.state is not JobState.RUNNING:
        return None
    return tick if (tick.generation, tick.attempt) == (record.generation, record.attempt) else None


def receipt(record: JobRecord, spec: types_pb2.JobSpec, live: Live) -> types_pb2.Receipt:
    """The reply to a submit, of a job as it is now."""
    reason = wait_reason(record, live)
    message = types_pb2.Receipt(job_id=record.job_id, status=status_number(record.state), wait_reason=reason)
    if live.position is not None and reason is None:
        message.queue_position = live.position
    copy_models(spec, message)
    return message


def copy_models(spec: types_pb2.JobSpec, message: types_pb2.Receipt | types_pb2.Job) -> None:
    """Sets target_model and resolved_model as the spec has them."""
    if spec.HasField("target_model"):
        message.target_model = spec.target_model
    if spec.HasField("resolved_model"):
        message.resolved_model = spec.resolved_model


def job_message(
    record: JobRecord, spec: types_pb2.JobSpec, live: Live = NOTHING, *, payload: Struct | None = None
) -> types_pb2.Job:
    """The Job at the record's version. `payload` None prints null, as in events.

    `result` is set exactly when it has ended, `error` exactly when it failed.
    """
    reason = wait_reason(record, live)
    job = types_pb2.Job(
        job_id=record.job_id,
        job_type=type_number(record.job_type),
        status=status_number(record.state),
        wait_reason=reason,
        priority=priority_number(record.priority),
        owner=record.owner or None,
        generation=record.generation,
        version=record.version,
        payload=payload,
        target_cluster=record.cluster,
        target_labels=spec.target_labels,
        node_id=record.node_id or None,
        attempt=record.attempt,
        max_retries=record.max_retries,
        timeout_seconds=record.timeout_ms // 1000,
        queue_ttl_seconds=record.queue_ttl_ms // 1000,
        after=spec.after,
        group_job_id=record.group_job_id or None,
        child_job_ids=spec.child_job_ids,
        exclusive=spec.exclusive,
    )
    copy_models(spec, job)
    if spec.HasField("target_node_id"):
        job.target_node_id = spec.target_node_id
    if spec.HasField("callback_url"):
        job.callback_url = without_query(spec.callback_url)
    if live.position is not None and reason is None and record.state is JobState.QUEUED:
        job.queue_position = live.position
    if live.eta_seconds is not None and not record.state.ended:
        job.eta_seconds = round(live.eta_seconds, 3)
    _set_progress(job, record, live.tick)
    _set_times(job, record)
    _set_end(job, record)
    return job


def _set_progress(job: types_pb2.Job, record: JobRecord, tick: types_pb2.JobProgress | None) -> None:
    progress, step, steps = record.progress, record.step, record.steps
    tick = current(record, tick)
    if tick is not None:
        # The store learns of progress at heartbeats only.
        if tick.progress >= progress:
            progress = tick.progress
            step = tick.step if tick.HasField("step") else step
            steps = tick.steps if tick.HasField("steps") else steps
        if tick.HasField("eta_seconds"):
            job.eta_seconds = tick.eta_seconds
    job.progress = progress
    if step is not None:
        job.step = step
    if steps is not None:
        job.steps = steps


def _set_times(job: types_pb2.Job, record: JobRecord) -> None:
    job.create_time.FromMilliseconds(record.created_ms)
    job.update_time.FromMilliseconds(record.updated_ms)
    job.timings.SetInParent()
    if record.schedule_ms is not None:
        job.schedule_time.FromMilliseconds(record.schedule_ms)
    if record.started_ms is not None:
        job.start_time.FromMilliseconds(record.started_ms)
        job.timings.queued_seconds = max(0, record.started_ms - record.enqueued_ms) / 1000
    if record.ended_ms is not None:
        job.end_time.FromMilliseconds(record.ended_ms)
    if record.load_ms is not None:
        job.timings.load_seconds = record.load_ms / 1000
    if record.run_ms is not None:
        job.timings.run_seconds = record.run_ms / 1000
    if record.upload_ms is not None:
        job.timings.upload_seconds = record.upload_ms / 1000


def _set_end(job: types_pb2.Job, record: JobRecord) -> None:
    job.attempts.extend(types_pb2.JobAttempt.FromString(attempt) for attempt in record.attempts)
    if not record.state.ended:
        return
    job.result.SetInParent()
    if record.result:
        job.result.ParseFromString(record.result)
        # What an engine adds is not of the API.
        job.result.DiscardUnknownFields()
        for output in job.result.outputs:
            output.ClearField("metadata")
    if record.state is JobState.FAILED:
        job.error.SetInParent()
        job.error.ParseFromString(record.error)
