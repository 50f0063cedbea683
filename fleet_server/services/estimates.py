"""When work should be done: a lane, the whole queue, one job; from what was measured, None where nothing was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fleet.v1 import types_pb2

from fleet_server.domain.eta import lane_eta, pace, queue_eta, start_seconds
from fleet_server.domain.feasibility import feasible
from fleet_server.domain.job import JobRecord, JobState, Lane
from fleet_server.domain.node import NodeStatus, NodeView
from fleet_server.domain.placement import load_seconds
from fleet_server.domain.speeds import Timing

FRESH_MS = 500
"""How long the fleet is taken for what it was: a list of jobs asks about the same few lanes again and again."""
_FIRST_PERCENT = 5
"""Before that, progress says too little of how long the rest takes."""


class SeenNodes(Protocol):
    """All nodes as dispatch sees them."""

    def nodes(self) -> list[NodeView]: ...


@dataclass(slots=True)
class _Fleet:
    """The nodes at a moment, and what was found out about lanes on them."""

    at_ms: int
    online: list[NodeView]
    lanes: dict[str, _LaneOutlook] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _LaneOutlook:
    """Who could run the lane's jobs, how many a second they would end, and how soon the best would end the next."""

    able: tuple[NodeView, ...]
    pace: float | None
    soonest: float | None


class Estimates:
    """`timing` knows what kinds of jobs took on which nodes, `usual_ms` what those of a lane took of late."""

    def __init__(
        self,
        seen: SeenNodes,
        timing: Timing,
        usual_ms: Callable[[str], float | None],
        *,
        clock: Callable[[], int],
        fresh_ms: int = FRESH_MS,
    ) -> None:
        self._seen = seen
        self._timing = timing
        self._usual_ms = usual_ms
        self._clock = clock
        self._fresh_ms = fresh_ms
        self._fleet: _Fleet | None = None

    def lane(self, lane: Lane, jobs: int) -> float | None:
        """Seconds until so many jobs of the lane, waiting and running, have ended."""
        able = self._outlook(lane).able
        found = lane_eta(able, lane, jobs, self._timing)
        if found is not None:
            return found
        usual, slots = self._usual_ms(lane.lane_id), sum(node.slots for node in able)
        return None if usual is None or not slots or not jobs else jobs * usual / slots / 1000

    def queue(self, lanes: Iterable[tuple[Lane, float | None]]) -> float | None:
        """Seconds until all of these lanes are done, each given with its own estimate."""
        return queue_eta([([node.node_id for node in self._outlook(lane).able], eta) for lane, eta in lanes])

    def queued(self, lane: Lane, position: int) -> float | None:
        """Seconds until a job in line has ended: what is before it, a free slot, the load, its own run."""
        outlook = self._outlook(lane)
        if outlook.soonest is None or (outlook.pace is None and position > 1):
            return None
        return outlook.soonest + ((position - 1) / outlook.pace if outlook.pace is not None else 0.0)

    def running(self, record: JobRecord, tick: types_pb2.JobProgress | None, lane: Lane) -> float | None:
        """Seconds until a running job has ended: by its progress, else by what its kind takes on that node."""
        if record.state is not JobState.RUNNING or record.started_ms is None:
            return None
        passed = max(0, self._clock() - record.started_ms) / 1000
        done = max(record.progress, tick.progress if tick is not None else 0)
        if _FIRST_PERCENT <= done < 100:
            return passed * (100 - done) / done
        node = next((node for node in self._outlook(lane).able if node.node_id == record.node_id), None)
        run = self._timing.run_seconds(node, lane) if node is not None else None
        return None if run is None else max(0.0, run - passed)

    def _outlook(self, lane: Lane) -> _LaneOutlook:
        fleet, now = self._fleet, self._clock()
        if fleet is None or now - fleet.at_ms > self._fresh_ms:
            online = [node for node in self._seen.nodes() if node.status is NodeStatus.ONLINE]
            fleet = self._fleet = _Fleet(now, online)
        found = fleet.lanes.get(lane.lane_id)
        if found is None:
            able = tuple(node for node in fleet.online if feasible(node, lane) is None)
            each = self._each(able, lane, now)
            found = _LaneOutlook(able, pace(able, lane, self._timing), min(each, default=None))
            fleet.lanes[lane.lane_id] = found
        return found

    def _each(self, able: Sequence[NodeView], lane: Lane, now: int) -> list[float]:
        return [
            start + load_seconds(node, lane, self._timing) + run
            for node in able
            if (run := self._timing.run_seconds(node, lane)) is not None
            and (start := start_seconds(node, now)) is not None
        ]
