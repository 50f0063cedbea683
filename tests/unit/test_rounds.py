"""Rounds of placement: who leaves what to whom, whose turn it is, what replays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fleet_server.domain.job import Lane, Priority
from fleet_server.domain.node import LoadedView, ModelView, NodeStatus, NodeView
from fleet_server.domain.placement import (
    MOST_OPEN,
    Situation,
    feasible,
    place,
    rank,
)
from fleet_server.domain.recorded import RecordedTiming
from fleet_server.domain.speeds import SpeedBook, Unit, Work
from tests.unit.placing import (
    COLD,
    DEMANDS,
    LANE,
    NODE,
    NODES,
    NOW,
    WARM,
    Waiting,
    decide,
    lanes_of,
    loads,
    placed,
    speeds,
)


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
    """A load counts 11 times: it takes ten seconds, and costs others as well."""
    busy = replace(WARM, free_at_ms=(NOW + 109_000,))
    assert decide([busy, COLD], Waiting(LANE), NOW).placed == ()
    busier = replace(WARM, free_at_ms=(NOW + 111_000,))
    assert [one.node_id for one in decide([busier, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    unknown = replace(WARM, free_at_ms=())
    assert [one.node_id for one in decide([unknown, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    unable = replace(WARM, cordoned=True)
    assert [one.node_id for one in decide([unable, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    away = replace(WARM, status=NodeStatus.DISCONNECTED)
    assert [one.node_id for one in decide([away, COLD], Waiting(LANE), NOW).placed] == ["cold"]
    refused = place(Situation([WARM, COLD], [Waiting(LANE)], NOW, {("warm", "l1")}), timing=loads(cold=10))
    assert [one.node_id for one in refused.placed] == ["cold"]


def test_what_waits_is_more_than_the_warm_node_can_finish_sooner() -> None:
    """A job runs for 20 seconds: in the 130 until the cold one's first counts as ended, the warm one ends six."""
    book = speeds(warm=20, cold=20)
    book.loaded("cold", "sketch", 10)
    assert decide([WARM, COLD], Waiting(LANE, waiting=6), NOW, book).placed == ()
    assert [one.node_id for one in decide([WARM, COLD], Waiting(LANE, waiting=7), NOW, book).placed] == ["cold"]


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
    ahead = [replace(backlog, head_owner_lag=131.0), replace(warm, head_owner_lag=126.0)]
    assert lanes_of(node, *ahead) == ["l1", "l2"]


def test_a_busy_node_leaves_what_another_serves_to_it_for_an_hour() -> None:
    """It has warm work; a swap would make a second copy of a model whose jobs go on elsewhere."""
    here = replace(NODE, loaded=(LoadedView("sketch"),))
    there = replace(NODE, node_id="there", slots_free=0, loaded=(LoadedView("big"),))
    own = Waiting(LANE)
    other = Waiting(Lane("l2", "vision", "image_gen", "big"))

    def first(other: Waiting, own: Waiting = own, there: NodeView = there, **more: Any) -> str:
        [(_, lane_id)] = placed([here, there], [own, other], **more)
        return lane_id

    def waited(seconds: int) -> Waiting:
        return replace(other, head_effective_ms=NOW - seconds * 1000)

    assert first(waited(3_900)) == "l1"
    assert first(waited(4_100)) == "l2"
    # Nobody serves it: the node with the model is gone, may not run it, or was told not to.
    for gone in ({"status": NodeStatus.DOWN}, {"cordoned": True}, {"loaded": ()}):
        assert first(waited(500), there=replace(there, **gone)) == "l2"
    # `low` work keeps no node from `normal` work, `normal` keeps it from both.
    low = replace(own, head_priority=Priority.LOW)
    assert first(waited(500), own=low) == "l2"
    assert first(replace(waited(3_900), head_priority=Priority.LOW), own=low) == "l1"
    # A free node with nothing of its own to do takes what waits.
    assert placed([here, there], [waited(0)]) == [("agx0", "l2")]


def test_turns_of_owners_make_no_second_copies() -> None:
    """Where another node serves the newcomer the turn is worth a while, else it comes before all."""
    here = replace(NODE, loaded=(LoadedView("sketch"),))
    there = replace(NODE, node_id="there", slots_free=0, loaded=(LoadedView("big"),))
    backlog = Waiting(LANE, waiting=500, head_effective_ms=NOW - 3_600_000, head_owner_lag=24.0)
    newcomer = Waiting(Lane("l2", "vision", "image_gen", "big"))
    assert placed([here, there], [backlog, newcomer]) == [("agx0", "l1")]
    assert placed([here, replace(there, cordoned=True)], [backlog, newcomer]) == [("agx0", "l2")]
    assert placed([there, replace(there, node_id="too", slots_free=1)], [backlog, newcomer]) == [("too", "l2")]


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
    assert lanes_of(NODE, Waiting(LANE, paused=True)) == []


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


def test_a_node_prefers_what_it_is_not_slower_at_than_the_fleet() -> None:
    node = replace(NODE, loaded=(LoadedView("sketch"), LoadedView("big")))
    book = SpeedBook()
    for lane_id in ("l1", "l2"):
        book.saw_job(lane_id, Work(Unit.PIXEL_STEPS, 1e6))
    for other in range(20):
        book.ran(f"n{other}", "sketch", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 2.0)
        book.ran(f"n{other}", "big", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 20.0)
    book.ran("agx0", "sketch", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 20.0)
    book.ran("agx0", "big", "sketch", Work(Unit.PIXEL_STEPS, 1e6), 20.0)
    demands = [Waiting(LANE), Waiting(replace(LANE, lane_id="l2", model="big"))]
    assert [one.demand.lane.lane_id for one in rank(node, demands, NOW, timing=book)] == ["l2", "l1"]
