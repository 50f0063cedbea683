"""What a simulation saw: connections, placements, ends, and each attempt that ran where it should not have.

Times are of the monotonic clock, in real seconds. Delivery of a job is at least once: a node that was cut off for
longer than a lease goes on with what another node has by then. Those overlaps are counted apart (`overlaps_away`); an
overlap of two connected nodes, or two successes of one generation, is a fault of the server.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fleet.v1 import node_pb2, types_pb2

from fleet_agent.simulation.profiles import NodePlan

_OK = node_pb2.CompleteOutcome.COMPLETE_OUTCOME_OK
_REFUSED = node_pb2.CompleteOutcome.COMPLETE_OUTCOME_REFUSED
Record = Callable[[dict[str, Any]], None]


@dataclass(slots=True)
class Running:
    """An attempt on a node."""

    job_id: str
    token: str
    node_id: str
    generation: int
    model: str


@dataclass(slots=True)
class ClassTally:
    """What one kind of GPU did, in modelled seconds."""

    slots: int = 0
    nodes: int = 0
    busy: float = 0.0
    loading: float = 0.0
    swaps: int = 0
    jobs: int = 0


@dataclass(slots=True)
class Tally:
    """Counters of one simulation; one writer, the loop's thread."""

    record: Record | None = None
    lease_seconds: float = 30.0
    nodes: int = 0
    all_online: asyncio.Event = field(default_factory=asyncio.Event)
    someone_offline: asyncio.Event = field(default_factory=asyncio.Event)
    submitted: int = 0
    refused_submits: int = 0
    assigns: int = 0
    done: int = 0
    failed_attempts: int = 0
    failed_jobs: int = 0
    already: int = 0
    refused_ends: int = 0
    drops: int = 0
    healthy_kills: int = 0
    """Attempts stopped on the server's word, uncancelled, on a node that was not away for as long as a lease lasts."""
    cancels: int = 0
    crashes: int = 0
    beats: int = 0
    overlaps: int = 0
    overlaps_away: int = 0
    kills: int = 0
    rejects: int = 0
    done_twice: int = 0
    dials: list[float] = field(default_factory=list)
    welcomes: list[float] = field(default_factory=list)
    dispatch: list[float] = field(default_factory=list)
    """From the submit's call to the Assign of the job's first attempt."""
    turnaround: list[float] = field(default_factory=list)
    """From the submit's call to the CompleteAck."""
    by_class: dict[str, ClassTally] = field(default_factory=dict)
    placements: Counter[tuple[str, str]] = field(default_factory=Counter)
    doubtful: set[str] = field(default_factory=set)
    """Jobs of which an attempt failed, or ended without an answer: what became of them is the server's to say."""
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=200_000))
    _offline_at: dict[str, float] = field(default_factory=dict)
    _online: set[str] = field(default_factory=set)
    _running: dict[str, Running] = field(default_factory=dict)
    _tokens_of: dict[tuple[str, int], set[str]] = field(default_factory=dict)
    _called: dict[str, float] = field(default_factory=dict)
    _seen: dict[str, float] = field(default_factory=dict)
    _early_ends: dict[str, float] = field(default_factory=dict)
    """When jobs ended whose submit has had no reply yet: the server may die in between."""
    _assigned_once: set[str] = field(default_factory=set)
    _succeeded: dict[str, tuple[str, int]] = field(default_factory=dict)
    _done: set[tuple[str, int]] = field(default_factory=set)
    _unwanted: set[str] = field(default_factory=set)

    @property
    def nodes_online(self) -> int:
        return len(self._online)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def unfinished(self) -> int:
        """Jobs that were taken and whose end no agent has heard of."""
        return len(self._called)

    def planned(self, plan: NodePlan) -> None:
        """A node belongs to the fleet."""
        tally = self.by_class.setdefault(plan.gpu.name, ClassTally())
        self.nodes += 1
        tally.nodes += 1
        tally.slots += plan.gpu.slots

    # Connections.

    def dialled(self, at: float) -> None:
        self.dials.append(at)

    def online(self, node_id: str, at: float) -> None:
        self._online.add(node_id)
        if len(self._online) == self.nodes:
            self.all_online.set()
            self.someone_offline.clear()
        self.welcomes.append(at)
        self._note("online", node_id=node_id, at=at)

    def offline(self, node_id: str, at: float) -> None:
        if node_id in self._online:
            self._offline_at[node_id] = at
            self._online.discard(node_id)
            self.all_online.clear()
            self.someone_offline.set()
            self._note("offline", node_id=node_id)

    def crashed(self, node_id: str) -> None:
        """All that the node ran is lost, rightly."""
        self.crashes += 1
        for token in [token for token, one in self._running.items() if one.node_id == node_id]:
            self._end(token)
        self._note("crash", node_id=node_id)

    # Jobs.

    def accepted(self, job_id: str, called_at: float) -> None:
        """The server took a job that was sent at that time."""
        self.submitted += 1
        ended = self._early_ends.pop(job_id, None)
        if ended is None:
            self._called[job_id] = called_at
        else:
            self.turnaround.append(ended - called_at)
        seen = self._seen.pop(job_id, None)
        if seen is not None:
            self.dispatch.append(seen - called_at)

    def forgotten(self, token: str) -> None:
        """An agent dropped an end that is no use to the server, which may have taken it and died before its answer."""
        running = self._running.get(token)
        if running is not None:
            self.doubtful.add(running.job_id)
            self._end(token)

    def found_succeeded(self, job_id: str, generation: int, at: float) -> None:
        """The server says so; what an agent has yet to hear of is left to that."""
        key = (job_id, generation)
        if key not in self._done and key not in self._tokens_of:
            self._settled(job_id, key, at)

    def gave_up(self, job_id: str) -> None:
        """The job failed for good."""
        self.failed_jobs += 1
        self._called.pop(job_id, None)

    def assigned(self, assign: node_pb2.Assign, node_id: str, at: float) -> None:
        """An Assign has come; one that comes again is the same attempt."""
        if assign.token in self._running:
            return
        self.assigns += 1
        key = (assign.job_id, assign.generation)
        others = self._tokens_of.setdefault(key, set())
        for other in others - self._unwanted:
            away = self._running[other].node_id not in self._online
            self.overlaps_away += away
            self.overlaps += not away
            self._note("overlap", job_id=assign.job_id, node_id=node_id, other=self._running[other].node_id, away=away)
        others.add(assign.token)
        self._running[assign.token] = Running(assign.job_id, assign.token, node_id, assign.generation, assign.model)
        if assign.job_id not in self._assigned_once:
            self._assigned_once.add(assign.job_id)
            called = self._called.get(assign.job_id)
            if called is None:
                # The reply to its submit is still on its way.
                self._seen[assign.job_id] = at
            else:
                self.dispatch.append(at - called)
        word = types_pb2.JobType.Name(assign.job_type).removeprefix("JOB_TYPE_").lower()
        self.placements[assign.model or word, node_id] += 1
        self._note(
            "assign", job_id=assign.job_id, node_id=node_id, token=assign.token, model=assign.model or word, at=at,
            generation=assign.generation, attempt=assign.attempt,
        )  # fmt: skip

    def rejected(self, token: str) -> None:
        """The agent did not take an Assign."""
        self.rejects += 1
        self._end(token)

    def worked(self, plan: NodePlan, token: str, running: float, loading: float, succeeded: bool) -> None:
        """A slot of the plan's class was busy with an attempt for so long, in modelled seconds."""
        tally = self.by_class[plan.gpu.name]
        tally.busy += running
        tally.loading += loading
        tally.swaps += loading > 0
        tally.jobs += succeeded
        attempt = self._running.get(token)
        if succeeded and attempt is not None:
            self._succeeded[token] = (attempt.job_id, attempt.generation)

    def left(self, token: str) -> None:
        """An attempt is not in its slot any more, and no end of it will be told."""
        self._end(token)

    def acknowledged(self, ack: node_pb2.CompleteAck, node_id: str, at: float) -> None:
        """The server said what became of an end."""
        key = self._succeeded.pop(ack.token, None)
        if ack.outcome == _REFUSED:
            self.refused_ends += 1
        elif ack.outcome != _OK:
            self.already += 1
        if ack.outcome != _REFUSED:
            if key is None:
                self.failed_attempts += 1
                self.doubtful.add(ack.job_id)
            else:
                self._settled(ack.job_id, key, at)
        self._end(ack.token)
        self._note("end", job_id=ack.job_id, node_id=node_id, token=ack.token, outcome=int(ack.outcome), at=at)

    def _settled(self, job_id: str, key: tuple[str, int], at: float) -> None:
        self.done += 1
        self.ends.append(at)
        self.done_twice += key in self._done
        self._done.add(key)
        called = self._called.pop(job_id, None)
        if called is None:
            self._early_ends[job_id] = at
        else:
            self.turnaround.append(at - called)

    def killed(self, tokens: Iterable[str], node_id: str, at: float) -> None:
        """A Welcome says that these are not the agent's any more."""
        away = at - self._offline_at.get(node_id, at)
        for token in tokens:
            if token in self._running:
                self.kills += 1
                self.healthy_kills += token not in self._unwanted and away < self.lease_seconds
                self._note("kill", node_id=node_id, token=token, away=away)
                self._end(token)

    def cancelled(self, token: str) -> None:
        """The server wants an attempt stopped."""
        if token in self._running:
            self.cancels += 1
            self._unwanted.add(token)

    def dropped(self, tokens: Iterable[str], node_id: str) -> None:
        """The server's heartbeat says that these are not the agent's any more."""
        for token in tokens:
            if token in self._running:
                self.drops += 1
                self.healthy_kills += token not in self._unwanted
                self._note("drop", node_id=node_id, token=token)
                self._end(token)

    def _end(self, token: str) -> None:
        running = self._running.pop(token, None)
        self._unwanted.discard(token)
        if running is None:
            return
        key = (running.job_id, running.generation)
        others = self._tokens_of.get(key)
        if others is not None:
            others.discard(token)
            if not others:
                del self._tokens_of[key]

    def _note(self, what: str, **fields: Any) -> None:
        if self.record is not None:
            self.record({"what": what, **fields})
