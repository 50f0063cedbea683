"""Jobs as callers see them: records of the store joined with their specs, places in line and last ticks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from fleet.v1 import types_pb2

from fleet_server.domain.fetching import NO_SHELF, Shelf
from fleet_server.domain.job import JobRecord, JobState, Lane, Priority, WaitReason, paused
from fleet_server.protojson import JsonCodec
from fleet_server.services.estimates import Estimates
from fleet_server.services.groups import joined
from fleet_server.services.jobs import Live, current, in_line, job_message, ready
from fleet_server.services.lanes import lane_of, serves
from fleet_server.services.pauses import Pauses, held_back
from fleet_server.services.payloads import payload_json
from fleet_server.services.ports import Nodes, Ticks
from fleet_server.store import JobStore

_KEPT_SPECS = 20_000


class JobViews:
    """Makes Jobs. Keeps the newest specs, less their payloads, so that events need no second read of the store."""

    def __init__(
        self,
        jobs: JobStore,
        nodes: Nodes,
        ticks: Ticks,
        codec: JsonCodec,
        pauses: Pauses,
        estimates: Estimates,
        shelf: Shelf = NO_SHELF,
    ) -> None:
        self._jobs = jobs
        self._estimates = estimates
        self._pauses = pauses
        self._nodes = nodes
        self._shelf = shelf
        self._ticks = ticks
        self._codec = codec
        self._specs: OrderedDict[str, types_pb2.JobSpec] = OrderedDict()

    def keep(self, job_id: str, spec: types_pb2.JobSpec) -> types_pb2.JobSpec:
        """Remembers the spec of a job, which never changes; gives what is kept of it."""
        short = types_pb2.JobSpec()
        short.CopyFrom(spec)
        short.ClearField("payload")
        # Lanes are judged by LoRAs too; the rest of the payload is what makes specs large.
        kept = short.payload.image_gen.loras
        for lora in _loras(spec):
            kept.add(name=lora.name)
        if spec.payload.HasField("workflow"):
            short.payload.workflow.needs.extend(spec.payload.workflow.needs)
        self._specs[job_id] = short
        self._specs.move_to_end(job_id)
        while len(self._specs) > _KEPT_SPECS:
            self._specs.popitem(last=False)
        return short

    def kept(self, job_id: str) -> types_pb2.JobSpec | None:
        """What is kept of a job's spec."""
        return self._specs.get(job_id)

    def no_node(self, lane: Lane) -> bool:
        """Whether no registered node could run the lane's jobs, were it online and free."""
        return not any(serves(node, lane, self._shelf) for node in self._nodes.nodes())

    async def obstacle(self, lane: Lane, priority: Priority) -> str | None:
        """Why a new job of that lane would not be in line: PAUSED, NO_NODE or nothing."""
        if paused(await self._pauses.current(), lane.cluster, lane.job_type, priority):
            return WaitReason.PAUSED.value
        return WaitReason.NO_NODE.value if self.no_node(lane) else None

    async def live(self, records: Sequence[JobRecord], specs: Sequence[types_pb2.JobSpec]) -> list[Live]:
        """What is judged when read, for each job; two round trips at most."""
        pauses = await self._pauses.current() if any(map(ready, records)) else ()
        waiting = [record for record in records if in_line(record)]
        found = await self._jobs.queue_positions([(r.cluster, r.job_id) for r in waiting]) if waiting else []
        positions = {record.job_id: position for record, position in zip(waiting, found, strict=True)}
        judged: dict[str, bool] = {}
        lives = []
        for record, spec in zip(records, specs, strict=True):
            if record.state is JobState.RUNNING:
                tick = current(record, self._ticks.latest(record.job_id))
                eta = self._estimates.running(record, tick, lane_of(spec)) if not record.children else None
                lives.append(Live(tick=tick, eta_seconds=eta))
            elif ready(record):
                if held_back(pauses, record):
                    lives.append(Live(paused=True))
                    continue
                # A lane's jobs share the verdict, and one page of a list often is one lane.
                if record.lane_id not in judged or record.lane_id.startswith("mixed:"):
                    judged[record.lane_id] = self.no_node(lane_of(spec))
                lives.append(self._waiting(positions.get(record.job_id), judged[record.lane_id], spec))
            else:
                lives.append(Live())
        return lives

    def _waiting(self, position: int | None, no_node: bool, spec: types_pb2.JobSpec) -> Live:
        eta = None if position is None or no_node else self._estimates.queued(lane_of(spec), position)
        return Live(position=position, no_node=no_node, eta_seconds=eta)

    async def joined(self, records: Sequence[JobRecord], specs: Sequence[types_pb2.JobSpec]) -> list[JobRecord]:
        """The records, those of groups with what their images say; one round trip where there are groups."""
        wanted = [job_id for record, spec in zip(records, specs, strict=True) for job_id in _images(record, spec)]
        if not wanted:
            return list(records)
        found = dict(zip(wanted, await self._jobs.get_many(wanted), strict=True))
        ticks = {job_id: tick.progress for job_id in wanted if (tick := self._ticks.latest(job_id)) is not None}
        return [
            joined(record, [found[job_id] for job_id in spec.child_job_ids], ticks) if record.children else record
            for record, spec in zip(records, specs, strict=True)
        ]

    async def messages(self, records: Sequence[JobRecord], *, payload: bool = True) -> list[types_pb2.Job]:
        """Jobs of whole records, in order."""
        specs = [types_pb2.JobSpec.FromString(record.spec) for record in records]
        records = await self.joined(records, specs)
        lives = await self.live(records, specs)
        return [
            job_message(record, spec, live, payload=payload_json(self._codec, spec.payload) if payload else None)
            for record, spec, live in zip(records, specs, lives, strict=True)
        ]

    async def message(self, record: JobRecord, *, payload: bool = True) -> types_pb2.Job:
        """One Job of a whole record."""
        return (await self.messages([record], payload=payload))[0]


def _images(record: JobRecord, spec: types_pb2.JobSpec) -> Sequence[str]:
    return spec.child_job_ids if record.children else ()


def _loras(spec: types_pb2.JobSpec) -> Iterable[types_pb2.LoraUse]:
    kind = spec.payload.WhichOneof("kind")
    if kind == "video_gen":
        return spec.payload.video_gen.loras
    return spec.payload.image_gen.loras if kind == "image_gen" else ()
