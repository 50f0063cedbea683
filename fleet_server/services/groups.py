"""Groups: several images of one request, each a job of its own, and what is known of them together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord, JobState

_SEEDS = 1 << 64


def split(
    spec: types_pb2.JobSpec, job_id: str, child_ids: Sequence[str]
) -> tuple[types_pb2.JobSpec, list[types_pb2.JobSpec]]:
    """The spec of a group of that id and those of its images: image i is made with seed + i (mod 2^64).

    What the group waits for its images wait for too; its end alone is called back.
    """
    group = types_pb2.JobSpec()
    group.CopyFrom(spec)
    group.child_job_ids.extend(child_ids)
    children = []
    for index in range(len(child_ids)):
        child = types_pb2.JobSpec()
        child.CopyFrom(spec)
        child.ClearField("callback_url")
        child.group_job_id = job_id
        child.payload.image_gen.n = 1
        child.payload.image_gen.seed = (spec.payload.image_gen.seed + index) % _SEEDS
        children.append(child)
    return group, children


def progress_of(children: Iterable[JobRecord | None], ticks: Mapping[str, int]) -> int:
    """The mean of the images' progress in whole percent, rounded down; `ticks` are newer than the records."""
    each = [progress_of_one(child, ticks) for child in children]
    return sum(each) // len(each) if each else 0


def progress_of_one(child: JobRecord | None, ticks: Mapping[str, int]) -> int:
    """How far an image is; one that has been deleted is nowhere."""
    if child is None:
        return 0
    if child.state is JobState.SUCCEEDED:
        return 100
    if child.state is JobState.RUNNING:
        return max(child.progress, ticks.get(child.job_id, 0))
    return child.progress


def joined(group: JobRecord, children: Sequence[JobRecord | None], ticks: Mapping[str, int]) -> JobRecord:
    """The record of a group with what its images say: their mean progress and, once it has ended, their outputs."""
    if not group.state.ended:
        return replace(group, progress=progress_of(children, ticks))
    result = types_pb2.JobResult()
    for child in children:
        if child is not None and child.result:
            result.outputs.extend(types_pb2.JobResult.FromString(child.result).outputs)
    progress = 100 if group.state is JobState.SUCCEEDED else progress_of(children, {})
    return replace(group, progress=progress, result=result.SerializeToString())
