"""Nodes: sessions, states, and an event for each change that watchers see."""

from __future__ import annotations

import asyncio

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.store import NodeRow, Store, decode_node
from tests.store.making import ManualClock


async def connect(store: Store, session: str = "s1", **changes: str) -> NodeRow | None:
    return await store.nodes.connect(
        "agx0", session=session, instance_id=changes.get("instance_id", "boot-1"), info=b"\x00info", replica="r1"
    )


async def statuses(store: Store) -> list[str]:
    events, _ = await store.events.read("0")
    assert {event.type for event in events} <= {"node_update"}
    return [decode_node(event.fields).status for event in events]


async def test_a_node_connects_and_is_announced(store: Store, clock: ManualClock) -> None:
    assert await connect(store) is None
    row = await store.nodes.get("agx0")
    assert row is not None
    assert (row.status, row.session, row.instance_id, row.replica) == ("online", "s1", "boot-1", "r1")
    assert (row.info, row.connect_ms, row.created_ms, row.version) == (b"\x00info", clock.now, clock.now, 1)
    events, _ = await store.events.read("0")
    assert decode_node(events[0].fields) == row


async def test_connect_gives_the_row_before_and_repeats_by_session(store: Store, clock: ManualClock) -> None:
    await connect(store)
    before = await store.nodes.get("agx0")
    clock.tick(5)
    assert await connect(store, "s2", instance_id="boot-2") == before
    again = await connect(store, "s2", instance_id="boot-2")
    assert again is not None
    assert before is not None
    assert (again.session, again.instance_id, again.status) == (before.session, before.instance_id, before.status)
    row = await store.nodes.get("agx0")
    assert row is not None
    assert (row.session, row.version) == ("s2", 2)


async def test_connect_only_in_place_of_the_session_expected(store: Store) -> None:
    options = {"instance_id": "b", "info": b"", "replica": "r"}
    await store.nodes.connect("n", session="s1", expected_session="", **options)  # type: ignore[arg-type]
    racers = await asyncio.gather(
        *(
            store.nodes.connect("n", session=f"x{i}", expected_session="s1", **options)  # type: ignore[arg-type]
            for i in range(5)
        ),
        return_exceptions=True,
    )
    refused = [one for one in racers if isinstance(one, FleetError)]
    assert [error.reason for error in refused] == ["NODE_ONLINE"] * 4


async def test_heartbeats_are_kept_without_events(store: Store, clock: ManualClock) -> None:
    await connect(store)
    clock.tick(5000)
    assert await store.nodes.heartbeat("agx0", "s1", b"beat")
    assert not await store.nodes.heartbeat("agx0", "s0", b"stale")
    assert not await store.nodes.heartbeat("unknown", "s1", b"")
    row = await store.nodes.get("agx0")
    assert row is not None
    assert (row.heartbeat, row.heartbeat_ms, row.version) == (b"beat", clock.now, 1)
    assert await statuses(store) == ["online"]


async def test_the_way_down_and_back(store: Store) -> None:
    await connect(store)
    assert not await store.nodes.set_down("agx0", "s1")
    assert not await store.nodes.disconnect("agx0", "s0")
    assert await store.nodes.disconnect("agx0", "s1")
    assert await store.nodes.disconnect("agx0", "s1")
    assert not await store.nodes.set_down("agx0", "s0")
    assert await store.nodes.set_down("agx0", "s1")
    assert await store.nodes.set_down("agx0", "s1")
    assert await store.nodes.heartbeat("agx0", "s1", b"")
    assert await statuses(store) == ["online", "disconnected", "down", "online"]


async def test_a_late_end_of_an_old_stream_changes_nothing(store: Store) -> None:
    await connect(store, "s1")
    await connect(store, "s2")
    assert not await store.nodes.disconnect("agx0", "s1")
    assert await statuses(store) == ["online", "online"]


async def test_info_and_cordon_are_events_when_they_change(store: Store) -> None:
    await connect(store)
    assert await store.nodes.update_info("agx0", "s1", b"more")
    assert await store.nodes.update_info("agx0", "s1", b"more")
    assert not await store.nodes.update_info("agx0", "s0", b"other")
    cordoned = await store.nodes.set_cordoned("agx0", True)
    assert cordoned is not None
    assert cordoned.cordoned
    assert await store.nodes.set_cordoned("agx0", True) == cordoned
    assert await store.nodes.set_cordoned("unknown", True) is None
    await connect(store, "s2")
    row = await store.nodes.get("agx0")
    assert row is not None
    assert row.cordoned
    assert len(await statuses(store)) == 4


async def test_list_and_delete(store: Store) -> None:
    for node_id in ("b", "a", "c"):
        await store.nodes.connect(node_id, session="s", instance_id="i", info=b"", replica="r")
    assert [row.node_id for row in await store.nodes.list()] == ["a", "b", "c"]
    with pytest.raises(FleetError) as caught:
        await store.nodes.delete("b")
    assert caught.value.reason == "NODE_ONLINE"
    await store.nodes.disconnect("b", "s")
    gone = await store.nodes.delete("b")
    assert gone is not None
    assert gone.status == "disconnected"
    assert await store.nodes.delete("b") is None
    assert [row.node_id for row in await store.nodes.list()] == ["a", "c"]
    assert await store.nodes.get("b") is None
