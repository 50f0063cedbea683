"""Placement: who may run what, and what a node wants most."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.job import BOOST_MS, Lane, Priority
from fleet_server.domain.node import LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.domain.placement import (
    GIB,
    Feasibility,
    Refused,
    feasible,
    load_seconds,
    rank,
)
from tests.unit.placing import (
    DEMANDS,
    LANE,
    NODE,
    NODES,
    NOW,
    Waiting,
    lanes_of,
    placed,
)


@pytest.mark.parametrize(
    ("node", "lane", "reason"),
    [
        ({"status": NodeStatus.DISCONNECTED}, {}, Refused.OFFLINE),
        ({"status": NodeStatus.DOWN}, {}, Refused.OFFLINE),
        ({"cordoned": True}, {}, Refused.CORDONED),
        ({"draining": True}, {}, Refused.DRAINING),
        ({}, {"node_id": "agx1"}, Refused.PINNED_ELSEWHERE),
        ({}, {"labels": (("zone", "b"),)}, Refused.LABELS_DIFFER),
        ({}, {"labels": (("rack", "1"), ("zone", "a"))}, Refused.LABELS_DIFFER),
        ({}, {"job_type": "video_gen"}, Refused.CAPABILITY_MISSING),
        ({}, {"cluster": "lab"}, Refused.CAPABILITY_MISSING),
        ({"engines": frozenset()}, {}, Refused.CAPABILITY_MISSING),
        ({"models": {"sketch": ModelView("sketch", job_types=("video_gen",))}}, {}, Refused.CAPABILITY_MISSING),
        ({}, {"model": "other"}, Refused.MODEL_MISSING),
        ({}, {"model": "ink"}, Refused.MODEL_MISSING),
        ({}, {"loras": ("ink", "other")}, Refused.LORA_MISSING),
        ({}, {"loras": ("sketch",)}, Refused.LORA_MISSING),
        ({}, {"vram_class": 8}, Refused.VRAM_TOO_SMALL),
        ({"gpu_memory_bytes": 8 * GIB - 1}, {"vram_class": 8}, Refused.VRAM_TOO_SMALL),
        ({"gpu_memory_bytes": 8 * GIB}, {"model": "big"}, Refused.VRAM_TOO_SMALL),
        ({"quarantined": frozenset({"sketch"})}, {}, Refused.QUARANTINED),
        ({}, {}, None),
        ({"gpu_memory_bytes": 8 * GIB}, {"vram_class": 8}, None),
        ({"gpu_memory_bytes": 9 * GIB}, {"model": "big"}, None),
        ({"gpu_memory_bytes": None}, {"model": "big"}, None),
        ({}, {"node_id": "agx0", "labels": (("zone", "a"),), "loras": ("ink",)}, None),
        ({}, {"model": ""}, None),
        ({"quarantined": frozenset({"big"}), "slots_free": 0}, {}, None),
    ],
)
def test_a_node_says_why_not(node: dict[str, object], lane: dict[str, object], reason: Refused | None) -> None:
    refusal = feasible(replace(NODE, **node), replace(LANE, **lane))  # type: ignore[arg-type]
    assert (refusal and refusal.reason) == reason
    assert refusal is None or refusal.detail


def test_loading_costs_what_is_not_in_memory() -> None:
    loaded = replace(NODE, loaded=(LoadedView("sketch", loras=("ink",)),))
    assert load_seconds(loaded, LANE) == 0
    assert load_seconds(loaded, replace(LANE, loras=("ink",))) == 0
    assert load_seconds(loaded, replace(LANE, loras=("other",))) == 1
    assert load_seconds(NODE, LANE) == 10
    assert load_seconds(NODE, replace(LANE, model="big")) == 20
    assert load_seconds(NODE, replace(LANE, model="unknown")) == 10
    assert load_seconds(NODE, replace(LANE, model="")) == 0


def test_the_loaded_model_is_first_until_another_line_presses() -> None:
    node = replace(NODE, loaded=(LoadedView("sketch"),))
    warm = Waiting(LANE)
    cold = Waiting(Lane("l2", "vision", "image_gen", "big"))
    assert lanes_of(node, cold, warm) == ["l1", "l2"]
    assert lanes_of(node, replace(cold, waiting=500), warm) == ["l1", "l2"]
    assert lanes_of(node, replace(cold, head_effective_ms=NOW - 300_000), warm) == ["l1", "l2"]
    assert lanes_of(node, replace(cold, waiting=12, head_effective_ms=NOW - 300_000), warm) == ["l2", "l1"]
    assert lanes_of(node, replace(cold, head_effective_ms=NOW - 370_000), warm) == ["l2", "l1"]


def test_jobs_that_differ_in_loras_press_for_their_model_together() -> None:
    node = replace(NODE, loaded=(LoadedView("sketch"),))
    files = {**NODE.models, "film": ModelView("film", kind="lora")}
    node = replace(node, models=files)
    old = NOW - 300_000
    lanes = [Waiting(Lane(f"l{name}", "vision", "image_gen", "big", (name,)), 6, old) for name in ("ink", "film")]
    assert lanes_of(node, Waiting(LANE), lanes[0]) == ["l1", "link"]
    assert lanes_of(node, Waiting(LANE), *lanes)[-1] == "l1"


def test_what_other_nodes_have_in_memory_presses_less() -> None:
    node = replace(NODE, loaded=(LoadedView("sketch"),))
    cold = Waiting(Lane("l2", "vision", "image_gen", "big"), 12, NOW - 300_000)
    elsewhere = Counter({"sketch": 1, "big": 3})
    ranked = rank(node, [Waiting(LANE), cold], NOW, copies=elsewhere)
    assert [one.demand.lane.lane_id for one in ranked] == ["l1", "l2"]


def test_the_oldest_head_is_first_among_equals() -> None:
    demands = [Waiting(replace(LANE, lane_id=f"l{age}"), head_effective_ms=NOW - age * 1000) for age in (3, 9, 6)]
    assert lanes_of(NODE, *demands) == ["l9", "l6", "l3"]


def test_empty_and_impossible_lanes_are_not_ranked() -> None:
    assert lanes_of(NODE, Waiting(LANE, waiting=0), Waiting(replace(LANE, model="other"))) == []


@given(NODES, DEMANDS, st.integers(0, 3))
def test_sharing_out_keeps_all_bounds(nodes: list[NodeView], demands: list[Waiting], avoid: int) -> None:
    by_node = {node.node_id: node for node in nodes}
    by_lane = {demand.lane.lane_id: demand for demand in demands}
    avoided = {(node.node_id, demand.lane.lane_id) for node in nodes[:avoid] for demand in demands[:avoid]}
    now = NOW + 10**6 + 61_000
    pairs = placed(nodes, demands, now, avoided=avoided)
    assert avoided.isdisjoint(pairs)
    given_to = Counter(node_id for node_id, _ in pairs)
    taken_from = Counter(lane_id for _, lane_id in pairs)
    for node_id, lane_id in pairs:
        assert feasible(by_node[node_id], by_lane[lane_id].lane) is None
    for node_id, count in given_to.items():
        assert count <= by_node[node_id].slots_free
    for lane_id, count in taken_from.items():
        assert count <= by_lane[lane_id].waiting
    # No slot stays empty that could be filled.
    for node in nodes:
        if node.online and given_to[node.node_id] < node.slots_free:
            for demand in demands:
                if feasible(node, demand.lane) is None and (node.node_id, demand.lane.lane_id) not in avoided:
                    assert taken_from[demand.lane.lane_id] == demand.waiting
    assert pairs == placed(nodes[::-1], demands[::-1], now, avoided=avoided)


@given(NODES, DEMANDS)
def test_urgent_means_next_on_any_node(nodes: list[NodeView], demands: list[Waiting]) -> None:
    """A high job goes before each normal one that came at the same time or later, whatever is loaded or waits."""
    boost = BOOST_MS[Priority.HIGH]
    for node in nodes:
        for urgent in demands:
            came = NOW - 5_000
            high = replace(
                urgent,
                waiting=max(1, urgent.waiting),
                head_effective_ms=came - boost,
                head_priority=Priority.HIGH,
            )
            others = [replace(one, head_effective_ms=came + 1) for one in demands if one is not urgent]
            ranked = rank(node, [*others, high], NOW)
            if feasible(node, high.lane) is None:
                assert ranked[0].demand is high


@given(DEMANDS)
def test_no_lane_starves(demands: list[Waiting]) -> None:
    """One that has waited ten minutes longer than another is before it, whatever is loaded and however long a line."""
    ranked = [one.demand for one in rank(NODE, demands, NOW)]
    for index, before in enumerate(ranked):
        for after in ranked[index + 1 :]:
            assert before.head_effective_ms is not None and after.head_effective_ms is not None
            assert before.head_effective_ms - after.head_effective_ms <= 600_000


def test_nodes_alike_share_a_lane_evenly_the_emptiest_first() -> None:
    nodes = [replace(NODE, node_id=f"n{number}", slots_free=free) for number, free in enumerate((1, 4, 2))]
    pairs = placed(nodes, [Waiting(LANE, waiting=5)])
    assert Counter(node_id for node_id, _ in pairs) == {"n1": 2, "n2": 2, "n0": 1}
    assert placed(nodes, [Waiting(LANE)]) == [("n1", "l1")]


def test_a_warm_node_takes_the_lane_before_a_cold_one() -> None:
    cold = replace(NODE, node_id="a", slots_free=4)
    warm = replace(NODE, node_id="z", slots_free=2, loaded=(LoadedView("sketch"),))
    assert placed([cold, warm], [Waiting(LANE, waiting=3)]) == [("z", "l1"), ("z", "l1"), ("a", "l1")]


def test_remembered_verdicts_follow_every_change_of_a_node() -> None:
    lane = replace(LANE, labels=(("zone", "a"),))
    changes: list[dict[str, Any]] = [
        {"status": NodeStatus.DOWN},
        {"cordoned": True},
        {"draining": True},
        {"clusters": frozenset({"lab"})},
        {"job_types": frozenset({"video_gen"})},
        {"engines": frozenset({"other"})},
        {"labels": {"zone": "b"}},
        {"models": {"sketch": ModelView("sketch", kind="lora")}},
        {"gpu_memory_bytes": GIB},
        {"quarantined": frozenset({"sketch"})},
    ]
    verdicts = Feasibility()
    for change in changes:
        assert verdicts.refusal(NODE, lane) is None
        # Free slots and what is loaded change all the time, and mean nothing here.
        assert verdicts.refusal(replace(NODE, slots_free=0, models=dict(NODE.models)), lane) is None
        changed = replace(NODE, **change)
        refusal = verdicts.refusal(changed, lane)
        assert refusal is not None and refusal == feasible(changed, lane), change
