"""Placement: who may run what, and what a free slot takes next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.job import BOOST_MS, Lane, Priority
from fleet_server.domain.node import LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.domain.placement import (
    GIB,
    MOST_OPEN,
    Demand,
    Plan,
    Refused,
    Situation,
    feasible,
    load_seconds,
    place,
    rank,
)
from fleet_server.domain.recorded import RecordedTiming
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


def lanes_of(node: NodeView, *demands: Demand) -> list[str]:
    return [one.demand.lane.lane_id for one in rank(node, demands, NOW)]


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


def test_a_cold_node_leaves_a_young_head_to_a_warm_one_for_its_load_time_at_most() -> None:
    """Its last load took ten seconds; the warm node will be free in five."""
    plan = decide([WARM, COLD], Waiting(LANE), NOW)
    assert plan.placed == ()
    assert [(one.node_id, one.lane_id) for one in plan.deferred] == [("cold", "l1")]
    assert plan.look_again_ms == NOW + 10_000
    assert [one.node_id for one in decide([WARM, COLD], Waiting(LANE), NOW + 9_999).deferred] == ["cold"]
    late = decide([WARM, COLD], Waiting(LANE), NOW + 10_000)
    assert [one.node_id for one in late.placed] == ["cold"]
    assert late.look_again_ms is None


def test_a_node_that_never_loaded_the_model_learns_how_long_it_takes() -> None:
    assert [one.node_id for one in decide([WARM, COLD], Waiting(LANE), NOW, SpeedBook()).placed] == ["cold"]
    assert [one.node_id for one in decide([WARM, COLD], Waiting(LANE), NOW, loads(warm=10)).placed] == ["cold"]


def test_a_cold_node_waits_for_nobody_who_would_not_be_sooner() -> None:
    """A load counts four times: it takes ten seconds, and costs others as well."""
    busy = replace(WARM, free_at_ms=(NOW + 39_000,))
    assert decide([busy, COLD], Waiting(LANE), NOW).placed == ()
    busier = replace(WARM, free_at_ms=(NOW + 41_000,))
    assert [one.node_id for one in decide([busier, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    unknown = replace(WARM, free_at_ms=())
    assert [one.node_id for one in decide([unknown, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    unable = replace(WARM, cordoned=True)
    assert [one.node_id for one in decide([unable, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    away = replace(WARM, status=NodeStatus.DISCONNECTED)
    assert [one.node_id for one in decide([away, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    refused = place(Situation([WARM, COLD], [Waiting(LANE)], NOW, {("warm", "l1")}), timing=loads(cold=10))
    assert [one.node_id for one in refused.placed] == ["cold"]


def speeds(**seconds: float) -> SpeedBook:
    """Nodes that take so long for the usual job of LANE."""
    book = SpeedBook()
    work = Work(Unit.PIXEL_STEPS, 1e6)
    book.saw_job(LANE.lane_id, work)
    for node_id, taken in seconds.items():
        book.ran(node_id, "sketch", "sketch", work, taken)
    return book


def test_what_waits_is_more_than_the_warm_node_can_finish_sooner() -> None:
    """A job runs for 20 seconds: in the 60 until the cold one's first counts as ended, the warm one ends two."""
    book = speeds(warm=20, cold=20)
    book.loaded("cold", "sketch", 10)
    assert decide([WARM, COLD], Waiting(LANE, waiting=2), NOW, book).placed == ()
    assert [one.node_id for one in decide([WARM, COLD], Waiting(LANE, waiting=3), NOW, book).placed] == ["cold"]


def test_the_fast_node_takes_first_and_a_slow_one_waits_for_it_a_while() -> None:
    loaded = (LoadedView("sketch"),)
    fast = replace(NODE, node_id="fast", loaded=loaded)
    slow = replace(NODE, node_id="a-slow", loaded=loaded)
    book = speeds(**{"fast": 4, "a-slow": 16})
    book.loaded("a-slow", "sketch", 10)
    assert [one.node_id for one in decide([slow, fast], Waiting(LANE), NOW, book).placed] == ["fast"]
    both = decide([slow, fast], Waiting(LANE, waiting=5), NOW, book)
    assert [one.node_id for one in both.placed] == ["fast", "a-slow"]
    # A second one the fast node can finish in eight seconds, the slow one in sixteen.
    two = decide([slow, fast], Waiting(LANE, waiting=2), NOW, book)
    assert [one.node_id for one in two.placed] == ["fast"]
    assert [one.node_id for one in two.deferred] == ["a-slow"]


def test_a_lane_whose_owner_has_had_more_goes_after_a_newcomers() -> None:
    """However old the backlog and warm its model; the newcomer's swap costs ten seconds."""
    node = replace(NODE, loaded=(LoadedView("sketch"),))
    backlog = Waiting(LANE, waiting=500, head_effective_ms=NOW - 3_600_000)
    newcomer = Waiting(Lane("l2", "vision", "image_gen", "big"), head_effective_ms=NOW)
    assert lanes_of(node, backlog, newcomer) == ["l1", "l2"]
    assert lanes_of(node, replace(backlog, head_owner_lag=23.0), newcomer) == ["l1", "l2"]
    assert lanes_of(node, replace(backlog, head_owner_lag=24.0), newcomer) == ["l2", "l1"]
    # Where no swap is in the way it is the newcomer's turn much sooner.
    warm = replace(newcomer, lane=replace(LANE, lane_id="l2"))
    assert lanes_of(node, replace(backlog, head_owner_lag=8.0), warm) == ["l1", "l2"]
    assert lanes_of(node, replace(backlog, head_owner_lag=9.0), warm) == ["l2", "l1"]
    # Only what both wait for counts: an owner who waits for something else holds nobody up.
    ahead = [replace(backlog, head_owner_lag=131.0), replace(newcomer, head_owner_lag=108.0)]
    assert lanes_of(node, *ahead) == ["l1", "l2"]


