"""Nodes, lanes and rounds for the tests of placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st

from fleet_server.domain.job import BOOST_MS, Lane, Priority
from fleet_server.domain.node import LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.domain.placement import (
    Demand,
    Plan,
    Situation,
    place,
    rank,
)
from fleet_server.domain.speeds import SpeedBook, Unit, Work

NOW = 1_763_805_600_000
LANE = Lane("l1", "vision", "image_gen", "sketch")
NODE = NodeView(
    "agx0",
    NodeStatus.ONLINE,
    clusters=frozenset({"vision"}),
    job_types=frozenset({"image_gen"}),
    engines=frozenset({"sketch"}),
    labels={"zone": "a"},
    slots=1,
    slots_free=1,
    models={
        "sketch": ModelView("sketch", size_bytes=4_000_000_000, engine="sketch"),
        "big": ModelView("big", size_bytes=8_000_000_000, engine="sketch"),
        "ink": ModelView("ink", kind="lora"),
    },
)


@dataclass(frozen=True)
class Waiting:
    lane: Lane
    waiting: int = 1
    head_effective_ms: int | None = NOW
    head_priority: Priority | None = Priority.NORMAL
    head_owner_lag: float = 0.0
    paused: bool = False

    @property
    def oldest_enqueued_ms(self) -> int | None:
        if self.head_effective_ms is None or self.head_priority is None:
            return None
        return self.head_effective_ms + BOOST_MS[self.head_priority]

    @property
    def high_waiting(self) -> bool:
        return self.head_priority is Priority.HIGH


def placed(
    nodes: Sequence[NodeView], demands: Sequence[Demand], now_ms: int = NOW + 60_000, **more: Any
) -> list[tuple[str, str]]:
    """What a round gives out, with heads that have waited for a minute: nobody leaves them to others."""
    plan = place(Situation(nodes, demands, now_ms, **more))
    return [(one.node_id, one.lane_id) for one in plan.placed]


def lanes_of(node: NodeView, *demands: Demand) -> list[str]:
    return [one.demand.lane.lane_id for one in rank(node, demands, NOW)]


NAMES = st.sampled_from(["sketch", "big", "ink", "other", ""])
DEMANDS = st.lists(
    st.builds(
        Waiting,
        st.builds(
            Lane,
            st.integers(0, 30).map(str),
            st.sampled_from(["vision", "lab"]),
            st.just("image_gen"),
            NAMES,
            st.lists(st.sampled_from(["ink", "other"]), unique=True, max_size=2).map(tuple),
        ),
        st.integers(0, 1_000_000),
        st.integers(NOW - 10**9, NOW + 10**6),
    ),
    unique_by=lambda demand: demand.lane.lane_id,
    max_size=12,
)
NODES = st.lists(
    st.builds(
        lambda name, status, free, loaded: replace(
            NODE,
            node_id=f"n{name}",
            status=status,
            slots_free=free,
            loaded=tuple(LoadedView(one) for one in loaded),
        ),
        st.integers(0, 20),
        st.sampled_from([NodeStatus.ONLINE, NodeStatus.ONLINE, NodeStatus.DOWN]),
        st.integers(0, 5),
        st.sets(st.sampled_from(["sketch", "big"])),
    ),
    unique_by=lambda node: node.node_id,
    max_size=6,
)


WARM = replace(NODE, node_id="warm", slots_free=0, loaded=(LoadedView("sketch"),), free_at_ms=(NOW + 5_000,))
COLD = replace(NODE, node_id="cold")


def loads(**seconds: float) -> SpeedBook:
    """Nodes that have taken so long to load the model of LANE."""
    book = SpeedBook()
    for node_id, taken in seconds.items():
        book.loaded(node_id, "sketch", taken)
    return book


def decide(nodes: Sequence[NodeView], demand: Waiting, at_ms: int, book: SpeedBook | None = None) -> Plan:
    return place(Situation(nodes, [demand], at_ms), timing=book or loads(cold=10))


def speeds(**seconds: float) -> SpeedBook:
    """Nodes that take so long for the usual job of LANE."""
    book = SpeedBook()
    work = Work(Unit.PIXEL_STEPS, 1e6)
    book.saw_job(LANE.lane_id, work)
    for node_id, taken in seconds.items():
        book.ran(node_id, "sketch", "sketch", work, taken)
    return book
