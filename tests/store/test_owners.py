"""Owners share a cluster: turns by what each was given, whichever lane it came from."""

from __future__ import annotations

from collections import Counter

import pytest

from fleet_server.domain.job import Lane, Priority
from fleet_server.store import LaneView, Store
from tests.store.making import LANE, ManualClock, claim, drain, submit, wish

OTHER = Lane("lane-b", "vision", "image_gen", "dream")
ELSEWHERE = Lane("lane-c", "audio", "transcription")
CREDIT = 32


async def owners(store: Store, many: int, *, lane: Lane = LANE) -> list[str]:
    return [(await claim(store, lane=lane)).job.owner for _ in range(many)]


async def views(store: Store) -> dict[str, LaneView]:
    return {view.lane.lane_id: view for view in await store.jobs.lanes()}


async def test_between_two_turns_of_one_owner_each_other_gets_two_at_most(store: Store, clock: ManualClock) -> None:
    """Whatever the line looked like when they came: counts of any two differ by two at most, over any stretch."""
    for owner, many in (("a", 40), ("b", 25), ("c", 25), ("d", 15)):
        for _ in range(many):
            await submit(store, owner=owner)
            clock.tick(1)
    order = await owners(store, 20)
    for _ in range(15):
        await submit(store, owner="e")
    order += await owners(store, 40)
    everybody = order[20:]
    for start in range(len(everybody)):
        for stop in range(start + 1, len(everybody) + 1):
            counts = Counter(dict.fromkeys("abcde", 0))
            counts.update(everybody[start:stop])
            assert max(counts.values()) - min(counts.values()) <= 2
    assert set(Counter(order[:20]).values()) == {5}


async def test_many_jobs_in_one_lane_do_not_pass_those_of_others_in_another(store: Store, clock: ManualClock) -> None:
    """Two lanes of the same nodes: who was given much in one has the later turn in the other."""
    for _ in range(30):
        await submit(store, owner="big")
    for _ in range(10):
        await submit(store, owner="big", lane=OTHER)
    clock.tick(1)
    await submit(store, owner="small")
    for _ in range(5):
        await submit(store, owner="small", lane=OTHER)
    assert Counter(await owners(store, 12)) == {"big": 11, "small": 1}
    assert await owners(store, 5, lane=OTHER) == ["small"] * 5


async def test_lanes_tell_how_far_the_head_owner_is_ahead(store: Store, clock: ManualClock) -> None:
    for _ in range(10):
        await submit(store, owner="big")
    await submit(store, owner="big", lane=ELSEWHERE)
    assert {(view.head_owner, view.head_owner_lag) for view in (await views(store)).values()} == {("big", 0.0)}
    await submit(store, owner="small", lane=OTHER)
    await owners(store, 6)
    seen = await views(store)
    assert (seen["lane-a"].head_owner, seen["lane-a"].head_owner_lag) == ("big", 6.0)
    assert (seen["lane-b"].head_owner, seen["lane-b"].head_owner_lag) == ("small", 0.0)
    assert seen["lane-c"].head_owner_lag == 0.0
    clock.tick(1)
    await submit(store, owner="small")
    assert (await views(store))["lane-a"].head_owner == "small"
    assert await owners(store, 1) == ["small"]


async def test_an_owner_who_was_away_begins_level_with_the_least_served(store: Store) -> None:
    for _ in range(20):
        await submit(store, owner="a")
        await submit(store, owner="b")
    await owners(store, 20)
    for _ in range(10):
        await submit(store, owner="new")
    assert max(Counter(await owners(store, 6)).values()) <= 3


@pytest.mark.parametrize("name", ["abe", "zoe"])
async def test_leaving_and_coming_back_gains_nothing(store: Store, name: str) -> None:
    for _ in range(30):
        await submit(store, owner="kim")
    got = [name]
    for _ in range(20):
        if got[-1] == name:
            await submit(store, owner=name)
        got += await owners(store, 1)
    assert 9 <= Counter(got)[name] <= 11


async def test_who_could_not_be_served_saves_up_a_bounded_credit(store: Store) -> None:
    """`stuck` waits in a lane that no node serves while the others are given 100 jobs each."""
    await submit(store, owner="stuck", lane=OTHER)
    for _ in range(140):
        await submit(store, owner="a")
        await submit(store, owner="b")
    await owners(store, 200)
    assert (await views(store))["lane-a"].head_owner_lag <= CREDIT
    for _ in range(60):
        await submit(store, owner="stuck")
    order = await owners(store, CREDIT + 10)
    assert Counter(order)["stuck"] <= CREDIT + 5
    assert {"a", "b"} <= set(order)
    later = Counter(await owners(store, 30))
    assert max(later.values()) - min(later.values()) <= 2


async def test_who_comes_while_another_is_stuck_is_level_with_those_served(store: Store) -> None:
    await submit(store, owner="stuck", lane=OTHER)
    for _ in range(120):
        await submit(store, owner="a")
    await owners(store, 100)
    for _ in range(60):
        await submit(store, owner="new")
    order = await owners(store, CREDIT + 8)
    assert "a" in order


async def test_when_nobody_waits_all_is_forgotten(store: Store) -> None:
    for _ in range(10):
        await submit(store, owner="a")
    assert len(await drain(store)) == 10
    for _ in range(4):
        await submit(store, owner="a")
        await submit(store, owner="b")
    assert max(Counter(await owners(store, 4)).values()) == 2


async def test_turns_are_taken_within_each_priority(store: Store) -> None:
    for _ in range(4):
        await submit(store, owner="a", priority=Priority.HIGH)
        await submit(store, owner="b", priority=Priority.HIGH)
        await submit(store, owner="a")
    assert Counter(await owners(store, 4)) == {"a": 2, "b": 2}


async def test_many_owners_of_old_turns_are_put_right(store: Store) -> None:
    """Turns of this lane are old for all of them, since they were served in another."""
    names = [f"o{number:02}" for number in range(40)]
    for owner in names:
        await submit(store, owner=owner)
        await submit(store, owner=owner, lane=OTHER)
    for owner in names[:-1]:
        taken = await store.jobs.claim([wish(lane=OTHER)])
        assert taken[0] is not None and taken[0].job.owner == owner
    (view,) = [view for view in await store.jobs.lanes() if view.lane == LANE]
    assert view.head_owner_lag == 1.0
    assert await owners(store, 1) == [names[-1]]
