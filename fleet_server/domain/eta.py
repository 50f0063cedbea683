"""When waiting work should be done: estimates from depth, slots and measured speeds. Pure.

None stands for what cannot be said: nothing like it has run yet, or nobody could run it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fleet_server.domain.feasibility import Feasibility, feasible
from fleet_server.domain.job import Lane
from fleet_server.domain.node import NodeView
from fleet_server.domain.placement import load_seconds
from fleet_server.domain.speeds import Timing


def start_seconds(node: NodeView, now_ms: int) -> float | None:
    """Until the node could begin another job; None if that is not known."""
    if node.slots_free > 0:
        return 0.0
    if not node.free_at_ms:
        return None
    return max(0, node.free_at_ms[0] - now_ms) / 1000


def pace(nodes: Iterable[NodeView], lane: Lane, timing: Timing, verdicts: Feasibility | None = None) -> float | None:
    """Jobs of the lane that the fleet would end in a second if it did nothing else."""
    judge = verdicts.refusal if verdicts is not None else feasible
    rate = 0.0
    for node in nodes:
        if judge(node, lane) is None:
            run = timing.run_seconds(node, lane)
            if run:
                rate += max(1, node.slots) / run
    return rate or None


def lane_eta(
    nodes: Sequence[NodeView],
    lane: Lane,
    jobs: int,
    timing: Timing,
    *,
    verdicts: Feasibility | None = None,
) -> float | None:
    """Seconds until so many jobs of a lane, waiting and running, have ended: at the lane's pace, with one load."""
    rate = pace(nodes, lane, timing, verdicts)
    if rate is None or not jobs:
        return None
    judge = verdicts.refusal if verdicts is not None else feasible
    load = min((load_seconds(node, lane, timing) for node in nodes if judge(node, lane) is None), default=0.0)
    return load + jobs / rate


def queue_eta(lanes: Iterable[tuple[Sequence[str], float | None]]) -> float | None:
    """Seconds until all lanes are done, each given as the nodes that can run it and its own estimate.

    Lanes that share nodes wait for one another, others do not; None where a lane's estimate is.
    """
    groups: list[tuple[set[str], float]] = []
    for nodes, eta in lanes:
        if eta is None:
            return None
        joined, seconds = set(nodes), eta
        apart = []
        for others, more in groups:
            if joined & others:
                joined |= others
                seconds += more
            else:
                apart.append((others, more))
        groups = [*apart, (joined, seconds)]
    return max((seconds for _, seconds in groups), default=None)


def ahead_seconds(
    nodes: Sequence[NodeView], lane: Lane, ahead: int, timing: Timing, verdicts: Feasibility | None = None
) -> float | None:
    """How long the jobs before one in its cluster keep the nodes that could run it, were they of its kind."""
    if not ahead:
        return 0.0
    rate = pace(nodes, lane, timing, verdicts)
    return None if rate is None else ahead / rate
