"""The event hub on a real store: order, snapshots, replay, gaps, slow listeners."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.events import EventSettings
from fleet_server.services.happenings import EventMaker
from fleet_server.services.listener import order
from fleet_server.services.mailbox import EventFilter, Happening
from fleet_server.store import JobRecord, JobStore, Store, StoredEvent, open_store
from tests.services.calls.desk import ALIAS, Desk, desk_on
from tests.store.conftest import Server, run_server
from tests.waiting import wait_until


class Listener:
    """Watches in a task of its own and keeps what came."""

    def __init__(self, desk: Desk, **wanted: Any) -> None:
        self.events: list[types_pb2.Event] = []
        self.error: FleetError | None = None
        self._stream = desk.hub.watch(EventFilter(**wanted))
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        try:
            async with aclosing(self._stream) as events:
                async for event in events:
                    self.events.append(event)
        except FleetError as error:
            self.error = error

    @property
    def kinds(self) -> list[str]:
        return [kind_of(event) for event in self.events]

    async def until_kind(self, kind: str) -> None:
        await wait_until(lambda: kind in self.kinds)

    async def until(self, count: int) -> list[types_pb2.Event]:
        await wait_until(lambda: len(self.events) >= count)
        assert len(self.events) == count, self.kinds
        return self.events


def kind_of(event: types_pb2.Event) -> str:
    return str(event.WhichOneof("data"))


@contextlib.asynccontextmanager
async def listening(desk: Desk, *, first: int = 0, **wanted: Any) -> AsyncIterator[Listener]:
    """A listener that is attached and has got `first` events."""
    newest = await desk.store.events.last_id()
    await wait_until(lambda: order(desk.hub.place) >= order(newest))
    before = len(desk.hub.listeners)
    listener = Listener(desk, **wanted)
    try:
        await wait_until(lambda: len(desk.hub.listeners) > before or listener.task.done())
        await listener.until(first)
        yield listener
    finally:
        listener.task.cancel()
        await asyncio.wait([listener.task])
        assert len(desk.hub.listeners) == before


async def first_of(desk: Desk, stream: AsyncGenerator[types_pb2.Event, None]) -> types_pb2.Event:
    """Begins to listen, submits a job, and gives its event."""
    coming = asyncio.ensure_future(anext(stream))
    await wait_until(lambda: desk.hub.listeners)
    await desk.submit()
    return await coming


async def test_each_change_of_a_job_is_one_event_with_the_whole_job(desk: Desk) -> None:
    await desk.add_node()
    async with listening(desk) as listener:
        job_id = await desk.submit(callback_url="https://example.com/x?secret=1")
        await listener.until(1)
        row = await desk.complete(await desk.start())
        created, started, ended = await listener.until(3)
    assert [kind_of(event) for event in (created, started, ended)] == ["job_update", "job_update", "job_complete"]
    assert len({event.id for event in listener.events}) == 3 and all(event.id for event in listener.events)
    job = created.job_update
    assert (job.job_id, job.status, job.queue_position) == (job_id, types_pb2.JOB_STATUS_QUEUED, 1)
    assert (job.target_model, job.resolved_model, job.callback_url) == (ALIAS, "sketch", "https://example.com/x")
    assert not job.HasField("payload") and not job.HasField("result")
    assert (started.job_update.status, started.job_update.node_id) == (types_pb2.JOB_STATUS_RUNNING, "agx0")
    end = ended.job_complete
    assert (end.status, end.progress) == (types_pb2.JOB_STATUS_SUCCEEDED, 100)
    assert [output.filename for output in end.result.outputs] == [row.filename]
    assert not end.result.outputs[0].HasField("metadata") and not end.HasField("payload")
    assert created.job_update.version < started.job_update.version < end.version


async def test_an_event_equals_the_job_read_at_that_moment(desk: Desk) -> None:
    await desk.add_node()
    async with listening(desk) as listener:
        job_id = await desk.submit(max_retries=0)
        await desk.fail(await desk.start())
        await listener.until(3)
        read = await desk.queue.get(job_id)
    read.ClearField("payload")
    assert listener.events[2].job_complete == read
    assert len(read.attempts) == 1 and read.error.reason == "ENGINE_FAILED"


async def test_cancelled_and_failed_ends_have_a_result_object_too(desk: Desk) -> None:
    async with listening(desk, kinds=frozenset({"job_complete"})) as listener:
        await desk.queue.cancel(await desk.submit())
        (event,) = await listener.until(1)
    assert event.job_complete.HasField("result") and not event.job_complete.HasField("error")


async def test_all_listeners_get_the_same_object(desk: Desk) -> None:
    async with listening(desk) as one, listening(desk) as two:
        await desk.submit()
        assert (await one.until(1))[0] is (await two.until(1))[0]
        async with listening(desk, since="0", first=1) as three:
            assert three.events[0] is one.events[0]


async def test_filters_hold_together(desk: Desk) -> None:
    await desk.add_node()
    await desk.add_node("llm0", job_types=[types_pb2.JOB_TYPE_LLM_INFERENCE], models=())
    first = await desk.submit()
    async with (
        listening(desk, cluster="llm") as llm,
        listening(desk, job_id=first, kinds=frozenset({"job_complete"})) as mine,
        listening(desk, node_id="agx0", kinds=frozenset({"job_complete", "job_update"})) as node,
        listening(desk, service_id="s") as service,
        listening(desk) as everything,
    ):
        await desk.submit(job_type="llm_inference", payload={"prompt": "x"})
        await desk.submit()
        claim = await desk.start()
        assert claim.job.job_id == first
        await desk.complete(claim)
        await desk.run_next()
        await everything.until(6)
        assert [event.job_update.target_cluster for event in await llm.until(1)] == ["llm"]
        assert (await mine.until(1))[0].job_complete.job_id == first
        assert [event.WhichOneof("data") for event in await node.until(4)] == ["job_update", "job_complete"] * 2
        assert service.events == []


async def test_jobs_with_a_model_are_left_out_where_nobody_wants_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    stored = EventMaker.stored

    async def noted(self: EventMaker, entries: Sequence[StoredEvent]) -> list[Happening]:
        made.extend(entry.job.job_id for entry in entries)
        return await stored(self, entries)

    monkeypatch.setattr(EventMaker, "stored", noted)
    await desk.add_node()
    await desk.add_node("llm0", job_types=[types_pb2.JOB_TYPE_LLM_INFERENCE], models=())
    async with listening(desk, without_model=True, kinds=frozenset({"job_update"})) as graphs:
        await desk.submit()
        plain = await desk.submit(job_type="llm_inference", payload={"prompt": "x"})
        assert [event.job_update.job_id for event in await graphs.until(1)] == [plain]
        assert made == [plain]


async def test_a_job_comes_first_as_it_is_and_nothing_older_after_it(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    claim = await desk.start()
    async with listening(desk, job_id=job_id, first=1) as listener:
        now = listener.events[0].job_update
        assert now.status == types_pb2.JOB_STATUS_RUNNING and not listener.events[0].HasField("id")
        assert not now.HasField("payload")
        await desk.complete(claim)
        await listener.until(2)
        assert listener.events[1].job_complete.version > now.version
    async with listening(desk, job_id=job_id, first=1) as listener:
        assert listener.kinds == ["job_complete"]
    async with listening(desk, job_id="nobody") as listener:
        await desk.submit()
        assert listener.events == []


async def test_versions_never_go_back_however_attach_and_change_meet(desk: Desk) -> None:
    await desk.add_node()
    for turns in range(12):
        job_id = await desk.submit()
        listener = Listener(desk, job_id=job_id)
        for _ in range(turns):
            await asyncio.sleep(0)
        await desk.run_next()
        await listener.until_kind("job_complete")
        versions = [getattr(event, kind_of(event)).version for event in listener.events]
        assert versions == sorted(set(versions))
        listener.task.cancel()
        await asyncio.wait([listener.task])


class LateReads:
    """A job store whose reads come after what `before` does: a change right between attaching and looking."""

    def __init__(self, jobs: JobStore, before: Callable[[], Awaitable[object]]) -> None:
        self._jobs = jobs
        self._before = before

    async def get(self, job_id: str) -> JobRecord | None:
        await self._before()
        return await self._jobs.get(job_id)


async def test_what_the_snapshot_knows_is_not_told_again(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    async with listening(desk) as other:
        monkeypatch.setattr(desk.hub, "_jobs", LateReads(desk.store.jobs, desk.run_next))
        async with listening(desk, job_id=job_id, first=1) as listener:
            monkeypatch.undo()
            await wait_until(lambda: other.kinds[-1:] == ["job_complete"])
            await desk.queue.cancel(await desk.submit())
            await wait_until(lambda: other.kinds[-2:] == ["job_update", "job_complete"])
            assert listener.kinds == ["job_complete"]


async def test_watch_job_ends_with_the_end(desk: Desk) -> None:
    await desk.add_node()
    job_id = await desk.submit()
    seen: list[str] = []

    def note(event: types_pb2.Event) -> None:
        seen.append(kind_of(event))

    async def watch() -> None:
        async with aclosing(desk.hub.watch_job(job_id)) as events:
            async for event in events:
                note(event)

    task = asyncio.create_task(watch())
    await wait_until(lambda: seen)
    await desk.run_next()
    await asyncio.wait_for(task, 50)
    assert seen[0] == "job_update" and seen[-1] == "job_complete" and seen.count("job_complete") == 1
    seen.clear()
    await asyncio.wait_for(watch(), 50)
    assert seen == ["job_complete"]
    with pytest.raises(FleetError) as caught:
        await anext(desk.hub.watch_job("nobody"))
    assert caught.value.reason == "JOB_NOT_FOUND"


async def test_since_goes_on_where_the_listener_left(desk: Desk) -> None:
    await desk.add_node()
    async with listening(desk, kinds=frozenset({"job_update", "job_complete"})) as listener:
        for _ in range(3):
            await desk.submit()
            await desk.run_next()
        everything = list(await listener.until(9))
    async with listening(desk, since=everything[3].id, first=5) as again:
        assert [event.id for event in again.events] == [event.id for event in everything[4:]]
        await desk.submit()
        await again.until(6)
    async with listening(desk, since="0", kinds=frozenset({"job_update", "job_complete"}), first=10) as all_kept:
        assert [event.id for event in all_kept.events[:9]] == [event.id for event in everything]
    # A fresh process makes the same events from the store alone.
    assert [event.SerializeToString(deterministic=True) for event in all_kept.events[3:9]] == [
        event.SerializeToString(deterministic=True) for event in everything[3:9]
    ]


async def test_replay_tells_the_same_after_a_restart(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path) as desk:
        await desk.add_node()
        async with listening(desk, kinds=frozenset({"job_complete"})) as listener:
            await desk.submit()
            await desk.run_next()
            (told,) = await listener.until(1)
    kinds = frozenset({"job_complete"})
    async with desk_on(store, tmp_path) as later, listening(later, since="0", kinds=kinds, first=1) as listener:
        assert listener.events[0] == told and listener.events[0] is not told


@pytest.mark.parametrize("since", ["nonsense", "99999999999999-0", "1-1"])
async def test_an_unknown_or_trimmed_id_gives_a_gap_first(desk: Desk, since: str) -> None:
    await desk.submit()
    expected = 2 if since == "1-1" else 1
    async with listening(desk, since=since, kinds=frozenset({"job_update"}), first=expected) as listener:
        gap = listener.events[0].gap
        assert gap.since == since and gap.oldest_id and not listener.events[0].HasField("id")
        await desk.submit()
        await listener.until(expected + 1)
        assert listener.kinds[1:] == ["job_update"] * expected


async def test_a_listener_who_takes_nothing_loses_no_change(store: Store, tmp_path: Path) -> None:
    async with desk_on(store, tmp_path, events=EventSettings(mailbox=4, page=5, batch=3)) as desk:
        await desk.add_node()
        async with aclosing(desk.hub.watch(EventFilter(kinds=frozenset({"job_update", "job_complete"})))) as slow:
            first = await first_of(desk, slow)
            async with listening(desk, kinds=frozenset({"job_update", "job_complete"})) as fast:
                await desk.run_next()
                for _ in range(12):
                    await desk.submit()
                    await desk.run_next()
                await fast.until(38)
                ids = [first.id] + [(await anext(slow)).id for _ in range(38)]
                assert ids[1:] == [event.id for event in fast.events]
                await desk.submit()
                assert (await anext(slow)).id == (await fast.until(39))[-1].id


async def test_trimmed_events_are_told_as_a_gap(store: Store, tmp_path: Path, valkey: Server) -> None:
    settings = EventSettings(mailbox=2, page=5)
    async with desk_on(store, tmp_path, events=settings) as desk, aclosing(desk.hub.watch(EventFilter())) as slow:
        await first_of(desk, slow)
        async with listening(desk) as fast:
            for _ in range(6):
                await desk.submit()
            await fast.until(6)
        trim(valkey, fast.events[-1].id, keep=2)
        gap = await anext(slow)
        assert kind_of(gap) == "gap"
        ids = [(await anext(slow)).id for _ in range(2)]
        assert ids == [event.id for event in fast.events[-2:]]


def trim(valkey: Server, newest: str, keep: int) -> None:
    """Cuts the stream that holds the event `newest` down to its last `keep`."""
    with redis.Redis(unix_socket_path=str(valkey.path), protocol=2) as raw:
        (key,) = [name for name in raw.keys("*:events") if raw.xrange(name, newest, newest)]
        raw.xtrim(key, maxlen=keep, approximate=False)


async def test_what_was_not_for_a_listener_is_no_gap_when_it_is_trimmed(
    store: Store, tmp_path: Path, valkey: Server
) -> None:
    settings = EventSettings(mailbox=2, page=5)
    async with desk_on(store, tmp_path, events=settings) as desk:
        slow = desk.hub.watch(EventFilter(cluster="lab"))
        coming = asyncio.ensure_future(anext(slow))
        await wait_until(lambda: desk.hub.listeners)
        async with aclosing(slow), listening(desk) as fast:
            await desk.submit(target_cluster="lab")
            await coming
            for _ in range(6):
                await desk.submit()
            trim(valkey, (await fast.until(7))[-1].id, keep=1)
            for _ in range(4):
                await desk.submit(target_cluster="lab")
            await fast.until(11)
            assert [await anext(slow) for _ in range(4)] == fast.events[7:]


async def test_events_go_on_after_the_store_was_killed_and_came_back(tmp_path: Path, short_path: Path) -> None:
    def start() -> tuple[Generator[Server, None, None], Server]:
        running = cast(Generator[Server, None, None], run_server(short_path, cluster=False))
        return running, next(running)

    running, server = start()
    try:
        async with open_store(server.url) as store, desk_on(store, tmp_path) as desk:
            await desk.add_node()
            await desk.submit()
            async with listening(desk, kinds=frozenset({"job_update", "job_complete"})) as listener:
                claim = await desk.start()
                await listener.until(1)
                # Closing the server's iterator kills it.
                await asyncio.to_thread(running.close)
                running, _ = await asyncio.to_thread(start)
                await desk.complete(claim)
                await listener.until(2)
                assert listener.kinds == ["job_update", "job_complete"]
    finally:
        running.close()
