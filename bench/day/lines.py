"""The lanes of a fleet in memory, with the order of the store's claims: every second one takes a waiting `high` first,
else the oldest head after boosts; owners share the cluster by the jobs that they were given."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from bench.day.workload import DayJob
from fleet_server.domain.job import BOOST_MS, Lane, Priority

CREDIT = 32.0
"""Nobody is counted further behind the owner who is ahead of all."""


class Shares:
    """How many jobs each owner was given, counted from the level at which the owner came into line."""

    def __init__(self) -> None:
        self._levels: dict[str, float] = {}
        self._rested: dict[str, float] = {}
        self._jobs: dict[str, int] = {}

    @property
    def floor(self) -> float:
        """The lowest level that counts; 0 where nobody waits."""
        if not self._levels:
            return 0.0
        return max(min(self._levels.values()), max(self._levels.values()) - CREDIT)

    def enter(self, owner: str) -> None:
        """One more job of the owner is in line."""
        self._jobs[owner] = self._jobs.get(owner, 0) + 1
        if owner not in self._levels:
            self._levels[owner] = max(self.floor, self._rested.pop(owner, 0.0)) if self._levels else 0.0

    def given(self, owner: str) -> None:
        """A job of the owner was given to a node."""
        top = max(self._levels.values())
        self._levels[owner] = max(self._levels[owner], top - CREDIT) + 1
        self._jobs[owner] -= 1
        if not self._jobs[owner]:
            level = self._levels.pop(owner)
            if not self._levels:
                self._rested.clear()
            elif level > self.floor:
                self._rested[owner] = level
            floor = self.floor
            self._rested = {name: at for name, at in self._rested.items() if at > floor}

    def lag(self, owner: str) -> float:
        return max(0.0, self._levels[owner] - self.floor)

    def level(self, owner: str) -> float:
        return self._levels[owner]


@dataclass(frozen=True, slots=True)
class Demand:
    """A line at one moment, as dispatch reads it from the store. Times are Unix ms, which here begin at midnight."""

    lane: Lane
    waiting: int
    head_effective_ms: int | None
    head_priority: Priority | None
    oldest_enqueued_ms: int | None
    high_waiting: bool
    head_owner_lag: float
    paused: bool = False


Head = tuple[float, Priority, float]
"""Effective time, priority and raw time of the oldest job of a priority, in ms."""


class Line:
    """One lane."""

    def __init__(self, lane: Lane, shares: Shares) -> None:
        self.lane = lane
        self.waiting = 0
        self._shares = shares
        self._urgent_before = False
        self._jobs: dict[Priority, dict[str, deque[DayJob]]] = {priority: {} for priority in Priority}
        self._heads: list[Head] = []

    def add(self, job: DayJob) -> None:
        """A job comes into line."""
        self._jobs[job.priority].setdefault(job.owner, deque()).append(job)
        self.waiting += 1
        self._shares.enter(job.owner)
        self._find_heads()

    def claim(self) -> DayJob:
        """Takes the next job out of the line."""
        priority = self._heads[0][1]
        forced = self.high_waiting and not self._urgent_before
        if forced:
            priority = Priority.HIGH
        self._urgent_before = forced
        owner = self._next_owner(priority)
        owners = self._jobs[priority]
        job = owners[owner].popleft()
        if not owners[owner]:
            del owners[owner]
        self.waiting -= 1
        self._shares.given(owner)
        self._find_heads()
        return job

    @property
    def high_waiting(self) -> bool:
        return bool(self._jobs[Priority.HIGH])

    def demand(self) -> Demand:
        """The line as it is now; something waits in it."""
        effective, priority, _ = self._heads[0]
        return Demand(
            self.lane,
            self.waiting,
            int(effective),
            priority,
            int(min(head[2] for head in self._heads)),
            self.high_waiting,
            self._shares.lag(self._next_owner(priority)),
        )

    def _find_heads(self) -> None:
        self._heads = []
        for priority, owners in self._jobs.items():
            if owners:
                oldest = min(jobs[0].at for jobs in owners.values()) * 1000
                self._heads.append((oldest - BOOST_MS[priority], priority, oldest))
        self._heads.sort(key=lambda head: head[0])

    def _next_owner(self, priority: Priority) -> str:
        owners = self._jobs[priority]
        return min(owners, key=lambda owner: (self._shares.level(owner), owners[owner][0].at))
