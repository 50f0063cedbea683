"""What free slots should take next. Pure.

The dispatcher, the explanation of a waiting job, the dry run, the simulator and the day in virtual time ask the same
functions: filters (domain.feasibility), wishes of nodes (domain.ranking), and here what comes of all wishes together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby

from fleet_server.domain.feasibility import GIB, Feasibility, Refusal, Refused, feasible
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.ranking import (
    LOAD_LIMIT_SECONDS,
    NO_TIMING,
    Demand,
    Ranked,
    cold_seconds,
    load_seconds,
    rank,
)
from fleet_server.domain.speeds import Timing

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

MOST_OPEN = 64
"""So many free nodes are looked at in a round, the promising ones: the rest of a large fleet is for the next round."""

PATIENCE = 10.0
"""How many times more than it takes a load counts when nodes are compared by their ends: a swap costs others too."""


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
        if oldest is None or not lane.model:
            return False
        patience = self.timing.measured_cold_seconds(node, lane.model)
        if patience is None:
            return False
        until = oldest + int(min(patience, LOAD_LIMIT_SECONDS) * 1000)
        own = ranked.finish_seconds + PATIENCE * ranked.load_seconds
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
            first = start + (1 + PATIENCE) * load_seconds(other, lane, self.timing) + run
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


def place(situation: Situation, *, timing: Timing = NO_TIMING, verdicts: Feasibility | None = None) -> Plan:
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
    if len(open_nodes) > MOST_OPEN:
        open_nodes = _promising(open_nodes, demands, situation, timing, verdicts)
    now_ms = situation.now_ms
    holders: dict[str, list[NodeView]] = {}
    for node in online:
        for loaded in node.loaded:
            holders.setdefault(loaded.name, []).append(node)
    copies = Counter({model: len(nodes) for model, nodes in holders.items()})
    served = _served(holders, demands, verdicts)
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
        ranked = rank(
            node, demands, now_ms, timing=timing, verdicts=verdicts, copies=copies, served=served, turns=turns
        )
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
    lanes = {one.lane.lane_id: one.lane for one in demands}
    whole = [_with_company(one, lanes[one.lane_id], at) for one in placed]
    return Plan(tuple(whole), tuple(at.deferred))


def _served(
    holders: Mapping[str, Sequence[NodeView]], demands: Sequence[Demand], verdicts: Feasibility
) -> frozenset[str]:
    """The lanes whose model is in memory on a node that can run them; `holders` has the nodes of each model."""
    return frozenset(
        one.lane.lane_id
        for one in demands
        if any(verdicts.refusal(node, one.lane) is None for node in holders.get(one.lane.chief_model, ())[:MOST_OPEN])
    )


def _promising(
    open_nodes: Mapping[str, NodeView],
    demands: Sequence[Demand],
    situation: Situation,
    timing: Timing,
    verdicts: Feasibility,
) -> dict[str, NodeView]:
    """Enough nodes for what waits, the most urgent first: those with its model in memory first, and fast ones."""
    order = sorted(open_nodes.values(), key=lambda node: (-timing.factor(node), -node.slots_free, node.node_id))
    warm: dict[str, list[NodeView]] = {}
    for node in order:
        for loaded in node.loaded:
            warm.setdefault(loaded.name, []).append(node)
    kept: dict[str, NodeView] = {}
    for demand in sorted(demands, key=lambda one: (not one.high_waiting, one.head_effective_ms or 0, one.lane.lane_id)):
        lane, jobs = demand.lane, demand.waiting
        for node in chain(warm.get(lane.chief_model, ()), order):
            if jobs <= 0 or len(kept) >= MOST_OPEN:
                break
            if node.node_id in kept or (node.node_id, lane.lane_id) in situation.avoided:
                continue
            if verdicts.refusal(node, lane) is None:
                kept[node.node_id] = node
                jobs -= node.slots_free
    return kept


def _with_company(placed: Placed, lane: Lane, at: _Round) -> Placed:
    for other in at.online:
        if other.node_id != placed.node_id and at.verdicts.refusal(other, lane) is None:
            return placed
    return Placed(placed.node_id, placed.lane_id, placed.urgent, alone=True)


def _want(pair: tuple[Ranked, str]) -> tuple[bool, float, float, str]:
    ranked = pair[0]
    return not ranked.urgent, -ranked.score, ranked.finish_seconds, ranked.demand.lane.lane_id
