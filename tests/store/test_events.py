"""The event stream: subscribe, replay, gaps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fleet_server.store import Store, StoredEvent, decode_job, open_store
from fleet_server.store.events import Subscription
from tests.store.conftest import Server
from tests.store.making import claim, submit
from tests.store.proxy import proxied
from tests.waiting import wait_until


async def take(events: AsyncIterator[StoredEvent], count: int) -> list[StoredEvent]:
    async with asyncio.timeout(50):
        return [await anext(events) for _ in range(count)]


async def test_every_event_after_entering_arrives_in_order(store: Store) -> None:
    await submit(store)
    async with store.events.subscribe() as one, store.events.subscribe() as two:
        ids = [await submit(store) for _ in range(20)]
        for events in (one, two):
            got = await take(events, 20)
            assert [decode_job(event.fields).job_id for event in got] == ids
    replayed, oldest = await store.events.read("0")
    assert len(replayed) == 21
    assert replayed[0].id == oldest
    assert (await store.events.read(replayed[10].id))[0] == replayed[11:]
    assert await store.events.last_id() == replayed[-1].id


@pytest.mark.parametrize("owner", ["ann", "a\x1enn"])
async def test_a_job_is_told_whole_in_one_value_and_in_many(store: Store, owner: str) -> None:
    """Fields come joined, unless one holds what stands between them."""
    job_id = await submit(store, owner=owner)
    claimed = await claim(store)
    done = await store.jobs.complete(job_id, claimed.token, result=b"")
    assert done.record is not None
    entries, _ = await store.events.read("0")
    assert [event.type for event in entries] == ["job_update", "job_complete"]
    assert {job.owner for job in (claimed.job, done.record, *(event.job for event in entries))} == {owner}
    assert replace(done.record, spec=b"spec") == await store.jobs.get(job_id)
    assert isinstance(done.fields, bytes) is (owner == "ann")


async def test_published_events_have_their_fields(store: Store) -> None:
    assert await store.events.last_id() == "0-0"
    assert await store.events.read("0") == ([], "")
    async with store.events.subscribe() as events:
        event_id = await store.events.publish("container_update", {"data": b"\x00\xff", "n": 3})
        (event,) = await take(events, 1)
    assert (event.id, event.type) == (event_id, "container_update")
    assert event.fields == {"data": b"\x00\xff", "n": b"3"}


async def test_a_slow_watcher_is_told_of_its_gap(store: Store) -> None:
    async with store.events.subscribe(buffer=5) as slow, store.events.subscribe() as quick:
        first = await submit(store)
        (seen,) = await take(slow, 1)
        assert decode_job(seen.fields).job_id == first
        for _ in range(12):
            await submit(store)
        await take(quick, 13)
        gap = (await take(slow, 1))[0]
        assert gap.type == "gap"
        assert gap.fields["since"].decode() == seen.id
        caught_up, _ = await store.events.read(gap.fields["since"].decode())
        assert len(caught_up) == 12


async def test_a_watcher_that_left_costs_nothing(store: Store) -> None:
    async with store.events.subscribe():
        pass
    assert store.events._subscribers == set()
    async with store.events.subscribe() as events:
        await submit(store)
        assert len(await take(events, 1)) == 1


async def test_the_reader_survives_a_lost_connection(plain_server: Server, short_path: Path, namespace: str) -> None:
    async with (
        proxied(plain_server.path, short_path / "p") as proxy,
        open_store(f"unix://{proxy.path}", namespace=namespace) as far,
        open_store(plain_server.url, namespace=namespace) as near,
        far.events.subscribe() as events,
    ):
        first = await submit(near)
        proxy.down = True
        proxy.drop_all()
        second = await submit(near)
        before = proxy.connections
        await wait_until(lambda: proxy.connections > before)
        proxy.down = False
        third = await submit(near)
        got = await take(events, 3)
        assert [decode_job(event.fields).job_id for event in got] == [first, second, third]


@pytest.mark.parametrize("lost", ["trimmed", "emptied"])
async def test_events_lost_while_away_are_a_gap(
    plain_server: Server, short_path: Path, namespace: str, plain_raw: Any, lost: str
) -> None:
    key = f"{{{namespace}}}:events"
    async with (
        proxied(plain_server.path, short_path / "p") as proxy,
        open_store(f"unix://{proxy.path}", namespace=namespace) as far,
        open_store(plain_server.url, namespace=namespace) as near,
        far.events.subscribe() as events,
    ):
        await submit(near)
        await take(events, 1)
        proxy.down = True
        proxy.drop_all()
        if lost == "trimmed":
            for _ in range(3):
                await submit(near)
            plain_raw.xtrim(key, maxlen=1, approximate=False)
        else:
            plain_raw.delete(key)
        before = proxy.connections
        await wait_until(lambda: proxy.connections > before)
        proxy.down = False
        gap = (await take(events, 1))[0]
        assert gap.type == "gap"
        later = await submit(near)
        while True:
            (event,) = await take(events, 1)
            if decode_job(event.fields).job_id == later:
                break


async def test_a_subscription_keeps_the_newest() -> None:
    subscription = Subscription(3, lambda: True)
    for number in range(8):
        subscription.put(StoredEvent(f"{number}-0", 0, "job_update"))
    assert (await anext(subscription)).type == "gap"
    assert (await anext(subscription)).id == "7-0"
