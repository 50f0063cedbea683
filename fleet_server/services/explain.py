"""Why a job waits and where one would go: asked of the same functions that dispatch uses. Stores nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.fetching import NO_SHELF, Shelf
from fleet_server.domain.job import BOOST_MS, JobRecord, JobState, Lane, Priority, WaitReason
from fleet_server.domain.node import NodeView
from fleet_server.domain.outlook import Outlook, Verdict, look
from fleet_server.domain.placement import Situation
from fleet_server.services.dispatch import Wanted, wanted_of
from fleet_server.services.intake import Intake
from fleet_server.services.lanes import lane_of
from fleet_server.services.speeds import Speeds, work_of
from fleet_server.store import JobStore, LaneView

NAMED = 3
"""Nodes whose reasons a summary names; `nodes` has them all."""


class Rounds(Protocol):
    """What dispatch looks at."""

    def situation(self, wanted: Sequence[Wanted]) -> Situation:
        """A round with these demands, now."""
        ...

    def nodes(self) -> list[NodeView]:
        """All nodes, as a round sees them."""
        ...


class Explainer:
    """Explanations of jobs. `intake` judges dry runs as it judges submits."""

    def __init__(
        self,
        jobs: JobStore,
        rounds: Rounds,
        speeds: Speeds,
        intake: Intake,
        *,
        clock: Callable[[], int],
        shelf: Shelf = NO_SHELF,
    ) -> None:
        self._jobs = jobs
        self._rounds = rounds
        self._speeds = speeds
        self._intake = intake
        self._clock = clock
        self._shelf = shelf

    async def explain(self, job_id: str) -> types_pb2.Explanation:
        """Why a job waits, or that it does not. Raises JOB_NOT_FOUND."""
        record = await self._jobs.get(job_id)
        if record is None:
            raise FleetError("JOB_NOT_FOUND", f"job_id: there is no job {job_id[:128]!r}; see GET /api/queue/jobs")
        if record.state is not JobState.QUEUED:
            return types_pb2.Explanation(job_id=job_id, summary=_not_waiting(record))
        spec = types_pb2.JobSpec.FromString(record.spec)
        lane = lane_of(spec)
        if record.lane_id.startswith("mixed:"):
            # Its own demand, as in dispatch; a mixed lane says nothing of its jobs.
            lane = replace(lane, lane_id=job_id)
        lanes = await self._jobs.lanes()
        own = next((view for view in lanes if view.lane.lane_id == record.lane_id), None)
        position = None
        if record.wait_reason is WaitReason.NONE:
            (position,) = await self._jobs.queue_positions([(record.cluster, job_id)])
        alone = Wanted(
            lane,
            1,
            record.enqueued_ms - BOOST_MS[record.priority],
            record.priority,
            record.enqueued_ms,
            record.lane_id,
            paused=own.paused if own is not None else False,
            high_waiting=record.priority is Priority.HIGH,
        )
        wanted = _demands(lanes, alone)
        waiting = own.waiting if own is not None else 1
        outlook = self._look(lane, wanted, spec, ahead=(position or 1) - 1, next_in_lane=position == 1 or waiting == 1)
        return _message(outlook, _waiting(record, alone, outlook, position), job_id=job_id, position=position)

    async def dry_run(self, request: queue_pb2.CreateJobRequest, *, owner: str) -> types_pb2.Explanation:
        """Where the job would go if it were submitted now. Raises what a submit raises for its fields."""
        admitted = await self._intake.job(request, owner=owner)
        job, now = admitted.job, self._clock()
        lanes = await self._jobs.lanes()
        effective, high = now - BOOST_MS[job.priority], job.priority is Priority.HIGH
        mine = Wanted(job.lane, 1, effective, job.priority, now, job.lane.lane_id, high_waiting=high)
        before = [view for view in lanes if view.lane.cluster == job.lane.cluster and not view.paused]
        ahead = sum(view.waiting for view in before if _goes_before(view, job.priority, now))
        waiting = next((view.waiting for view in lanes if view.lane.lane_id == job.lane.lane_id), 0)
        outlook = self._look(job.lane, _demands(lanes, mine), admitted.spec, ahead=ahead, next_in_lane=not waiting)
        if job.schedule_ms is not None:
            return _message(outlook, "it would wait for its schedule_time first", position=None)
        return _message(outlook, _sentence(outlook, ahead), position=ahead + 1)

    def _look(
        self, lane: Lane, wanted: list[Wanted], spec: types_pb2.JobSpec, *, ahead: int, next_in_lane: bool
    ) -> Outlook:
        work = work_of(spec)
        book = self._speeds.book
        return look(
            self._rounds.nodes(),
            lane,
            self._rounds.situation(wanted),
            timing=book,
            run_seconds=lambda node: book.seconds(node, lane.model, work),
            ahead=ahead,
            next_in_lane=next_in_lane,
            shelf=self._shelf,
        )


def _demands(lanes: Sequence[LaneView], own: Wanted) -> list[Wanted]:
    """What waits, with the job that is asked about; lanes of mixed jobs are left out, as nothing is known of them."""
    wanted = [wanted_of(view) for view in lanes if not view.mixed]
    if all(one.lane.lane_id != own.lane.lane_id for one in wanted):
        wanted.append(own)
    return wanted


def _goes_before(view: LaneView, priority: Priority, now: int) -> bool:
    """Whether a lane's head goes before a job of this priority that comes now."""
    return view.head_effective_ms is not None and view.head_effective_ms <= now - BOOST_MS[priority]


