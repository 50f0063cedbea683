"""What this replica believes of the lanes between two looks at the store: the last look, and what was submitted since.

A belief that is wrong costs a claim that comes back empty, never more: the store's script alone gives jobs away.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fleet_server.domain.job import BOOST_MS, Lane, NewJob, Priority
from fleet_server.store import LaneView

_RIDES_BYTES = 16_384
"""A larger job does not hold up claims: it takes the other connection."""


def at_once(jobs: Sequence[NewJob]) -> bool:
    """Whether jobs of a submit are in line from its beginning: none waits for a time or for other jobs."""
    return all(job.schedule_ms is None and not job.after for job in jobs)


def may_ride(jobs: Sequence[NewJob]) -> bool:
    """Whether the claim of what is submitted may travel with the submit: for one small job that is in line at once."""
    return len(jobs) == 1 and len(jobs[0].spec) <= _RIDES_BYTES and at_once(jobs)


@dataclass(frozen=True, slots=True)
class Belief:
    """Lanes with waiting jobs. `sure`: nothing is known to have happened since the store said so."""

    lanes: Sequence[LaneView]
    sure: bool


class Outlook:
    """Keeps the lanes as they were seen last. A look is good for `fresh_seconds`: other replicas submit too."""

    def __init__(self, fresh_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._fresh_seconds = fresh_seconds
        self._clock = clock
        self._lanes: Sequence[LaneView] | None = None
        self._looked = 0.0
        self._used = False
        self._news: list[tuple[Lane, Priority, int]] = []

    def looked(self, lanes: Sequence[LaneView]) -> None:
        """The store says so now."""
        self._lanes = lanes
        self._looked = self._clock()
        self._used = False

    def aged(self) -> None:
        """Something happened that may have changed the lanes."""
        self._used = True

    def doubt(self) -> None:
        """Something changed of which only the store knows."""
        self._lanes = None

    def expect(self, job: NewJob, now_ms: int) -> None:
        """The job may be in line now."""
        self._news.append((job.lane, job.priority, now_ms))

    def take(self) -> Belief | None:
        """What to plan with; None: look at the store first.

        Never a guess of whose turn it is: what comes new into another line than those that wait, or before their
        heads, is left to the store.
        """
        news, self._news = self._news, []
        seen, self._lanes = self._lanes, None
        if seen is None or self._clock() - self._looked >= self._fresh_seconds:
            return None
        lanes = {view.lane.lane_id: view for view in seen}
        more: Counter[str] = Counter()
        for lane, priority, at_ms in news:
            known = lanes.get(lane.lane_id)
            if known is None and not lanes:
                lanes[lane.lane_id] = _lone(lane, priority, at_ms)
            elif known is not None and (known.high_waiting or priority is not Priority.HIGH):
                more[lane.lane_id] += 1
            else:
                return None
        if not lanes:
            return None
        for lane_id, count in more.items():
            lanes[lane_id] = replace(lanes[lane_id], waiting=lanes[lane_id].waiting + count)
        sure = not news and not self._used
        self._lanes, self._used = tuple(lanes.values()), True
        return Belief(self._lanes, sure)


def _lone(lane: Lane, priority: Priority, at_ms: int) -> LaneView:
    return LaneView(
        lane,
        waiting=1,
        running=0,
        head_priority=priority,
        head_effective_ms=at_ms - BOOST_MS[priority],
        oldest_enqueued_ms=at_ms,
        high_waiting=priority is Priority.HIGH,
    )
