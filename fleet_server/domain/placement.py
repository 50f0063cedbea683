"""What a free slot should take next. Pure.

The dispatcher, the explanation of a waiting job, the dry run, the simulator and the day in virtual time ask the same
functions. Scores are seconds of urgency; their parts are bounded below what lies between two priorities (600 s), so
urgent means next on any node, and no lane is passed by for longer than that by lanes of owners who have had no more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from fleet_server.domain.feasibility import GIB, Feasibility, Refusal, Refused, feasible
from fleet_server.domain.job import BOOST_MS, Lane, Priority
from fleet_server.domain.node import NodeView
from fleet_server.domain.speeds import NoTiming, Timing

__all__ = [
    "GIB",
    "Deferral",
    "Demand",
    "Feasibility",
    "Placed",
    "Plan",
    "Ranked",
    "Refusal",
    "Refused",
    "Situation",
    "cold_seconds",
    "feasible",
    "load_seconds",
    "place",
    "rank",
]

PRESSURE_PER_JOB_SECONDS = 10.0
"""What each waiting job adds to the urgency of its lane, in seconds of waiting."""

PRESSURE_LIMIT_SECONDS = 120.0
"""The most that the number of waiting jobs adds: a long line must not starve a short one."""

SWAP_WEIGHT = 3.0
"""How many times its load seconds a lane must be more urgent before a node swaps models for it."""

KEEP_SECONDS = 60.0
"""For so long after its last use a model that no other node has in memory is worth its load seconds."""

SLOW_LIMIT_SECONDS = 30.0
"""The most that a node's speed, compared with the fleet's, adds or takes."""

FREE_LAG_JOBS = 1.0
"""An owner may be so many served jobs ahead of another before the other's lanes go first for it."""

LAG_SECONDS = 30.0
"""What each further job takes off."""

LOAD_LIMIT_SECONDS = 60.0
"""No load counts for more, however large the file."""

LORA_LOAD_SECONDS = 1.0
UNKNOWN_LOAD_SECONDS = 10.0
LOAD_BYTES_PER_SECOND = 400e6
"""How fast a model is read into memory, until it is measured."""

_NO_TIMING = NoTiming()


