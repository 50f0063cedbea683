"""Who listens to the fleet, and what each of them is told."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, aclosing, contextmanager
from dataclasses import dataclass

import structlog
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.endings import Ending, Endings
from fleet_server.services.group_ticks import GroupTicks
from fleet_server.services.happenings import JOB_KINDS, EventMaker, gap
from fleet_server.services.listener import Listener, is_event_id, order
from fleet_server.services.mailbox import EventFilter, Happening, Mailbox
from fleet_server.services.ports import Nodes, Ticks
from fleet_server.services.rates import WINDOW_SECONDS, Rates
from fleet_server.services.views import JobViews
from fleet_server.store import EventStore, JobStore, NodeRow, StoredEvent, decode_node

_log = structlog.get_logger("fleet.events")
_ENDED_KEPT = 4_096


@dataclass(frozen=True, slots=True)
class EventSettings:
    """`mailbox` state changes wait for a listener before it has to read them again; `page` are read at once."""

    mailbox: int = 512
    ticks: int = 1_000
    page: int = 500
    batch: int = 64
    retry_seconds: float = 0.5
    ready_seconds: float = 5.0


class EventHub:
    """One subscription to the store's events a process, fanned out. `run` has to be running.

    Listeners get each state change once and in order, however slow they are: what no longer waits in memory is read
    from the store again, and only what has been trimmed there is lost, which a `gap` says. Ticks are lossy.
    """

    def __init__(
        self,
        jobs: JobStore,
        events: EventStore,
        views: JobViews,
        nodes: Nodes,
        ticks: Ticks,
        rates: Rates,
        *,
        clock: Callable[[], int],
        on_node: Callable[[NodeRow], None] = lambda _: None,
        settings: EventSettings | None = None,
        endings: Endings | None = None,
    ) -> None:
        self._jobs = jobs
        self._events = events
        self._views = views
        self._nodes = nodes
        self._ticks = ticks
        self._rates = rates
        self._clock = clock
        self._on_node_row = on_node
        self._settings = settings or EventSettings()
        self._maker = EventMaker(jobs, views, nodes)
        self._boxes: set[Mailbox] = set()
        self._groups = GroupTicks(jobs, views, clock=time.monotonic)
        self._endings = endings or Endings()
        self._entries: asyncio.Queue[StoredEvent] = asyncio.Queue(1_024)
        self._last = ""
        self._began = (0, 0)
        self._beats: dict[str, int] = {}
        self._ended: OrderedDict[str, None] = OrderedDict()
        self._ready = asyncio.Event()
        self._closed: FleetError | None = None

    async def run(self) -> None:
        """Follows the store until cancelled."""
        stop = self._nodes.subscribe_beats(self._on_node)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow(), name="events-follow")
                group.create_task(self._publish(), name="events-publish")
                group.create_task(self._follow_ticks(), name="events-ticks")
                group.create_task(self._recall_rates(), name="events-rates")
        finally:
            stop()

    async def ready(self) -> None:
        """Returns once the hub follows the store. Raises STORE_UNAVAILABLE if that takes too long."""
        if not self._ready.is_set():
            try:
                async with asyncio.timeout(self._settings.ready_seconds):
                    await self._ready.wait()
            except TimeoutError:
                detail = "the store cannot be reached: events cannot be followed"
                raise FleetError("STORE_UNAVAILABLE", detail) from None

    @property
    def listeners(self) -> frozenset[Mailbox]:
        """The mailboxes of those who listen now."""
        return frozenset(self._boxes)

    @property
    def place(self) -> str:
        """The id of the newest event that was taken from the store."""
        return self._last

    def close(self) -> None:
        """The server is being shut down: listeners end with SHUTTING_DOWN after what waits for them."""
        self._closed = FleetError("SHUTTING_DOWN", "the server is being shut down: come again in a moment")
        for box in self._boxes:
            box.close(self._closed)

    def expect_end(self, job_id: str) -> AbstractContextManager[Ending]:
        """Told of the end of a job from here on."""
        return self._endings.expect(job_id)

    async def watch(
        self, wanted: EventFilter, *, listening: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncGenerator[types_pb2.Event, None]:
        """Events as they happen; `listening` is called once, when none that happens from then on can be missed.

        With `since`: those after it first, with a gap before them if some are lost. Else, with a job or a node, that
        object first, as it is now. Events are shared: not to be changed.
        """
        await self.ready()
        with self._listening(wanted) as listener:
            if listening is not None:
                await listening()
            if wanted.since is not None:
                listener.rewind(wanted.since)
            elif (first := await self._now(wanted, listener)) is not None and wanted.takes(first):
                yield first.event
            async with aclosing(self._deliver(listener)) as happenings:
                async for happening in happenings:
                    yield happening.event

    async def watch_job(self, job_id: str, *, previews: bool = False) -> AsyncGenerator[types_pb2.Event, None]:
        """The job as it is, then its changes; ends after job_complete. Raises JOB_NOT_FOUND."""
        await self.ready()
        wanted = EventFilter(job_id=job_id, previews=previews)
        with self._listening(wanted) as listener:
            first = await self._now(wanted, listener)
            if first is None:
                raise FleetError(
                    "JOB_NOT_FOUND", f"there is no job {job_id[:128]!r}: it never was, or ended too long ago"
                )
            yield first.event
            if first.kind == "job_complete":
                return
            async with aclosing(self._deliver(listener)) as happenings:
                async for happening in happenings:
                    yield happening.event
                    if happening.kind == "job_complete":
                        return

    @contextmanager
    def _listening(self, wanted: EventFilter) -> Iterator[Listener]:
        box = Mailbox(wanted, limit=self._settings.mailbox, ticks_limit=self._settings.ticks)
        if self._closed is not None:
            box.close(self._closed)
        self._boxes.add(box)
        try:
            yield Listener(box, self._last)
        finally:
            self._boxes.discard(box)

    async def _now(self, wanted: EventFilter, listener: Listener) -> Happening | None:
        """The job or the node that the listener asks about, as it is; None if unknown or if it asks about neither."""
        if wanted.job_id is not None:
            record = await self._jobs.get(wanted.job_id)
            if record is None:
                return None
            listener.version = record.version
            job = await self._views.message(record, payload=False)
            return self._maker.job_now(record, job, self._clock())
        return None if wanted.node_id is None else self._maker.node_now(wanted.node_id, self._clock())

    async def _deliver(self, listener: Listener) -> AsyncGenerator[Happening, None]:
        box = listener.box
        previews = self._previews(box) if box.wanted.previews and box.wanted.takes_kind("job_progress") else None
        try:
            while True:
                happening = await box.take()
                if happening is None:
                    listener.pass_by(box.passed)
                    box.begin()
                    async with aclosing(self._again(listener)) as missed:
                        async for again in missed:
                            yield again
                else:
                    for one in listener.news(happening):
                        yield one
        finally:
            if previews is not None:
                previews.cancel()
                await asyncio.wait([previews])

    async def _again(self, listener: Listener) -> AsyncGenerator[Happening, None]:
        """What the store holds after the listener's place, as far as it is for them."""
        since = listener.place
        if not is_event_id(since):
            # Never was an id of ours: where it would lie nobody can say.
            listener.place = await self._events.last_id()
            _, oldest = await self._events.read("0", 1)
            yield gap(since, oldest, self._clock(), place=listener.place)
            return
        first = True
        while True:
            entries, oldest = await self._events.read(listener.place, self._settings.page)
            if first and await self._lost(since, oldest):
                if not entries:
                    listener.place = await self._events.last_id()
                yield gap(since, oldest, self._clock(), place=listener.place)
            first = False
            for happening in await self._maker.stored(entries):
                for one in listener.news(happening) if listener.box.wanted.takes(happening) else ():
                    yield one
            if entries:
                listener.place = entries[-1].id
            if len(entries) < self._settings.page or listener.box.behind:
                return

    async def _lost(self, since: str, oldest: str) -> bool:
        """Whether events after `since` are gone: trimmed, or of a store that is no more."""
        if order(since) == (0, 0):
            return False
        if oldest and order(since) < order(oldest):
            return True
        return order(since) > order(await self._events.last_id())

    def _previews(self, box: Mailbox) -> asyncio.Task[None]:
        async def pump() -> None:
            job_ids = None if box.wanted.job_id is None else [box.wanted.job_id]
            async with self._ticks.subscribe(job_ids, previews=True) as ticks:
                async for progress in ticks:
                    if progress.job_id not in self._ended:
                        box.put_tick(await self._tick(progress, [box]))

        return asyncio.create_task(pump(), name="events-previews")

    async def _tick(self, progress: types_pb2.JobProgress, boxes: list[Mailbox]) -> Happening:
        cluster = None
        if any(box.wanted.cluster is not None for box in boxes):
            with contextlib.suppress(FleetError):
                cluster = await self._maker.cluster_of(progress.job_id)
        return self._maker.tick(progress, cluster, self._clock())

    async def _follow_ticks(self) -> None:
        async with self._ticks.subscribe(None, previews=False) as ticks:
            async for progress in ticks:
                boxes = [box for box in self._boxes if not box.wanted.previews]
                if boxes and progress.job_id not in self._ended:
                    happening = await self._tick(progress, boxes)
                    for box in boxes:
                        box.put_tick(happening)
                if self._boxes and progress.job_id not in self._ended:
                    with contextlib.suppress(FleetError):
                        await self._tell_group(await self._groups.ticked(progress))

    async def _tell_group(self, progress: types_pb2.JobProgress | None) -> None:
        if progress is not None and progress.job_id not in self._ended:
            boxes = list(self._boxes)
            happening = await self._tick(progress, boxes)
            for box in boxes:
                box.put_tick(happening)

    def _on_node(self, node_id: str) -> None:
        """A node beat; changes come from the store."""
        boxes = [box for box in self._boxes if "node_heartbeat" in box.wanted.kinds]
        if not boxes:
            return
        heartbeat = self._nodes.heartbeat(node_id)
        if heartbeat is None or heartbeat.heartbeat_time.ToMilliseconds() == self._beats.get(node_id):
            return
        self._beats[node_id] = heartbeat.heartbeat_time.ToMilliseconds()
        happening = self._maker.beat(heartbeat, self._clock())
        for box in boxes:
            box.put_tick(happening)

    async def _follow(self) -> None:
        while True:
            try:
                async with self._events.subscribe(buffer=4_096, hurry=self._awaited) as entries:
                    if self._last:
                        await self._catch_up()
                    else:
                        self._last = await self._events.last_id()
                        self._began = order(self._last)
                    self._ready.set()
                    async for entry in entries:
                        if entry.type == "gap":
                            await self._catch_up()
                        elif order(entry.id) > order(self._last):
                            await self._take(entry)
            except FleetError as error:
                _log.warning("the event stream is interrupted", detail=error.detail)
                await asyncio.sleep(self._settings.retry_seconds)

    def _awaited(self) -> bool:
        return self._endings.awaited or any(box.wanted.hurried() for box in self._boxes)

    async def _recall_rates(self) -> None:
        """Counts what happened before this process began, as far back as the window reaches."""
        await self._ready.wait()
        place = f"{max(0, self._clock() - WINDOW_SECONDS * 1000)}-0"
        with contextlib.suppress(FleetError):
            while True:
                entries, _ = await self._events.read(place, self._settings.page)
                for entry in entries:
                    if order(entry.id) > self._began:
                        return
                    if entry.type in JOB_KINDS:
                        self._rates.note_event(entry.raw)
                if len(entries) < self._settings.page:
                    return
                place = entries[-1].id

    async def _catch_up(self) -> None:
        """Reads what came while nobody listened; what is gone is told as a gap."""
        since = self._last
        first = True
        while True:
            entries, oldest = await self._events.read(self._last, self._settings.page)
            if first and await self._lost(since, oldest):
                if not entries:
                    self._last = await self._events.last_id()
                fields = {"since": since.encode(), "oldest_id": oldest.encode(), "place": self._last.encode()}
                await self._entries.put(StoredEvent("", self._clock(), "gap", fields))
            first = False
            for entry in entries:
                await self._take(entry)
            if len(entries) < self._settings.page:
                break
        self._endings.tell_all()

    async def _take(self, entry: StoredEvent) -> None:
        self._last = entry.id
        if entry.type in JOB_KINDS:
            job_id = entry.raw[b"id"].decode()
            self._rates.note_event(entry.raw)
            self._ended.pop(job_id, None)
            if entry.type == "job_complete":
                self._ended[job_id] = None
                if len(self._ended) > _ENDED_KEPT:
                    self._ended.popitem(last=False)
                self._endings.tell(job_id)
            if self._groups.any:
                await self._tell_group(self._groups.changed(entry.job))
        elif entry.type == "node_update":
            self._on_node_row(decode_node(entry.fields))
        if self._boxes:
            await self._entries.put(entry)

    async def _publish(self) -> None:
        while True:
            batch = [await self._entries.get()]
            while len(batch) < self._settings.batch and not self._entries.empty():
                batch.append(self._entries.get_nowait())
            if not self._boxes:
                continue
            try:
                await self._publish_batch(batch)
            except FleetError as error:
                # The store is away: listeners read this part again once it is back.
                _log.warning("events could not be completed", detail=error.detail)
                for box in self._boxes:
                    box.fall_behind()
                await asyncio.sleep(self._settings.retry_seconds)

    async def _publish_batch(self, batch: list[StoredEvent]) -> None:
        wanted = [entry for entry in batch if entry.type != "gap" and self._wanted(entry)]
        made = {happening.id: happening for happening in await self._maker.stored(wanted)}
        for entry in batch:
            happening = _gap_of(entry) if entry.type == "gap" else made.get(entry.id)
            for box in self._boxes:
                if happening is not None:
                    box.put(happening)
                else:
                    box.pass_by(entry.id)

    def _wanted(self, entry: StoredEvent) -> bool:
        """Whether the event can be for anybody who listens now."""
        raw = entry.raw if entry.type in JOB_KINDS else {}
        job_type = raw.get(b"ki", b"").partition(b"\0")[0].decode()
        return any(box.wanted.may_take(entry.type, job_type, b"mo" in raw) for box in self._boxes)


def _gap_of(entry: StoredEvent) -> Happening:
    since, oldest, place = (entry.fields[name].decode() for name in ("since", "oldest_id", "place"))
    return gap(since, oldest, entry.time_ms, place=place)
