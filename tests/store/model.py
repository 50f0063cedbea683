"""What the store promises of jobs, as a small pure model to compare it with."""

from __future__ import annotations

from dataclasses import dataclass

from fleet_server.domain.job import BOOST_MS, JobState, Priority, WaitReason
from tests.store.making import LEASE_MS

BACKOFF_MS = 1_000
MARGIN_MS = 10_000


@dataclass
class ModelJob:
    """One job."""

    job_id: str
    priority: Priority
    owner: str
    max_retries: int
    timeout_ms: int
    queue_ttl_ms: int
    enqueued_ms: int
    due_ms: int | None = None
    state: JobState = JobState.QUEUED
    wait_reason: WaitReason = WaitReason.NONE
    generation: int = 1
    attempt: int = 0
    losses: int = 0
    nodes: frozenset[str] = frozenset()
    token: str = ""
    last_token: str = ""
    failed_token: str = ""
    node_id: str = ""
    lease_ms: int = 0
    started_ms: int | None = None
    ran: bool = False
    ended: int = 0

    @property
    def in_line(self) -> bool:
        return self.state is JobState.QUEUED and not self.wait_reason


class Model:
    """All jobs of one lane. Each method does what the store's method of that name promises."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}

    def _requeue(self, job: ModelJob, due_ms: int | None) -> None:
        job.state = JobState.QUEUED
        job.wait_reason = WaitReason.BACKOFF if due_ms is not None else WaitReason.NONE
        job.due_ms = due_ms
        job.token, job.node_id, job.started_ms = "", "", None

    def _end(self, job: ModelJob, state: JobState) -> None:
        job.last_token = job.token or job.last_token
        job.state, job.wait_reason, job.token = state, WaitReason.NONE, ""
        job.ended += 1

    def may_claim(self, job_id: str) -> bool:
        """Whether a claim may give this job: it heads its owner's line in a priority that may be next."""
        job = self.jobs[job_id]
        line = [one for one in self.jobs.values() if one.in_line]
        mates = [one for one in line if (one.priority, one.owner) == (job.priority, job.owner)]
        if not job.in_line or min(mates, key=lambda one: (one.enqueued_ms, one.job_id)) is not job:
            return False
        oldest: dict[Priority, int] = {}
        for one in line:
            at = one.enqueued_ms - BOOST_MS[one.priority]
            oldest[one.priority] = min(oldest.get(one.priority, at), at)
        return job.priority is Priority.HIGH or oldest[job.priority] == min(oldest.values())

    def claimed(self, job_id: str, node_id: str, token: str, now: int) -> None:
        job = self.jobs[job_id]
        job.state, job.token, job.node_id, job.lease_ms = JobState.RUNNING, token, node_id, now + LEASE_MS
        job.attempt += 1
        job.last_token = ""

    def started(self, job_id: str, token: str, now: int) -> bool:
        job = self.jobs[job_id]
        if job.state is not JobState.RUNNING or job.token != token:
            return False
        if job.started_ms is None:
            job.started_ms, job.ran = now, True
        return True

    def renew(self, job_id: str, token: str, now: int) -> bool:
        job = self.jobs[job_id]
        if job.state is not JobState.RUNNING or job.token != token:
            return False
        job.lease_ms = now + LEASE_MS
        return True

    def complete(self, job_id: str, token: str) -> str:
        job = self.jobs[job_id]
        if job.state is JobState.SUCCEEDED and job.last_token == token:
            return "already"
        current = job.state is JobState.RUNNING and job.token == token
        if not current and not (job.state is JobState.QUEUED and job.last_token == token):
            return "refused"
        self._end(job, JobState.SUCCEEDED)
        return "ok"

    def _attempt_failed(self, job: ModelJob, retryable: bool, due_ms: int | None) -> None:
        job.failed_token = job.token
        if retryable and job.attempt - job.losses <= job.max_retries:
            job.last_token = ""
            self._requeue(job, due_ms)
        else:
            self._end(job, JobState.FAILED)

    def fail(self, job_id: str, token: str, retryable: bool, backoff_ms: int, now: int) -> str:
        job = self.jobs[job_id]
        if job.failed_token == token:
            return "already"
        if job.state is not JobState.RUNNING or job.token != token:
            return "refused"
        self._attempt_failed(job, retryable, now + backoff_ms if backoff_ms else None)
        return "ok"

    def release(self, job_id: str, token: str) -> bool:
        job = self.jobs[job_id]
        if job.state is JobState.QUEUED and job.last_token == token:
            return True
        if job.state is not JobState.RUNNING or job.token != token:
            return False
        job.attempt -= 1
        job.last_token = token
        self._requeue(job, None)
        return True

    def cancel(self, job_id: str) -> bool:
        job = self.jobs[job_id]
        if job.state is JobState.CANCELLED:
            return True
        if job.state.ended:
            return False
        self._end(job, JobState.CANCELLED)
        return True

    def retry(self, job_id: str, now: int) -> bool:
        job = self.jobs[job_id]
        if job.state is not JobState.FAILED:
            return False
        self._requeue(job, None)
        job.generation += 1
        job.attempt, job.losses, job.nodes, job.ran = 0, 0, frozenset(), False
        job.last_token, job.failed_token, job.enqueued_ms = "", "", now
        return True

    def _lost(self, job: ModelJob) -> None:
        token, counted = job.token, job.started_ms is not None
        if counted:
            job.losses += 1
            job.nodes |= {job.node_id}
            if job.losses >= 3 and len(job.nodes) >= 2:
                self._end(job, JobState.FAILED)
                return
        else:
            job.attempt -= 1
        job.last_token, job.failed_token = token, ""
        self._requeue(job, None)

    def reap(self, now: int) -> None:
        """The four sweeps, in the store's order."""
        jobs = list(self.jobs.values())
        for job in jobs:
            if job.state is JobState.RUNNING and job.lease_ms <= now:
                self._lost(job)
        for job in jobs:
            overdue = job.started_ms is not None and job.started_ms + job.timeout_ms <= now - MARGIN_MS
            if job.state is JobState.RUNNING and overdue:
                self._attempt_failed(job, True, now + BACKOFF_MS)
        for job in jobs:
            if job.state is JobState.QUEUED and not job.ran and job.enqueued_ms + job.queue_ttl_ms <= now:
                self._end(job, JobState.FAILED)
        for job in jobs:
            waits = job.state is JobState.QUEUED and job.wait_reason
            if waits and job.due_ms is not None and job.due_ms <= now:
                job.wait_reason, job.due_ms = WaitReason.NONE, None