class Demand(Protocol):
    """A lane with what waits in it.

    `head_effective_ms` is the head's enqueue time less the boost of `head_priority`. `high_waiting`: a `high` job is in
    line, head or not. `head_owner_lag`: served jobs by which the head's owner is ahead of the owner who had least.
    """

    @property
    def lane(self) -> Lane: ...
    @property
    def waiting(self) -> int: ...
    @property
    def head_effective_ms(self) -> int | None: ...
    @property
    def head_priority(self) -> Priority | None: ...
    @property
    def oldest_enqueued_ms(self) -> int | None: ...
    @property
    def high_waiting(self) -> bool: ...
    @property
    def head_owner_lag(self) -> float: ...
    @property
    def paused(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Situation:
    """What a round looks at. `nodes` are all online ones: the busy ones are what a cold one may wait for.

    Pairs of `avoided` (node_id, lane_id) do not come together. `after_urgent` are nodes whose last job went before its
    turn because it was `high`: now the turns hold for them.
    """

    nodes: Sequence[NodeView]
    demands: Sequence[Demand]
    now_ms: int
    avoided: Collection[tuple[str, str]] = ()
    after_urgent: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class Ranked:
    """A lane that a node can run. `load_seconds` 0: all is in memory. `run_seconds` 0: not known."""

    demand: Demand
    score: float
    load_seconds: float
    run_seconds: float
    urgent: bool

    @property
    def warm(self) -> bool:
        return self.load_seconds == 0

    @property
    def finish_seconds(self) -> float:
        """From now to the end of a job that begins at once."""
        return self.load_seconds + self.run_seconds


@dataclass(frozen=True, slots=True)
class Placed:
    """One claim: a job of the lane for the node. `alone`: no other online node could run it."""

    node_id: str
    lane_id: str
    urgent: bool = False
    alone: bool = False


@dataclass(frozen=True, slots=True)
class Deferral:
    """A free node leaves a lane's head to one that will finish it sooner, until `until_ms` at most."""

    node_id: str
    lane_id: str
    until_ms: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a round does, in order."""

    placed: tuple[Placed, ...] = ()
    deferred: tuple[Deferral, ...] = ()

    @property
    def look_again_ms(self) -> int | None:
        """When the first deferral ends."""
        return min((one.until_ms for one in self.deferred), default=None)


def cold_seconds(node: NodeView, lane: Lane, timing: Timing = _NO_TIMING) -> float:
    """What the lane's model and LoRAs take to load with nothing in memory: measured, else by the file's size."""
    if not lane.model:
        return 0.0
    measured = timing.cold_seconds(node, lane.model)
    if measured is None:
        model = node.models.get(lane.model)
        size = model.size_bytes if model is not None else 0
        measured = size / LOAD_BYTES_PER_SECOND if size else UNKNOWN_LOAD_SECONDS
    return min(measured + len(lane.loras) * LORA_LOAD_SECONDS, LOAD_LIMIT_SECONDS)


def load_seconds(node: NodeView, lane: Lane, timing: Timing = _NO_TIMING) -> float:
    """What must be read into memory before the lane's jobs run there, in seconds; 0: nothing."""
    loaded = node.loaded_model(lane.model) if lane.model else None
    if loaded is None:
        return cold_seconds(node, lane, timing)
    if not lane.loras:
        return 0.0
    return sum(1 for name in lane.loras if name not in loaded.loras) * LORA_LOAD_SECONDS


def urgency(demand: Demand, now_ms: int) -> float:
    """The head's age in seconds after its boost plus the pressure of the line behind it."""
    head = demand.head_effective_ms
    age = (now_ms - head) / 1000 if head is not None else 0.0
    return age + min(demand.waiting * PRESSURE_PER_JOB_SECONDS, PRESSURE_LIMIT_SECONDS)


def rank(
    node: NodeView,
    demands: Iterable[Demand],
    now_ms: int,
    *,
    timing: Timing = _NO_TIMING,
    verdicts: Feasibility | None = None,
    copies: Counter[str] | None = None,
    turns: bool = True,
) -> list[Ranked]:
    """The lanes with waiting jobs that the node can run, the best first; ties by lane id: all replicas agree.

    `copies` counts the online nodes that have a model in memory. Without `turns` a lane with a `high` job goes before
    all others.
    """
    judge = verdicts.refusal if verdicts is not None else feasible
    able = [one for one in demands if one.waiting > 0 and not one.paused and judge(node, one.lane) is None]
    late = _lateness(able, now_ms)
    ranked = []
    for demand in able:
        load = load_seconds(node, demand.lane, timing)
        run = timing.run_seconds(node, demand.lane)
        usual = timing.usual_seconds(demand.lane) if run is not None else None
        slower = 0.0 if run is None or usual is None else run - usual
        worth = (
            urgency(demand, now_ms)
            - late.get(demand.lane.lane_id, 0.0)
            - SWAP_WEIGHT * load
            - max(-SLOW_LIMIT_SECONDS, min(slower, SLOW_LIMIT_SECONDS))
        )
        if load > 0 and copies is not None and node.loaded_model(demand.lane.model) is None:
            worth -= _kept_worth(node, copies, now_ms, timing)
        urgent = not turns and demand.high_waiting
        ranked.append(Ranked(demand, worth, load, run or 0.0, urgent))
    ranked.sort(key=lambda one: (not one.urgent, -one.score, one.demand.lane.lane_id))
    return ranked


def _lateness(able: Sequence[Demand], now_ms: int) -> dict[str, float]:
    """Seconds to take off the lanes whose heads' owners have had more than others who wait for this node.

    Such a lane counts as no older than the oldest of those whose turn it is, so that a long backlog buys nothing.
    """
    if all(demand.head_owner_lag == 0 for demand in able):
        return {}
    least: dict[str, float] = {}
    for demand in able:
        cluster = demand.lane.cluster
        least[cluster] = min(least.get(cluster, demand.head_owner_lag), demand.head_owner_lag)

    def ahead(demand: Demand) -> float:
        return demand.head_owner_lag - least[demand.lane.cluster] - FREE_LAG_JOBS

    oldest = max((_age(demand, now_ms) for demand in able if ahead(demand) <= 0), default=0.0)
    return {
        demand.lane.lane_id: max(0.0, _age(demand, now_ms) - oldest) + LAG_SECONDS * ahead(demand)
        for demand in able
        if ahead(demand) > 0
    }


def _age(demand: Demand, now_ms: int) -> float:
    """The head's age without its boost."""
    if demand.head_effective_ms is None or demand.head_priority is None:
        return 0.0
    return (now_ms - demand.head_effective_ms - BOOST_MS[demand.head_priority]) / 1000


def _kept_worth(node: NodeView, copies: Counter[str], now_ms: int, timing: Timing) -> float:
    """What is lost with the models that a swap puts out of the node's memory: those of few nodes, used just now."""
    worth = 0.0
    for loaded in node.loaded:
        recent = 1 - (now_ms - loaded.used_ms) / 1000 / KEEP_SECONDS
        if recent > 0:
            cost = timing.cold_seconds(node, loaded.name)
            worth = max(worth, (UNKNOWN_LOAD_SECONDS if cost is None else cost) * recent / max(1, copies[loaded.name]))
    return min(worth, LOAD_LIMIT_SECONDS)


@dataclass(slots=True)
class _Round:
    """What a round has done so far."""

    situation: Situation
    timing: Timing
    verdicts: Feasibility
    online: list[NodeView]
    room: dict[str, int]
    left: dict[str, int]
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds of work that this round has put on nodes or counts on them for, divided by their slots."""
    deferred: list[Deferral] = field(default_factory=list)
    least_deferred: dict[str, float] = field(default_factory=dict)

    def take(self, node: NodeView, ranked: Ranked) -> None:
        self.room[node.node_id] -= 1
        self.left[ranked.demand.lane.lane_id] -= 1
        seconds = ranked.finish_seconds / max(1, node.slots)
        self.busy[node.node_id] = self.busy.get(node.node_id, 0.0) + seconds

    def defers(self, node: NodeView, ranked: Ranked) -> bool:
        """Whether others finish all that waits in the lane before this node would finish one job of it.

        Only a head that has not waited for the node's cold-load time yet is left to others, so that no GPU idles while
        a job that it can run waits longer than that.
        """
        lane = ranked.demand.lane
        oldest = ranked.demand.oldest_enqueued_ms
        if oldest is None:
            return False
        until = oldest + int(cold_seconds(node, lane, self.timing) * 1000)
        own = ranked.finish_seconds
        if self.situation.now_ms >= until or own <= 0:
            return False
        known = self.least_deferred.get(lane.lane_id)
        if (known is None or own < known) and not self._others_finish(node, lane, own):
            return False
        self.least_deferred[lane.lane_id] = own if known is None else min(own, known)
        self.deferred.append(Deferral(node.node_id, lane.lane_id, until))
        return True

    def _others_finish(self, node: NodeView, lane: Lane, own: float) -> bool:
        left = self.left[lane.lane_id]
        for other in self.online:
            if other is node or self.verdicts.refusal(other, lane) is not None:
                continue
            if (other.node_id, lane.lane_id) in self.situation.avoided:
                continue
            run = self.timing.run_seconds(other, lane) or 0.0
            start = self._free_in(other)
            if start is None:
                continue
            first = start + load_seconds(other, lane, self.timing) + run
            if first < own:
                # Where a run's length is not known one job is all that is counted on.
                left -= 1 + int((own - first) / run) if run > 0 else 1
                if left <= 0:
                    return True
        return False

    def _free_in(self, node: NodeView) -> float | None:
        """Seconds until the node could begin another job; None: not known."""
        busy = self.busy.get(node.node_id, 0.0)
        if self.room.get(node.node_id, 0) > 0:
            return 0.0
        if node.free_at_ms:
            return max(0, node.free_at_ms[0] - self.situation.now_ms) / 1000 + busy
        return busy or None


def place(situation: Situation, *, timing: Timing = _NO_TIMING, verdicts: Feasibility | None = None) -> Plan:
    """Fills free slots, never more than a node's free slots or a lane's jobs.

    The most wanted pair of all goes first, so a warm node takes a lane before a cold one does; nodes that want a lane
    alike share its jobs evenly, the emptiest first. A node that others would be quicker than leaves a young head alone.
    """
    verdicts = verdicts if verdicts is not None else Feasibility()
    online = [node for node in situation.nodes if node.online]
    open_nodes = {node.node_id: node for node in online if node.slots_free > 0}
    demands = [one for one in situation.demands if one.waiting > 0 and not one.paused]
    if not open_nodes or not demands:
        return Plan()
    now_ms = situation.now_ms
    copies = Counter(loaded.name for node in online for loaded in node.loaded)
    at = _Round(
        situation,
        timing,
        verdicts,
        online,
        {node_id: node.slots_free for node_id, node in open_nodes.items()},
        {one.lane.lane_id: one.waiting for one in demands},
    )
    pairs: list[tuple[Ranked, str]] = []
    for node_id, node in open_nodes.items():
        turns = node_id in situation.after_urgent
        ranked = rank(node, demands, now_ms, timing=timing, verdicts=verdicts, copies=copies, turns=turns)
        pairs += [(one, node_id) for one in ranked if (node_id, one.demand.lane.lane_id) not in situation.avoided]
    pairs.sort(key=lambda pair: (*_want(pair), -at.room[pair[1]], pair[1]))
    placed: list[Placed] = []
    for (_, _, _, lane_id), alike in groupby(pairs, key=_want):
        takers = list(alike)
        while takers and at.left[lane_id] > 0:
            still = []
            for ranked_one, node_id in takers:
                node = open_nodes[node_id]
                if at.left[lane_id] <= 0 or at.room[node_id] <= 0 or at.defers(node, ranked_one):
                    continue
                at.take(node, ranked_one)
                placed.append(Placed(node_id, lane_id, ranked_one.urgent))
                still.append((ranked_one, node_id))
            takers = still
    whole = [_with_company(one, at) for one in placed]
    return Plan(tuple(whole), tuple(at.deferred))


def _with_company(placed: Placed, at: _Round) -> Placed:
    lane = next(one.lane for one in at.situation.demands if one.lane.lane_id == placed.lane_id)
    for other in at.online:
        if other.node_id != placed.node_id and at.verdicts.refusal(other, lane) is None:
            return placed
    return Placed(placed.node_id, placed.lane_id, placed.urgent, alone=True)


def _want(pair: tuple[Ranked, str]) -> tuple[bool, float, float, str]:
    ranked = pair[0]
    return not ranked.urgent, -ranked.score, ranked.finish_seconds, ranked.demand.lane.lane_id