def _message(
    outlook: Outlook, summary: str, *, job_id: str | None = None, position: int | None
) -> types_pb2.Explanation:
    best = outlook.best
    return types_pb2.Explanation(
        job_id=job_id,
        queue_position=position,
        eta_seconds=_rounded(best.eta_seconds) if best is not None else None,
        node_id=best.node_id if best is not None else None,
        summary=summary,
        nodes=[_verdict(verdict) for verdict in outlook.verdicts],
    )


def _verdict(verdict: Verdict) -> types_pb2.NodeVerdict:
    return types_pb2.NodeVerdict(
        node_id=verdict.node_id,
        feasible=verdict.refusal is None,
        reason=verdict.refusal.reason.value if verdict.refusal is not None else None,
        detail=verdict.detail,
        rank=verdict.rank,
        load_seconds=_rounded(verdict.load_seconds),
        eta_seconds=_rounded(verdict.eta_seconds),
    )


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _not_waiting(record: JobRecord) -> str:
    if record.state is JobState.RUNNING:
        return f"it runs on {record.node_id}" if record.node_id else "its images are being made"
    return {
        JobState.SUCCEEDED: "it has succeeded",
        JobState.FAILED: "it has failed: see its error; POST /api/queue/jobs/{job_id}/retry queues it again",
        JobState.CANCELLED: "it was cancelled",
    }[record.state]


def _waiting(record: JobRecord, own: Wanted, outlook: Outlook, position: int | None) -> str:
    match record.wait_reason:
        case WaitReason.SCHEDULED:
            return "it waits for its schedule_time"
        case WaitReason.BACKOFF:
            return "an attempt has failed: it waits a moment before the next one"
        case WaitReason.DEPENDENCY:
            jobs = "1 job" if record.waits == 1 else f"{record.waits} jobs"
            return f"it waits for {jobs} to succeed first"
    if own.paused:
        return "jobs of its kind are paused: POST /api/queue/resume lets them go on"
    return _sentence(outlook, (position or 1) - 1)


def _sentence(outlook: Outlook, ahead: int) -> str:
    best = outlook.best
    if best is None:
        return _nobody(outlook)
    name = best.node_id
    line = "" if not ahead else "; 1 job is before it" if ahead == 1 else f"; {ahead} jobs are before it"
    load = best.load_seconds or 0.0
    loads = "has the model loaded" if not load else f"would load the model in about {load:.0f} s"
    if best.fetches:
        loads = f"would bring what it lacks from S3 and load it in about {load:.0f} s"
    if best.detail.startswith("no model"):
        loads = "can run it"
    if best.start_seconds == 0:
        return f"{name} {loads} and has a free slot{line}"
    if best.start_seconds is None:
        return f"{name} {loads}, but has no free slot now{line}"
    return f"{name} {loads} and should be free in about {best.start_seconds:.0f} s{line}"


def _nobody(outlook: Outlook) -> str:
    if not outlook.verdicts:
        return "no node has joined the fleet yet: start an agent"
    named = [f"{one.node_id}: {one.detail}" for one in outlook.verdicts[:NAMED]]
    more = len(outlook.verdicts) - len(named)
    return "no node could run it now: " + "; ".join(named) + (f"; and {more} more" if more else "")
