"""Progress of groups, made of the ticks of their images while somebody listens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord, JobState
from fleet_server.services.groups import progress_of_one
from fleet_server.services.views import JobViews
from fleet_server.store import JobStore

_KEPT = 1_024


@dataclass(frozen=True, slots=True)
class _Image:
    """How far an image is, in which generation and attempt of it."""

    generation: int
    attempt: int
    progress: int


@dataclass(slots=True)
class _Known:
    generation: int
    images: dict[str, _Image]
    told_at: float = float("-inf")


class GroupTicks:
    """What is known of the groups whose images tick: the latest of each image, read from the store once.

    A group is told at most once in `interval_seconds`; `clock` is monotonic.
    """

    def __init__(
        self, jobs: JobStore, views: JobViews, *, clock: Callable[[], float], interval_seconds: float = 0.1
    ) -> None:
        self._jobs = jobs
        self._views = views
        self._clock = clock
        self._interval = interval_seconds
        self._groups: OrderedDict[str, _Known] = OrderedDict()

    async def ticked(self, tick: types_pb2.JobProgress) -> types_pb2.JobProgress | None:
        """The tick of the group that this tick's job is an image of; None where it is none, or was told just now."""
        group_id = await self._group_of(tick.job_id)
        if not group_id:
            return None
        known = self._groups.get(group_id) or await self._read(group_id)
        if known is None:
            return None
        known.images[tick.job_id] = _Image(tick.generation, tick.attempt, tick.progress)
        return self._told(group_id, known)

    @property
    def any(self) -> bool:
        """Whether any group is known: else no change of a job tells anything."""
        return bool(self._groups)

    def changed(self, record: JobRecord) -> types_pb2.JobProgress | None:
        """A job changed its state: the tick of its group, where that is known here."""
        if record.children:
            known = self._groups.get(record.job_id)
            if record.state.ended or (known is not None and known.generation != record.generation):
                self._groups.pop(record.job_id, None)
            return None
        known = self._groups.get(record.group_job_id) if record.group_job_id else None
        if known is None:
            return None
        now, before = _image_of(record), known.images.get(record.job_id)
        if before is not None and _overtaken(record, now, before):
            return None
        known.images[record.job_id] = now
        return self._told(record.group_job_id, known)

    async def _group_of(self, job_id: str) -> str:
        spec = self._views.kept(job_id)
        if spec is None:
            record = await self._jobs.get(job_id)
            if record is None:
                return ""
            spec = self._views.keep(job_id, types_pb2.JobSpec.FromString(record.spec))
        return spec.group_job_id

    async def _read(self, group_id: str) -> _Known | None:
        record = await self._jobs.get(group_id)
        if record is None:
            return None
        ids = types_pb2.JobSpec.FromString(record.spec).child_job_ids
        images = zip(ids, await self._jobs.get_many(ids), strict=True)
        known = _Known(
            record.generation,
            {job_id: _Image(0, 0, 0) if image is None else _image_of(image) for job_id, image in images},
        )
        self._groups[group_id] = known
        while len(self._groups) > _KEPT:
            self._groups.popitem(last=False)
        return known

    def _told(self, group_id: str, known: _Known) -> types_pb2.JobProgress | None:
        now = self._clock()
        if now - known.told_at < self._interval:
            return None
        known.told_at = now
        mean = sum(image.progress for image in known.images.values()) // len(known.images)
        return types_pb2.JobProgress(job_id=group_id, progress=mean, generation=known.generation)


def _image_of(record: JobRecord) -> _Image:
    return _Image(record.generation, record.attempt, progress_of_one(record, {}))


def _overtaken(record: JobRecord, now: _Image, before: _Image) -> bool:
    """Whether ticks have told more already: they come sooner than the events of the submit and of the start."""
    order = (now.generation, now.attempt), (before.generation, before.attempt)
    same_run = order[0] == order[1] and record.state is JobState.RUNNING
    return order[0] < order[1] or (same_run and now.progress <= before.progress)
