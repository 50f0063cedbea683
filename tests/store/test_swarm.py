"""Swarm services: each change is told once, whoever saw it; one replica at a time scales them."""

from __future__ import annotations

import pytest

from fleet_server.store import Store
from tests.store.conftest import Server
from tests.store.guarding import Guard, Story, play, scripts_without
from tests.store.making import ManualClock
from tests.waiting import wait_until


async def told(store: Store) -> list[bytes]:
    events, _ = await store.events.read("0")
    return [event.fields["service"] for event in events if event.type == "service_update"]


async def once(store: Store, clock: ManualClock) -> None:
    assert await store.swarm.tell("x3ti", 7, "aa", b"one")
    # Another node of the swarm saw the same.
    assert not await store.swarm.tell("x3ti", 7, "aa", b"one")
    # A task changed: the service's version stays.
    assert await store.swarm.tell("x3ti", 7, "bb", b"two")
    assert await store.swarm.tell("other", 7, "aa", b"three")
    assert await told(store) == [b"one", b"two", b"three"]


async def never_back(store: Store, clock: ManualClock) -> None:
    assert await store.swarm.tell("x3ti", 10, "aa", b"new")
    # A node that lags behind, and one whose versions have more digits.
    assert not await store.swarm.tell("x3ti", 9, "bb", b"old")
    assert await store.swarm.tell("x3ti", 100, "bb", b"newer")
    assert await told(store) == [b"new", b"newer"]


async def one_scales(store: Store, clock: ManualClock) -> None:
    assert await store.swarm.may_scale("a", 60_000)
    assert not await store.swarm.may_scale("b", 60_000)
    assert await store.swarm.may_scale("a", 60_000)
    assert not await store.swarm.may_scale("b", 60_000)


async def test_rules_are_kept(store: Store) -> None:
    assert await store.swarm.rule("x3ti") is None
    await store.swarm.set_rule("x3ti", b"r1")
    await store.swarm.set_rule("x3ti", b"r2")
    await store.swarm.set_rule("y", b"r3")
    assert await store.swarm.rule("x3ti") == b"r2"
    assert await store.swarm.rules() == {"x3ti": b"r2", "y": b"r3"}
    await store.swarm.drop_rule("x3ti")
    assert await store.swarm.rules() == {"y": b"r3"}


STORIES = [once, never_back, one_scales]


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
async def test_story(plain_server: Server, namespace: str, story: Story) -> None:
    await play(plain_server, namespace, story, scripts_without(None))


async def test_a_replica_that_died_is_followed(store: Store) -> None:
    assert await store.swarm.may_scale("a", 1)
    assert await store.swarm.may_scale("a", 1)
    await wait_until(lambda: store.swarm.may_scale("b", 60_000))
    assert not await store.swarm.may_scale("a", 60_000)


GUARDS = [
    Guard("service_told", "tonumber(ARGV[3]) < tonumber(version) or ", "", never_back),
    Guard("service_told", "tonumber(ARGV[3]) < tonumber(version)", "ARGV[3] < version", never_back),
    Guard("service_told", "(ARGV[3] == version and ARGV[4] == hash)", "false", once),
    Guard("service_told", "(ARGV[3] == version and ARGV[4] == hash)", "ARGV[3] == version", once),
    Guard("autoscaler", "if holder and holder ~= ARGV[3] then", "if false then", one_scales),
    Guard("autoscaler", "if holder and holder ~= ARGV[3] then", "if holder then", one_scales),
]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: f"{guard.place}: {guard.text[:40]}")
async def test_without_a_guard_its_story_ends_badly(plain_server: Server, namespace: str, guard: Guard) -> None:
    with pytest.raises(AssertionError):
        await play(plain_server, namespace, guard.story, scripts_without(guard))
