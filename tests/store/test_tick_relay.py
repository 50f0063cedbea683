"""Ticks between two replicas over a real store: lossy, bounded, and previews only where somebody looks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from fleet.v1.types_pb2 import JobProgress, Preview

from fleet_server.services.progress import ProgressHub
from fleet_server.services.tick_relay import RelaySettings, TickRelay
from fleet_server.store import open_store
from fleet_server.store.broadcast import Broadcast
from tests.store.conftest import Server
from tests.waiting import wait_until

SETTINGS = RelaySettings(interval_seconds=0.02, renew_seconds=0.02, keep_seconds=0.2)


class Counted:
    """A channel that counts what is said."""

    def __init__(self, channel: Broadcast) -> None:
        self._channel = channel
        self.listeners, self.listen = channel.listeners, channel.listen
        self.said: list[bytes] = []

    async def publish(self, message: bytes) -> None:
        self.said.append(message)
        await self._channel.publish(message)


@dataclass
class Replica:
    """One replica's hub, and its end of the channel."""

    hub: ProgressHub
    channel: Counted


@asynccontextmanager
async def replica(server: Server, namespace: str) -> AsyncIterator[Replica]:
    async with open_store(server.user_url(namespace), namespace=namespace) as store:
        hub, channel = ProgressHub(interval_seconds=0.01), Counted(store.broadcast)
        task = asyncio.create_task(TickRelay(channel, hub, SETTINGS).run())
        try:
            yield Replica(hub, channel)
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()


@pytest.fixture
async def pair(server: Server, namespace: str) -> AsyncIterator[tuple[Replica, Replica]]:
    async with replica(server, namespace) as one, replica(server, namespace) as other:
        yield one, other


def tick(job_id: str, progress: int, preview: bytes = b"") -> JobProgress:
    made = JobProgress(job_id=job_id, progress=progress)
    if preview:
        made.preview.CopyFrom(Preview(content_type="image/webp", data=preview))
    return made


async def until_heard(source: ProgressHub, made: JobProgress, ticks: AsyncIterator[JobProgress]) -> JobProgress:
    """Says it until the other side hears it: who is there is learned by and by, and ticks may be lost."""
    heard = asyncio.ensure_future(anext(ticks))
    async with asyncio.timeout(50):
        while not heard.done():
            source.publish(made)
            await asyncio.wait({heard}, timeout=0.02)
    return heard.result()


async def test_a_tick_reaches_who_watches_elsewhere(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    async with there.hub.subscribe(["a"]) as ticks:
        assert (await until_heard(here.hub, tick("a", 40), ticks)).progress == 40
    last = there.hub.latest("a")
    assert last is not None and last.progress == 40


async def test_what_was_relayed_is_not_relayed_again(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    async with there.hub.subscribe(None) as ticks:
        await until_heard(here.hub, tick("a", 40), ticks)
    # It says something of its own after that, so that there is an end to wait for.
    async with here.hub.subscribe(["b"]) as back:
        await until_heard(there.hub, tick("b", 50), back)
    assert not [message for message in there.channel.said if b"a" in message[9:]]


async def test_previews_cross_only_while_somebody_looks(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    assert not here.hub.previews_wanted("a")
    async with there.hub.subscribe(["a"]) as ticks:
        assert not (await until_heard(here.hub, tick("a", 10, b"picture"), ticks)).HasField("preview")
    async with there.hub.subscribe(["a"], previews=True) as ticks:
        await wait_until(lambda: here.hub.previews_wanted("a"))
        assert not here.hub.previews_wanted("b")
        async with asyncio.timeout(50):
            while (await until_heard(here.hub, tick("a", 20, b"picture"), ticks)).preview.data != b"picture":
                pass
    await wait_until(lambda: not here.hub.previews_wanted("a"))


async def test_many_ticks_of_a_job_become_few(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    async with there.hub.subscribe(["a"]) as ticks:
        await until_heard(here.hub, tick("a", 1), ticks)
        said = len(here.channel.said)
        for progress in range(500):
            here.hub.publish(tick("a", progress % 100))
        here.hub.publish(tick("a", 100))
        async with asyncio.timeout(50):
            while (await anext(ticks)).progress != 100:
                pass
    assert len(here.channel.said) - said <= 3


async def test_alone_it_says_nothing(server: Server, namespace: str) -> None:
    async with replica(server, namespace) as one, one.hub.subscribe(None, previews=True) as ticks:
        one.hub.publish(tick("a", 5, b"picture"))
        assert (await anext(ticks)).progress == 5
        for _ in range(3):
            await one.channel.listeners()
        assert one.channel.said == []


async def test_it_hears_again_after_its_connection_was_cut(server: Server, namespace: str) -> None:
    async with replica(server, namespace) as here, replica(server, namespace) as there:
        client = server.client()
        async with there.hub.subscribe(["a"]) as ticks:
            await until_heard(here.hub, tick("a", 40), ticks)
            assert client.execute_command("CLIENT", "KILL", "TYPE", "PUBSUB") >= 2
            assert (await until_heard(here.hub, tick("a", 60), ticks)).progress >= 40
        client.close()


async def test_a_quiet_channel_is_asked_whether_it_is_there(server: Server, namespace: str) -> None:
    """One that answers stays."""
    async with open_store(server.url, namespace=namespace) as store:
        channel = Broadcast(store.events._room, server.url, quiet_seconds=0.05, answer_seconds=50)
        heard: list[bytes] = []
        task = asyncio.create_task(channel.listen(heard.append))
        client = server.client()
        try:
            pings = client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0)
            await wait_until(lambda: client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) > pings + 2)
            connections = client.info("stats")["total_connections_received"]
            await channel.publish(b"here")
            await wait_until(lambda: heard == [b"here"])
            assert client.info("stats")["total_connections_received"] <= connections + 1
        finally:
            client.close()
            task.cancel()
            await asyncio.wait([task])
