"""Events of the API, made from what the store and the agents tell: each once, shared by all who listen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord
from fleet_server.services.jobs import job_message
from fleet_server.services.mailbox import Happening
from fleet_server.services.nodes import info_of
from fleet_server.services.ports import Nodes
from fleet_server.services.views import JobViews
from fleet_server.store import JobStore, StoredEvent, decode_node

_KEPT = 2_048
JOB_KINDS = frozenset({"job_update", "job_complete"})


class EventMaker:
    """Makes events. Keeps the newest, so that a listener who reads them again gets the very same objects."""

    def __init__(self, jobs: JobStore, views: JobViews, nodes: Nodes) -> None:
        self._jobs = jobs
        self._views = views
        self._nodes = nodes
        self._kept: OrderedDict[str, Happening] = OrderedDict()

    async def stored(self, entries: Sequence[StoredEvent]) -> list[Happening]:
        """The events of entries of the stream, in order; kinds that this version does not know are left out."""
        missing = [entry for entry in entries if entry.id not in self._kept]
        records = {entry.id: entry.job for entry in missing if entry.type in JOB_KINDS}
        made = await self._job_events(missing, records) if records else {}
        for entry in missing:
            happening = made.get(entry.id) or self._plain(entry)
            if happening is not None and entry.id:
                self._kept[entry.id] = happening
        found = [self._kept[entry.id] for entry in entries if entry.id in self._kept]
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def job_now(self, record: JobRecord, job: types_pb2.Job, time_ms: int) -> Happening:
        """A job as it is, for a listener who has just come; not stored, so without id."""
        event = types_pb2.Event()
        event.time.FromMilliseconds(time_ms)
        kind = "job_complete" if record.state.ended else "job_update"
        getattr(event, kind).CopyFrom(job)
        return Happening(
            event, kind, job_id=record.job_id, node_id=record.node_id, clusters=frozenset({record.cluster}),
            version=record.version,
        )  # fmt: skip

    def node_now(self, node_id: str, time_ms: int) -> Happening | None:
        """A node as it is; None if unknown."""
        info = self._nodes.info(node_id)
        return None if info is None else _node_event(info, "", time_ms)

    def tick(self, progress: types_pb2.JobProgress, cluster: str | None, time_ms: int) -> Happening:
        """A tick of a job."""
        event = types_pb2.Event(job_progress=progress)
        event.time.FromMilliseconds(time_ms)
        clusters = frozenset() if cluster is None else frozenset({cluster})
        return Happening(event, "job_progress", job_id=progress.job_id, node_id=progress.node_id, clusters=clusters)

    def beat(self, heartbeat: types_pb2.Heartbeat, time_ms: int) -> Happening:
        """A beat of a node."""
        event = types_pb2.Event(node_heartbeat=heartbeat)
        event.time.FromMilliseconds(time_ms)
        view = self._nodes.node(heartbeat.node_id)
        clusters = view.clusters if view is not None else frozenset()
        return Happening(event, "node_heartbeat", node_id=heartbeat.node_id, clusters=clusters)

    async def cluster_of(self, job_id: str) -> str | None:
        """The cluster of a job; None if it is unknown by now."""
        spec = self._views.kept(job_id)
        if spec is None:
            record = await self._jobs.get(job_id)
            if record is None:
                return None
            spec = self._views.keep(job_id, types_pb2.JobSpec.FromString(record.spec))
        return spec.target_cluster

    async def _job_events(self, entries: Sequence[StoredEvent], records: dict[str, JobRecord]) -> dict[str, Happening]:
        wanted = list(dict.fromkeys(r.job_id for r in records.values() if self._needs_whole(r)))
        found = await self._jobs.get_many(wanted)
        wholes = {record.job_id: record for record in found if record is not None}
        filled = {event_id: _filled(record, wholes.get(record.job_id)) for event_id, record in records.items()}
        specs = [self._spec(record, wholes.get(record.job_id)) for record in filled.values()]
        filled = dict(zip(filled, await self._views.joined(list(filled.values()), specs), strict=True))
        lives = await self._views.live(list(filled.values()), specs)
        joined = dict(zip(filled, zip(specs, lives, strict=True), strict=True))
        made = {}
        for entry in entries:
            if entry.id in filled:
                record, (spec, live) = filled[entry.id], joined[entry.id]
                event = types_pb2.Event(id=entry.id)
                event.time.FromMilliseconds(entry.time_ms)
                getattr(event, entry.type).CopyFrom(job_message(record, spec, live))
                made[entry.id] = Happening(
                    event,
                    entry.type,
                    id=entry.id,
                    job_id=record.job_id,
                    node_id=record.node_id,
                    clusters=frozenset({record.cluster}),
                    version=record.version,
                )
        return made

    def _needs_whole(self, record: JobRecord) -> bool:
        """Events carry neither spec nor result nor earlier attempts."""
        return (
            record.state.ended
            or record.attempt > 1
            or record.losses > 0
            or record.generation > 1
            or self._views.kept(record.job_id) is None
        )

    def _spec(self, record: JobRecord, whole: JobRecord | None) -> types_pb2.JobSpec:
        kept = self._views.kept(record.job_id)
        if kept is not None:
            return kept
        if whole is not None and whole.spec:
            return self._views.keep(record.job_id, types_pb2.JobSpec.FromString(whole.spec))
        return types_pb2.JobSpec(resolved_model=record.model or None, target_model=record.model or None)

    def _plain(self, entry: StoredEvent) -> Happening | None:
        if entry.type == "node_update":
            row = decode_node(entry.fields)
            # The row says how it was at this event; only what the row does not hold comes from memory.
            info = info_of(row)
            now = self._nodes.info(row.node_id)
            if now is not None:
                info.running_job_ids.MergeFrom(now.running_job_ids[len(info.running_job_ids) :])
                if now.HasField("address"):
                    info.address = now.address
            return _node_event(info, entry.id, entry.time_ms)
        if entry.type == "service_update":
            service = types_pb2.SwarmService.FromString(entry.fields["service"])
            event = types_pb2.Event(id=entry.id, service_update=service)
            event.time.FromMilliseconds(entry.time_ms)
            return Happening(
                event, entry.type, id=entry.id, service_names=frozenset({service.service_id, service.name})
            )
        if entry.type == "container_update":
            container = types_pb2.Container.FromString(entry.fields["message"])
            event = types_pb2.Event(id=entry.id, container_update=container)
            event.time.FromMilliseconds(entry.time_ms)
            return Happening(event, entry.type, id=entry.id, node_id=container.node_id)
        return None


def gap(since: str, oldest_id: str, time_ms: int, *, place: str) -> Happening:
    """Events were lost to a listener; what it gets after comes after `place`."""
    event = types_pb2.Event(gap=types_pb2.Gap(since=since or None, oldest_id=oldest_id or None))
    event.time.FromMilliseconds(time_ms)
    return Happening(event, "gap", id=place)


def _node_event(info: types_pb2.NodeInfo, event_id: str, time_ms: int) -> Happening:
    event = types_pb2.Event(id=event_id or None, node_update=info)
    event.time.FromMilliseconds(time_ms)
    return Happening(event, "node_update", id=event_id, node_id=info.node_id, clusters=frozenset(info.clusters))


def _filled(record: JobRecord, whole: JobRecord | None) -> JobRecord:
    """The record at its event, with what a later reading still says of that moment."""
    if whole is None:
        return record
    result = whole.result if record.state.ended and whole.generation == record.generation else b""
    attempts = whole.attempts
    if whole.version != record.version:
        attempts = tuple(raw for raw in attempts if _before(raw, record))
    return replace(record, result=result, attempts=attempts)


def _before(raw: bytes, record: JobRecord) -> bool:
    return types_pb2.JobAttempt.FromString(raw).end_time.ToMilliseconds() <= record.updated_ms
