"""What the queue did in the last hour: rates, waits and runs, in bounded memory."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from fleet.v1 import queue_pb2

from fleet_server.domain.job import JobRecord, JobState

WINDOW_SECONDS = 3_600
_SLICE_MS = 60_000
_STEP = math.log(1.05)
_LANES_KEPT = 1_024
_RUNS_KEPT = 32
_FIRST_VERSION = 1
_ENDED = frozenset(state.value for state in JobState if state.ended)


@dataclass(slots=True)
class _Slice:
    """One minute. Durations are counted in classes that are 5 % wide, which is as exact as percentiles need be."""

    submitted: int = 0
    ended: int = 0
    waits: Counter[int] = field(default_factory=Counter)
    runs: Counter[int] = field(default_factory=Counter)


class Rates:
    """Counts changes of jobs. Fed with every event of the stream, once each."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._slices: dict[int, _Slice] = {}
        self._runs: OrderedDict[str, deque[int]] = OrderedDict()

    def note(self, record: JobRecord) -> None:
        """A job as it is after a change; counted at the time of the change, which may be a while ago.

        Of groups their images count, which are what runs.
        """
        if not record.children:
            times = record.started_ms, record.enqueued_ms, record.ended_ms or 0
            self._note(record.version, record.state.value, record.updated_ms, *times, record.lane_id)

    def note_event(self, raw: Mapping[bytes, bytes]) -> None:
        """As `note`, of the fields of an event: nothing is read but what is counted."""
        if b"kn" in raw:
            return
        started = raw.get(b"sa")
        times = None if started is None else int(started), int(raw[b"en"]), int(raw.get(b"ee", b"0"))
        lane_id = raw[b"ki"].rpartition(b"\0")[2].decode()
        if b"sd" in raw:
            self._note(0, "running", int(raw[b"up"]), *times, lane_id)
        self._note(int(raw[b"ve"]), raw[b"st"].decode(), int(raw[b"up"]), *times, lane_id)

    def _note(
        self, version: int, state: str, at_ms: int, started: int | None, enqueued: int, ended: int, lane_id: str
    ) -> None:
        now = self._slice(at_ms)
        if version == _FIRST_VERSION:
            now.submitted += 1
        elif state == "running" and started is not None:
            now.waits[_class(started - enqueued)] += 1
        elif state in _ENDED:
            now.ended += 1
            if state == "succeeded" and started is not None and ended:
                took = ended - started
                now.runs[_class(took)] += 1
                self._note_lane(lane_id, took)

    def run_ms(self, lane_id: str) -> float | None:
        """How long a job of the lane takes from start to end, by its latest; None before the first."""
        runs = self._runs.get(lane_id)
        return sum(runs) / len(runs) if runs else None

    def lanes(self) -> list[str]:
        """The lanes of which runs are known."""
        return list(self._runs)

    def fill(self, stats: queue_pb2.GetStatsResponse) -> None:
        """Sets the window, its rates and its percentiles; null where nothing happened."""
        parts = self._recent()
        stats.window_seconds = WINDOW_SECONDS
        submitted = sum(part.submitted for part in parts)
        ended = sum(part.ended for part in parts)
        if submitted:
            stats.submitted_per_second = submitted / WINDOW_SECONDS
        if ended:
            stats.ended_per_second = ended / WINDOW_SECONDS
        stats.wait_seconds.CopyFrom(_percentiles([part.waits for part in parts]))
        stats.run_seconds.CopyFrom(_percentiles([part.runs for part in parts]))

    def _note_lane(self, lane_id: str, took: int) -> None:
        self._runs.setdefault(lane_id, deque(maxlen=_RUNS_KEPT)).append(took)
        self._runs.move_to_end(lane_id)
        if len(self._runs) > _LANES_KEPT:
            self._runs.popitem(last=False)

    def _slice(self, at_ms: int) -> _Slice:
        start = at_ms // _SLICE_MS * _SLICE_MS
        found = self._slices.get(start)
        if found is None:
            self._recent()
            found = self._slices[start] = _Slice()
        return found

    def _recent(self) -> list[_Slice]:
        """The slices of the window; older ones are forgotten."""
        oldest = self._clock() - WINDOW_SECONDS * 1000
        for start in [start for start in self._slices if start <= oldest]:
            del self._slices[start]
        return list(self._slices.values())


def _class(ms: int) -> int:
    return round(math.log(max(1, ms)) / _STEP)


def _percentiles(parts: list[Counter[int]]) -> queue_pb2.Percentiles:
    counts: Counter[int] = Counter()
    for part in parts:
        counts.update(part)
    total = counts.total()
    found = queue_pb2.Percentiles()
    if not total:
        return found
    for name, share in (("p50", 0.50), ("p95", 0.95), ("p99", 0.99)):
        left = math.ceil(total * share)
        for number in sorted(counts):
            left -= counts[number]
            if left <= 0:
                setattr(found, name, round(math.exp(number * _STEP) / 1000, 3))
                break
    return found
