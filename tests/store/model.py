"""What the store promises of jobs, as a small pure model to compare it with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fleet_server.domain.job import BOOST_MS, JobState, PauseKey, Priority, WaitReason
from tests.store.making import LEASE_MS

BACKOFF_MS = 1_000
MARGIN_MS = 10_000
AVOID_MS = 30_000
EXCLUSIVE_MARGIN_MS = 5_000


@dataclass
class ModelJob:
    """One job; `children` make it a group."""

    job_id: str
    priority: Priority
    owner: str
    max_retries: int
    timeout_ms: int
    queue_ttl_ms: int
    enqueued_ms: int
    due_ms: int | None = None
    after: tuple[str, ...] = ()
    group: str = ""
    children: tuple[str, ...] = ()
    exclusive: bool = False
    state: JobState = JobState.QUEUED
    wait_reason: WaitReason = WaitReason.NONE
    unmet: set[str] = field(default_factory=set)
    ttl_from_ms: int = 0
    generation: int = 1
    attempt: int = 0
    losses: int = 0
    nodes: frozenset[str] = frozenset()
    token: str = ""
    last_token: str = ""
    failed_token: str = ""
    node_id: str = ""
    lease_ms: int = 0
    stopping: str = ""
    avoid_node: str = ""
    avoid_until_ms: int = 0
    started_ms: int | None = None
    ran: bool = False
    ended: int = 0

    @property
    def in_line(self) -> bool:
        return self.state is JobState.QUEUED and not self.wait_reason and not self.children

    @property
    def waits_for_others(self) -> bool:
        return self.state is JobState.QUEUED and self.wait_reason is WaitReason.DEPENDENCY

    def avoids(self, node_id: str, now: int) -> bool:
        return self.avoid_node == node_id and self.avoid_until_ms > now


class Model:
    """All jobs of one lane. Each method does what the store's method of that name promises."""

    def __init__(self) -> None:
        self.jobs: dict[str, ModelJob] = {}
        self.pauses: set[PauseKey] = set()

    # The way in.

    def submit(self, jobs: Sequence[ModelJob], now: int) -> None:
        doomed = []
        for job in jobs:
            group = self.jobs.get(job.group)
            if group is not None:
                job.after = tuple(dict.fromkeys(job.after + group.after))
            job.unmet = {one for one in job.after if self.jobs[one].state is not JobState.SUCCEEDED}
            job.enqueued_ms = job.ttl_from_ms = job.due_ms or now
            if job.unmet:
                job.wait_reason = WaitReason.DEPENDENCY
            elif job.due_ms is not None:
                job.wait_reason = WaitReason.SCHEDULED
            self.jobs[job.job_id] = job
            if any(self.jobs[one].state in {JobState.FAILED, JobState.CANCELLED} for one in job.after):
                doomed.append(job)
        for job in doomed:
            self._cancel(job, now)

    # Ends, and what they bring about.

    def _cancel(self, job: ModelJob, now: int) -> None:
        if not job.state.ended:
            self._end(job, JobState.CANCELLED, now)

    def _end(self, job: ModelJob, state: JobState, now: int) -> None:
        job.last_token = job.token or job.last_token
        job.state, job.wait_reason, job.token = state, WaitReason.NONE, ""
        job.avoid_node, job.stopping = "", ""
        job.ended += 1
        for other in self.jobs.values():
            if job.job_id in other.unmet:
                self._parent_ended(other, job, now)
        for child in job.children:
            self._cancel(self.jobs[child], now)
        if job.group:
            self._child_ended(self.jobs[job.group], now)

    def _parent_ended(self, job: ModelJob, parent: ModelJob, now: int) -> None:
        if parent.state is JobState.SUCCEEDED:
            job.unmet.discard(parent.job_id)
            if job.waits_for_others and not job.unmet:
                self._ready(job, now)
        elif job.waits_for_others:
            self._cancel(job, now)

    def _ready(self, job: ModelJob, now: int) -> None:
        if job.due_ms is not None and job.due_ms > now:
            job.wait_reason = WaitReason.SCHEDULED
            return
        job.wait_reason, job.due_ms = WaitReason.NONE, None
        if not job.children:
            job.enqueued_ms = now

    def _child_ended(self, group: ModelJob, now: int) -> None:
        states = {self.jobs[child].state for child in group.children}
        if group.state.ended or not all(state.ended for state in states):
            return
        for state in (JobState.FAILED, JobState.CANCELLED, JobState.SUCCEEDED):
            if state in states:
                self._end(group, state, now)
                return

    # Claims.

    def held_back(self, job: ModelJob) -> bool:
        return any(key.holds("vision", "image_gen", job.priority) for key in self.pauses)

    def may_go(self) -> list[ModelJob]:
        return [job for job in self.jobs.values() if job.in_line and not self.held_back(job)]

    def may_claim(self, job_id: str) -> bool:
        """Whether a claim may give this job: it heads its owner's line in a priority that may be next."""
        job = self.jobs[job_id]
        line = self.may_go()
        mates = [one for one in line if (one.priority, one.owner) == (job.priority, job.owner)]
        if job not in line or min(mates, key=lambda one: (one.enqueued_ms, one.job_id)) is not job:
            return False
        oldest: dict[Priority, int] = {}
        for one in line:
            at = one.enqueued_ms - BOOST_MS[one.priority]
            oldest[one.priority] = min(oldest.get(one.priority, at), at)
        return job.priority is Priority.HIGH or oldest[job.priority] == min(oldest.values())

    def claimed(self, job_id: str, node_id: str, token: str, now: int) -> None:
        job = self.jobs[job_id]
        job.state, job.token, job.node_id = JobState.RUNNING, token, node_id
        job.lease_ms = self._lease_end(job, now)
        job.attempt += 1
        job.last_token = job.avoid_node = ""

    def _lease_end(self, job: ModelJob, now: int) -> int:
        return now + LEASE_MS + (EXCLUSIVE_MARGIN_MS if job.exclusive else 0)

    # Attempts.

    def _current(self, job_id: str, token: str) -> bool:
        job = self.jobs[job_id]
        return job.state is JobState.RUNNING and job.token == token

    def started(self, job_id: str, token: str, now: int) -> bool:
        job = self.jobs[job_id]
        if not self._current(job_id, token):
            return False
        if job.started_ms is None:
            job.started_ms, job.ran = now, True
            group = self.jobs.get(job.group)
            if group is not None and group.state is JobState.QUEUED:
                group.state, group.wait_reason = JobState.RUNNING, WaitReason.NONE
        return True

    def renew(self, job_id: str, token: str, now: int) -> bool:
        job = self.jobs[job_id]
        if not self._current(job_id, token) or job.stopping:
            return False
        job.lease_ms = self._lease_end(job, now)
        return True

    def complete(self, job_id: str, token: str, now: int) -> str:
        job = self.jobs[job_id]
        if job.state is JobState.SUCCEEDED and job.last_token == token:
            return "already"
        if not self._current(job_id, token) and not (job.state is JobState.QUEUED and job.last_token == token):
            return "refused"
        # Where nobody said that it had begun, it begins with its end.
        self.started(job_id, token, now)
        self._end(job, JobState.SUCCEEDED, now)
        return "ok"

    def _requeue(self, job: ModelJob, due_ms: int | None) -> None:
        job.state = JobState.QUEUED
        job.wait_reason = WaitReason.BACKOFF if due_ms is not None else WaitReason.NONE
        job.due_ms = due_ms
        job.token, job.node_id, job.started_ms, job.stopping = "", "", None, ""

    def _avoid(self, job: ModelJob, node_id: str, now: int) -> None:
        job.avoid_node, job.avoid_until_ms = node_id, now + AVOID_MS

    def _attempt_failed(self, job: ModelJob, retryable: bool, due_ms: int | None, now: int) -> None:
        job.failed_token = job.token
        if retryable and job.attempt - job.losses <= job.max_retries:
            job.last_token = ""
            self._avoid(job, job.node_id, now)
            self._requeue(job, due_ms)
        else:
            self._end(job, JobState.FAILED, now)

    def fail(self, job_id: str, token: str, retryable: bool, backoff_ms: int, now: int) -> str:
        job = self.jobs[job_id]
        if job.failed_token == token:
            return "already"
        if not self._current(job_id, token):
            return "refused"
        self._attempt_failed(job, retryable, now + backoff_ms if backoff_ms else None, now)
        return "ok"

    def _give_back(self, job: ModelJob) -> None:
        job.attempt -= 1
        job.last_token = job.token
        self._requeue(job, None)

    def release(self, job_id: str, token: str, stopped: bool) -> bool:
        job = self.jobs[job_id]
        if job.state is JobState.QUEUED and job.last_token == token:
            return True
        if not self._current(job_id, token):
            return False
        if job.exclusive and not stopped:
            job.stopping = job.stopping or "released"
        else:
            self._give_back(job)
        return True

    def _lost(self, job: ModelJob, now: int) -> None:
        node_id = job.node_id
        if job.started_ms is None:
            self._give_back(job)
        else:
            job.losses += 1
            job.nodes |= {job.node_id}
            if (job.losses >= 3 and len(job.nodes) >= 2) or job.losses >= 9:
                self._end(job, JobState.FAILED, now)
                return
            job.last_token = job.token
            self._requeue(job, None)
        job.failed_token = ""
        self._avoid(job, node_id, now)

    def lose_session(self, node_id: str, now: int) -> None:
        for job in self.jobs.values():
            if job.state is JobState.RUNNING and job.node_id == node_id and not job.exclusive and not job.children:
                self._lost(job, now)

    # What callers ask for.

    def cancel(self, job_id: str, now: int) -> bool:
        job = self.jobs[job_id]
        if job.state is JobState.CANCELLED:
            return True
        if job.state.ended:
            return False
        self._cancel(job, now)
        return True

    def retry(self, job_id: str, now: int) -> bool:
        job = self.jobs[job_id]
        group = self.jobs.get(job.group)
        if job.state is not JobState.FAILED:
            return False
        if group is not None and group.state in {JobState.CANCELLED, JobState.SUCCEEDED}:
            return False
        revived = [group] if group is not None and group.state is JobState.FAILED else []
        revived.append(job)
        revived += [
            self.jobs[child]
            for child in job.children
            if self.jobs[child].state in {JobState.FAILED, JobState.CANCELLED}
        ]
        doomed = [one for one in revived if self._revive(one, now)]
        for one in doomed:
            self._cancel(one, now)
        return True

    def _revive(self, job: ModelJob, now: int) -> bool:
        """Queues it again; whether it has to be cancelled at once."""
        self._requeue(job, None)
        job.generation += 1
        job.attempt, job.losses, job.nodes, job.ran = 0, 0, frozenset(), False
        job.last_token, job.failed_token = "", ""
        job.enqueued_ms = job.ttl_from_ms = now
        job.unmet = {parent for parent in job.unmet if self.jobs[parent].state is not JobState.SUCCEEDED}
        if job.unmet:
            job.wait_reason = WaitReason.DEPENDENCY
        return any(self.jobs[parent].state.ended for parent in job.unmet)

    # Time.

    def reap(self, now: int) -> None:
        """The four sweeps, in the store's order."""
        jobs = [job for job in self.jobs.values() if not job.children]
        for job in jobs:
            if job.state is JobState.RUNNING and job.lease_ms <= now:
                if job.stopping == "overdue":
                    self._attempt_failed(job, True, now + BACKOFF_MS, now)
                elif job.stopping:
                    self._give_back(job)
                else:
                    self._lost(job, now)
        for job in jobs:
            overdue = job.started_ms is not None and job.started_ms + job.timeout_ms <= now - MARGIN_MS
            if job.state is JobState.RUNNING and overdue:
                if job.exclusive:
                    job.stopping = "overdue"
                else:
                    self._attempt_failed(job, True, now + BACKOFF_MS, now)
        for job in sorted(jobs, key=lambda one: (one.ttl_from_ms + one.queue_ttl_ms, one.job_id)):
            if job.state is JobState.QUEUED and not job.ran and job.ttl_from_ms + job.queue_ttl_ms <= now:
                self._end(job, JobState.FAILED, now)
        for job in self.jobs.values():
            promoted = job.wait_reason in {WaitReason.SCHEDULED, WaitReason.BACKOFF}
            if promoted and job.due_ms is not None and job.due_ms <= now:
                job.wait_reason, job.due_ms = WaitReason.NONE, None
