"""A heartbeat that says nothing new costs nearly nothing; one that does is heard at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet.v1 import node_pb2 as pb
from fleet.v1 import types_pb2

from fleet_server.services.nodes import with_inventory
from fleet_server.store import Store
from tests.services.agents.agent import wait_until
from tests.services.agents.bench import QUICK, Bench, bench_on

GPU = types_pb2.Gpu(index=0, memory_total_bytes=24 << 30)


def loaded(name: str, used: float, since: float = 100.0, **more: Any) -> pb.LoadedFile:
    return pb.LoadedFile(name=name, engine="sketch", used_seconds_ago=used, loaded_seconds_ago=since, **more)


async def test_a_beat_that_says_nothing_new_wakes_nobody_but_is_told(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await agent.beat(gpus=[GPU])
    changes: list[str] = []
    beats: list[str] = []
    bench.fleet.subscribe_changes(changes.append)
    stop = bench.fleet.subscribe_beats(beats.append)
    view = bench.fleet.node("agx0")
    for _ in range(3):
        await agent.beat(gpus=[GPU])
    assert (changes, beats) == ([], ["agx0"] * 3)
    assert bench.fleet.node("agx0") is view
    stop()
    await agent.beat(gpus=[GPU])
    assert len(beats) == 3


@pytest.mark.parametrize(
    "news",
    [
        {"slots": 2},
        {"gpus": [types_pb2.Gpu(index=0, memory_total_bytes=48 << 30)]},
        {"loaded_models": [loaded("sketch", 0.0)]},
        {"inventory": True, "models": [pb.ModelFile(name="new")]},
    ],
    ids=["slots", "memory", "loaded", "inventory"],
)
async def test_news_wake_dispatch(bench: Bench, news: dict[str, Any]) -> None:
    agent = bench.agent()
    await agent.dial()
    await agent.beat(gpus=[GPU])
    changes: list[str] = []
    bench.fleet.subscribe_changes(changes.append)
    await agent.beat(**{"gpus": [GPU], **news})
    assert changes == ["agx0"]


async def test_a_model_that_was_used_is_seen_as_used_and_wakes_nobody(bench: Bench) -> None:
    agent = bench.agent()
    await agent.dial()
    await agent.beat(loaded_models=[loaded("sketch", 50.0)])
    before = bench.fleet.node("agx0")
    changes: list[str] = []
    bench.fleet.subscribe_changes(changes.append)
    await agent.beat(loaded_models=[loaded("sketch", 0.0)])
    after = bench.fleet.node("agx0")
    assert before is not None and after is not None
    assert after.loaded[0].used_ms - before.loaded[0].used_ms > 40_000
    assert changes == []


async def test_the_store_is_given_readings_every_few_seconds_and_leases_with_each_beat(
    store: Store, short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    renewed: list[int] = []
    async with bench_on(store, short_path, settings=replace(QUICK, persist_seconds=3600)) as bench:
        keep, renew = bench.store.nodes.heartbeat, bench.store.jobs.renew

        async def kept(node_id: str, *rest: Any) -> bool:
            written.append(node_id)
            return await keep(node_id, *rest)

        async def renews(held: Any, lease_ms: int) -> Any:
            renewed.append(len(held))
            return await renew(held, lease_ms)

        monkeypatch.setattr(bench.store.nodes, "heartbeat", kept)
        monkeypatch.setattr(bench.store.jobs, "renew", renews)
        agent = bench.agent()
        await agent.dial()
        await bench.submit()
        assign = await agent.start()
        for _ in range(4):
            await agent.beat([(assign.job_id, assign.token)])
        assert written == ["agx0"]
        assert renewed == [1, 1, 1, 1]


async def test_readings_are_written_again_when_their_time_has_come(store: Store, short_path: Path) -> None:
    async with bench_on(store, short_path, settings=replace(QUICK, persist_seconds=0.05)) as bench:
        agent = bench.agent()
        await agent.dial()

        async def known() -> bool:
            await agent.beat(warnings=["hot"])
            row = await store.nodes.get("agx0")
            return row is not None and b"hot" in row.heartbeat

        await agent.beat()
        await wait_until(known)


def test_the_description_is_the_same_object_while_nothing_changed() -> None:
    hello = pb.Hello(node_id="a", slots=1, loaded_models=[loaded("m", 10.0)])
    same = pb.AgentHeartbeat(slots=1, loaded_models=[loaded("m", 15.2, 105.2)])
    assert with_inventory(hello, same, 5.0) is hello
    for changed in (
        pb.AgentHeartbeat(slots=2, loaded_models=same.loaded_models),
        pb.AgentHeartbeat(slots=1),
        pb.AgentHeartbeat(slots=1, loaded_models=[loaded("other", 15.0, 105.0)]),
        pb.AgentHeartbeat(slots=1, loaded_models=[loaded("m", 1.0, 105.0)]),
        pb.AgentHeartbeat(slots=1, loaded_models=[loaded("m", 15.0, 1.0)]),
        pb.AgentHeartbeat(slots=1, loaded_models=[loaded("m", 15.0, 105.0, loras=["l"])]),
        pb.AgentHeartbeat(slots=1, loaded_models=[loaded("m", 15.0, 105.0, memory_bytes=1)]),
        pb.AgentHeartbeat(slots=1, loaded_models=same.loaded_models, inventory=True),
    ):
        after = with_inventory(hello, changed, 5.0)
        assert after is not hello
        assert list(after.loaded_models) == list(changed.loaded_models)


async def test_an_inventory_that_says_the_same_stays_the_same_object(bench: Bench) -> None:
    """Who has looked at it need not look again."""
    agent = bench.agent()
    await agent.dial()
    before = bench.fleet.node("agx0")
    await agent.beat(loaded_models=[loaded("sketch", 0.0)])
    after = bench.fleet.node("agx0")
    assert before is not None and after is not None and after is not before
    assert after.models is before.models and after.job_types is before.job_types
    await agent.beat(inventory=True, models=[pb.ModelFile(name="new")])
    changed = bench.fleet.node("agx0")
    assert changed is not None and set(changed.models) == {"new"}
