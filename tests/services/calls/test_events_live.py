"""Live events: ticks, previews, nodes, and the end of the hub."""

from __future__ import annotations

import asyncio

import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.events import EventHub, EventSettings
from fleet_server.services.mailbox import EventFilter
from tests.services.calls.desk import Desk, now_ms
from tests.services.calls.test_events import listening
from tests.waiting import wait_until

TOLD = frozenset({"job_progress", "job_complete"})


async def test_progress_is_conflated_shared_and_never_comes_after_the_end(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    claim = await desk.start()
    async with (
        listening(desk, kinds=TOLD, cluster="vision") as one,
        listening(desk, kinds=TOLD) as two,
        listening(desk, kinds=TOLD, cluster="llm") as other,
    ):
        preview = types_pb2.Preview(content_type="image/webp", data=b"x")
        tick = types_pb2.JobProgress(job_id=job_id, progress=10, generation=1, attempt=1, preview=preview)
        desk.ticks.publish(tick)
        await one.until(1)
        await two.until(1)
        assert one.events[0] is two.events[0]
        assert one.events[0].job_progress.progress == 10 and not one.events[0].job_progress.HasField("preview")
        assert not one.events[0].HasField("id")
        await desk.complete(claim)
        await one.until(2)
        desk.ticks.publish(types_pb2.JobProgress(job_id=job_id, progress=90, generation=1, attempt=1))
        await desk.submit()
        await desk.run_next()
        await one.until(3)
        assert one.kinds == ["job_progress", "job_complete", "job_complete"]
        assert other.events == []


async def test_previews_come_to_those_who_ask(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    await desk.start()
    assert not desk.ticks.previews_wanted(job_id)
    async with listening(desk, job_id=job_id, previews=True, first=1) as listener:
        await wait_until(lambda: desk.ticks.previews_wanted(job_id))
        preview = types_pb2.Preview(content_type="image/webp", data=b"x")
        desk.ticks.publish(types_pb2.JobProgress(job_id=job_id, progress=10, preview=preview))
        await listener.until(2)
        assert listener.events[1].job_progress.preview.data == b"x"
    assert not desk.ticks.previews_wanted(job_id)


async def test_nodes_tell_of_their_changes_and_beats_only_where_asked(desk: Desk) -> None:
    async with (
        listening(desk) as plain,
        listening(desk, kinds=frozenset({"node_heartbeat"})) as beats,
        listening(desk, node_id="agx1") as one,
    ):
        await desk.add_node("agx0", labels={"zone": "a"})
        await desk.add_node("agx1")
        await plain.until(2)
        info = plain.events[0].node_update
        assert (info.node_id, info.status, dict(info.labels)) == ("agx0", types_pb2.NODE_STATUS_ONLINE, {"zone": "a"})
        assert list(info.clusters) == ["vision"] and plain.events[0].id
        await wait_until(lambda: {event.node_heartbeat.node_id for event in beats.events} == {"agx0", "agx1"})
        assert [event.node_update.node_id for event in await one.until(1)] == ["agx1"]
    async with listening(desk, node_id="agx1", first=1) as now:
        assert now.events[0].node_update.node_id == "agx1" and not now.events[0].HasField("id")


async def test_at_shutdown_listeners_are_told(desk: Desk) -> None:
    async with listening(desk) as listener:
        desk.hub.close()
        await asyncio.wait_for(asyncio.shield(listener.task), 50)
        assert listener.error is not None and listener.error.reason == "SHUTTING_DOWN"
    with pytest.raises(FleetError):
        await anext(desk.hub.watch(EventFilter()))


async def test_a_hub_that_does_not_follow_the_store_yet_says_so(desk: Desk) -> None:
    hub = EventHub(
        desk.store.jobs,
        desk.store.events,
        desk.views,
        desk.nodes,
        desk.ticks,
        desk.rates,
        clock=now_ms,
        settings=EventSettings(ready_seconds=0.01),
    )
    with pytest.raises(FleetError) as caught:
        await anext(hub.watch(EventFilter()))
    assert caught.value.reason == "STORE_UNAVAILABLE"