@given(DEMANDS, st.integers(0, 10**9))
def test_nobody_is_held_up_by_what_another_owner_had_waiting(demands: list[Waiting], age: int) -> None:
    """An owner's job goes before those of one who has had 24 more, whatever their age, line or memory."""
    able = [one for one in demands if one.waiting > 0 and feasible(NODE, one.lane) is None]
    if len(able) < 2:
        return
    first, *others = able
    others = [replace(one, head_owner_lag=24.0, head_effective_ms=NOW - age) for one in others]
    ranked = rank(NODE, [*others, replace(first, head_effective_ms=NOW)], NOW)
    assert ranked[0].demand.lane == first.lane


def test_high_goes_before_its_turn_every_second_time() -> None:
    old = Waiting(LANE, waiting=500, head_effective_ms=NOW - 7_200_000)
    high = Waiting(Lane("l2", "vision", "image_gen", "big"), 1, NOW - 600_000, Priority.HIGH)
    plan = place(Situation([NODE], [old, high], NOW + 60_000))
    assert [(one.lane_id, one.urgent) for one in plan.placed] == [("l2", True)]
    after = place(Situation([NODE], [old, high], NOW + 60_000, after_urgent={"agx0"}))
    assert [(one.lane_id, one.urgent) for one in after.placed] == [("l1", False)]


def test_nothing_of_a_paused_lane_goes() -> None:
    assert placed([NODE], [Waiting(LANE, paused=True)]) == []


def test_a_claim_knows_whether_another_node_could_take_the_job() -> None:
    other = replace(NODE, node_id="other", slots_free=0)
    (both,) = place(Situation([NODE, other], [Waiting(LANE)], NOW)).placed
    assert not both.alone
    (pinned,) = place(Situation([NODE, other], [Waiting(replace(LANE, node_id="agx0"))], NOW)).placed
    assert pinned.alone


def test_a_swap_puts_out_what_others_have_too() -> None:
    """Both nodes are cold for it; the one whose model is also elsewhere gives it up."""
    big = Waiting(Lane("l2", "vision", "image_gen", "big"))
    only = replace(NODE, node_id="a-only", loaded=(LoadedView("sketch", used_ms=NOW),))
    files = {**NODE.models, "third": ModelView("third", engine="sketch")}
    shared = [
        replace(NODE, node_id=f"b{number}", models=files, loaded=(LoadedView("third", used_ms=NOW),), slots_free=number)
        for number in (0, 1)
    ]
    assert placed([only, *shared], [big], NOW) == [("b1", "l2")]
    idle = replace(only, loaded=(LoadedView("sketch", used_ms=NOW - 60_000),))
    assert placed([idle, *shared], [big], NOW) == [("a-only", "l2")]


def test_of_a_large_fleet_the_warm_and_fast_are_looked_at_first() -> None:
    nodes = [replace(NODE, node_id=f"n{number:04}") for number in range(1_000)]
    warm = [replace(node, loaded=(LoadedView("sketch"),)) for node in nodes[500:800]]
    nodes[500:800] = warm
    book = speeds(**{node.node_id: 8.0 for node in nodes[:900]})
    for _ in range(10):
        book.ran("n0777", "sketch", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 2.0)
    few = place(Situation(nodes, [Waiting(LANE)], NOW + 60_000), timing=book)
    assert [one.node_id for one in few.placed] == ["n0777"]
    many = place(Situation(nodes, [Waiting(LANE, waiting=5_000)], NOW + 60_000), timing=book)
    assert len(many.placed) == MOST_OPEN
    assert {one.node_id for one in many.placed} <= {node.node_id for node in warm}
    # One that only a few can run finds them among all.
    rare = Waiting(replace(LANE, lane_id="l2", node_id="n0999"))
    both = place(Situation(nodes, [Waiting(LANE, waiting=3), rare], NOW + 60_000), timing=book)
    assert ("n0999", "l2") in [(one.node_id, one.lane_id) for one in both.placed]
    assert len(both.placed) == 4


@given(NODES, DEMANDS)
def test_a_decision_is_made_again_from_its_record(nodes: list[NodeView], demands: list[Waiting]) -> None:
    book = speeds(n1=3, n2=9, n3=5)
    book.loaded("n1", "sketch", 7)
    situation = Situation(nodes, demands, NOW + 3_000)
    timing = RecordedTiming.of(book)
    plan = place(situation, timing=timing)
    assert plan == place(situation, timing=book)
    sealed = timing.sealed()
    for node_id in ("n1", "n2", "n3"):
        book.ran(node_id, "sketch", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 1_000)
    assert place(situation, timing=sealed) == plan
