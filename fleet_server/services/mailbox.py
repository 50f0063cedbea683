"""What waits for one listener: bounded, ends never lost, of progress the latest alone."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from fleet.v1 import types_pb2

from fleet_server.services.progress import merged


@dataclass(frozen=True, slots=True)
class Happening:
    """An event and what it is about. `id` is "" where it is not stored; one object is shared by all listeners.

    `subject` is whose latest tick replaces the one before: the job's or the node's where it is "".
    """

    event: types_pb2.Event
    kind: str
    id: str = ""
    job_id: str = ""
    node_id: str = ""
    clusters: frozenset[str] = frozenset()
    version: int = 0
    service_names: frozenset[str] = frozenset()
    subject: str = ""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What a listener wants: only events about what is named, all of it; a gap always."""

    kinds: frozenset[str] = frozenset()
    job_id: str | None = None
    node_id: str | None = None
    service_id: str | None = None
    cluster: str | None = None
    job_types: frozenset[str] = frozenset()
    """Events of jobs of other types may be left out."""
    without_model: bool = False
    """And those of jobs that run with a model of the catalogue."""
    hurried: Callable[[], bool] = lambda: True
    """Whether events are to come at once now; else a little later they do as well."""
    previews: bool = False
    since: str | None = None

    def takes(self, happening: Happening) -> bool:
        """Whether the event is for this listener."""
        if happening.kind == "gap":
            return True
        if self.kinds and happening.kind not in self.kinds:
            return False
        # Beats are many and few look at them: they come where they are asked for by name.
        if happening.kind == "node_heartbeat" and happening.kind not in self.kinds:
            return False
        return (
            (self.service_id is None or self.service_id in happening.service_names)
            and self.job_id in (None, happening.job_id)
            and self.node_id in (None, happening.node_id)
            and (self.cluster is None or self.cluster in happening.clusters)
        )

    def may_take(self, kind: str, job_type: str, has_model: bool) -> bool:
        """Whether an event of this kind, about such a job (type "": about none), can be for this listener."""
        if not self.takes_kind(kind) or (has_model and self.without_model):
            return False
        return not job_type or not self.job_types or job_type in self.job_types

    def takes_kind(self, kind: str) -> bool:
        """Whether events of this kind can be for this listener."""
        return not self.kinds or kind in self.kinds


class Mailbox:
    """A listener's events. Stored ones wait up to `limit`; when more come they are dropped and `behind` is set: the
    listener reads them from the store again. Of ticks the latest of each subject waits, at most `ticks_limit`.
    """

    def __init__(self, wanted: EventFilter, *, limit: int, ticks_limit: int) -> None:
        self.wanted = wanted
        self.behind = False
        self.passed = ""
        """The newest event that came while nothing waited and that was not for this listener."""
        self.closed: Exception | None = None
        self._limit = limit
        self._ticks_limit = ticks_limit
        self._stored: deque[Happening] = deque()
        self._ticks: OrderedDict[str, Happening] = OrderedDict()
        self._some = asyncio.Event()

    def put(self, happening: Happening) -> None:
        """A state change. Never waits."""
        if not self.wanted.takes(happening):
            self.pass_by(happening.id)
            return
        if happening.kind == "job_complete":
            # A tick of what has ended would come after the end.
            self._ticks.pop(happening.job_id, None)
        if not self.behind:
            if len(self._stored) >= self._limit:
                self.fall_behind()
            else:
                self._stored.append(happening)
        self._some.set()

    def pass_by(self, event_id: str) -> None:
        """A state change that is not for this listener."""
        if not self._stored and not self.behind:
            self.passed = event_id

    def fall_behind(self) -> None:
        """The listener has to read the store from its place on."""
        self._stored.clear()
        self.behind = True
        self._some.set()

    def put_tick(self, happening: Happening) -> None:
        """What the next of its kind replaces, but for a text that goes on. Never waits."""
        if not self.wanted.takes(happening):
            return
        subject = happening.subject or happening.job_id or happening.node_id
        before = self._ticks.get(subject)
        self._ticks[subject] = happening if before is None else _with_text(before, happening)
        if len(self._ticks) > self._ticks_limit:
            self._ticks.popitem(last=False)
        self._some.set()

    def close(self, error: Exception) -> None:
        """Ends the listener with this error, once it has taken what waits."""
        self.closed = error
        self._some.set()

    def begin(self) -> None:
        """The listener reads the store now: from here on events wait again, for what comes after."""
        self.behind = False
        self._stored.clear()

    async def take(self) -> Happening | None:
        """The next event, state changes before ticks; None if `behind`. Raises what the mailbox was closed with."""
        while True:
            if self.behind:
                return None
            if self._stored:
                return self._stored.popleft()
            if self._ticks:
                return self._ticks.popitem(last=False)[1]
            if self.closed is not None:
                raise self.closed
            self._some.clear()
            await self._some.wait()


def _with_text(before: Happening, after: Happening) -> Happening:
    """`after`, with the text that a listener would miss without `before`."""
    if after.kind != "job_progress" or not before.event.job_progress.HasField("text"):
        return after
    event = types_pb2.Event(time=after.event.time)
    event.job_progress.CopyFrom(merged(before.event.job_progress, after.event.job_progress))
    return replace(after, event=event)
