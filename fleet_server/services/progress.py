"""Progress of running jobs: in memory, the latest wins, shared by all who watch."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from fleet.v1.types_pb2 import JobProgress

_TEXT_LIMIT = 65_536


class ProgressHub:
    """The last tick of each running job, of this replica's agents and those relayed by others, and who listens.

    Ticks are lossy by design: a listener gets at most one per job and interval, a slow one the newest alone. Ends are
    no ticks; they come as stored events.
    """

    def __init__(self, *, interval_seconds: float = 0.1, jobs_limit: int = 10_000, backlog: int = 1_024) -> None:
        self._interval = interval_seconds
        self._jobs_limit = jobs_limit
        self._backlog = backlog
        self._latest: OrderedDict[str, JobProgress] = OrderedDict()
        self._listeners: set[_Listener] = set()
        self._previewers: dict[str, int] = {}
        self._preview_all = 0
        self._audience: list[Callable[[], None]] = []

    def latest(self, job_id: str) -> JobProgress | None:
        """The last tick of a job, without preview; None before the first and after `forget`. Not to be changed."""
        return self._latest.get(job_id)

    def publish(self, progress: JobProgress, *, relayed: bool = False) -> None:
        """Takes a tick over (the caller changes it no more) and offers it to all who listen. Never waits.

        `relayed`: it came from another replica.
        """
        job_id = progress.job_id
        plain = _without_preview(progress)
        self._latest[job_id] = plain
        self._latest.move_to_end(job_id)
        if len(self._latest) > self._jobs_limit:
            self._latest.popitem(last=False)
        for listener in self._listeners:
            if relayed and listener.local:
                continue
            if listener.job_ids is None or job_id in listener.job_ids:
                listener.offer(progress if listener.previews else plain)

    def forget(self, job_id: str) -> None:
        """The attempt ended: its last tick is stale."""
        self._latest.pop(job_id, None)

    def previews_wanted(self, job_id: str) -> bool:
        """Whether somebody looks at pictures of this job in the making."""
        return self._preview_all > 0 or job_id in self._previewers

    def previewed(self) -> Collection[str] | None:
        """The jobs whose pictures in the making somebody here looks at; None: everybody's. The relay does not count."""
        looking = [listener.job_ids for listener in self._listeners if listener.previews and not listener.local]
        if any(job_ids is None for job_ids in looking):
            return None
        return frozenset().union(*(job_ids for job_ids in looking if job_ids is not None))

    @asynccontextmanager
    async def subscribe(
        self,
        job_ids: Collection[str] | None = None,
        previews: bool = False,
        *,
        local: bool = False,
        interval_seconds: float | None = None,
    ) -> AsyncIterator[AsyncIterator[JobProgress]]:
        """Ticks of these jobs (None: of all) published from now on, each job at most 10 times a second.

        `local`: for another replica, so only those of our own agents. The iterator never ends by itself. Waiting for
        its next tick may be given up and begun again.
        """
        interval = self._interval if interval_seconds is None else interval_seconds
        wanted = None if job_ids is None else frozenset(job_ids)
        listener = _Listener(wanted, previews, interval, self._backlog, local)
        self._listeners.add(listener)
        if previews:
            self._count_previews(listener.job_ids, 1)
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            if previews:
                self._count_previews(listener.job_ids, -1)

    def subscribe_audience(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener()` when somebody begins to look at previews, or the last one stops; it must not wait.

        Returns how to end it.
        """
        self._audience.append(listener)
        return lambda: self._audience.remove(listener)

    def _count_previews(self, job_ids: frozenset[str] | None, change: int) -> None:
        before = bool(self._preview_all), len(self._previewers)
        if job_ids is None:
            self._preview_all += change
        for job_id in job_ids or ():
            count = self._previewers.get(job_id, 0) + change
            if count:
                self._previewers[job_id] = count
            else:
                self._previewers.pop(job_id, None)
        if before != (bool(self._preview_all), len(self._previewers)):
            for listener in tuple(self._audience):
                listener()


class _Listener:
    def __init__(
        self, job_ids: frozenset[str] | None, previews: bool, interval: float, backlog: int, local: bool
    ) -> None:
        self.job_ids = job_ids
        self.local = local
        self.previews = previews
        self._interval = interval
        self._backlog = backlog
        self._pending: OrderedDict[str, JobProgress] = OrderedDict()
        self._sent: OrderedDict[str, float] = OrderedDict()
        self._some = asyncio.Event()

    def offer(self, progress: JobProgress) -> None:
        before = self._pending.get(progress.job_id)
        self._pending[progress.job_id] = progress if before is None else merged(before, progress)
        if len(self._pending) > self._backlog:
            self._pending.popitem(last=False)
        self._some.set()

    def __aiter__(self) -> _Listener:
        return self

    async def __anext__(self) -> JobProgress:
        """The next tick that is due. May be cancelled and asked again."""
        clock = asyncio.get_running_loop().time
        while True:
            self._some.clear()
            now = clock()
            soonest: float | None = None
            for job_id in self._pending:
                at = self._sent.get(job_id, now - self._interval) + self._interval
                if at <= now:
                    return self._take(job_id, now)
                soonest = at if soonest is None else min(soonest, at)
            try:
                async with asyncio.timeout_at(soonest):
                    await self._some.wait()
            except TimeoutError:
                continue

    def _take(self, job_id: str, now: float) -> JobProgress:
        self._sent[job_id] = now
        self._sent.move_to_end(job_id)
        if len(self._sent) > self._backlog:
            self._sent.popitem(last=False)
        return self._pending.pop(job_id)


def _without_preview(progress: JobProgress) -> JobProgress:
    if not progress.HasField("preview"):
        return progress
    plain = JobProgress()
    plain.CopyFrom(progress)
    plain.ClearField("preview")
    return plain


def merged(before: JobProgress, after: JobProgress) -> JobProgress:
    """`after`, with what of `before` a listener would miss: text that continues, and a preview not replaced.

    Neither is changed; it may be `after` itself.
    """
    keeps_preview = before.HasField("preview") and not after.HasField("preview")
    continues = (
        before.HasField("text")
        and after.HasField("text")
        and before.attempt == after.attempt
        and before.text_offset + len(before.text) == after.text_offset
        and len(before.text) + len(after.text) <= _TEXT_LIMIT
    )
    if not keeps_preview and not continues and not (before.HasField("text") and not after.HasField("text")):
        return after
    both = JobProgress()
    both.CopyFrom(after)
    if keeps_preview:
        both.preview.CopyFrom(before.preview)
    if continues:
        both.text = before.text + after.text
        both.text_offset = before.text_offset
    elif before.HasField("text") and not after.HasField("text") and before.attempt == after.attempt:
        both.text = before.text
        both.text_offset = before.text_offset
    return both
