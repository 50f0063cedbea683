"""The way in: one job is one script, a batch is staged in chunks and committed at once."""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import orjson

from fleet_server.domain.errors import FleetError, Violation
from fleet_server.domain.job import Lane, NewJob
from fleet_server.store._room import Room
from fleet_server.store.client import Argument, StoreFullError
from fleet_server.store.job_reads import positions
from fleet_server.store.memory import MemoryGuard
from fleet_server.store.records import Idempotency, Submitted

CHUNK = 50
MAX_ALONG = 128
MAX_ALONG_BYTES = 256 * 1024
"""A batch within these bounds is one step of the store; a larger one is staged."""
MAX_TOGETHER = 32
MAX_TOGETHER_BYTES = 64 * 1024
GATHER_SECONDS = 0.003
"""Submits of one job that come in crowds go together; the next sets out so long after the last, at the earliest."""
CROWD = 4

_Waiting = tuple[list[str], list[Argument], int, asyncio.Future[Any]]
MAX_BATCH = 1000
MAX_WITH_CHILDREN = 4000
"""Jobs of one submit, children of groups included: what one step of the store makes visible at once."""
MAX_STAGINGS = 3


@lru_cache(maxsize=1_024)
def encode_lane(lane: Lane) -> bytes:
    """A lane's definition as kept in the `lanes` hash."""
    return orjson.dumps(asdict(lane))


def _fields(job: NewJob, callback: bool) -> list[Argument]:
    fields: list[Argument] = ["ty", job.lane.job_type, "pr", job.priority.value, "cl", job.lane.cluster]
    fields += ["ln", job.lane.lane_id, "to", job.timeout_ms, "qt", job.queue_ttl_ms]
    fields += ["mr", job.max_retries]
    if job.lane.model:
        fields += ["mo", job.lane.model]
    if job.owner:
        fields += ["ow", job.owner]
    if job.schedule_ms is not None:
        fields += ["sc", job.schedule_ms]
    if callback:
        fields += ["cb", 1]
    if job.after:
        fields += ["af", "\0".join(job.after)]
    if job.group_job_id:
        fields += ["gj", job.group_job_id]
    if job.child_job_ids:
        fields += ["kn", len(job.child_job_ids)]
    if job.exclusive:
        fields += ["xc", 1]
    if job.inputs:
        fields += ["iu", "\0".join(job.inputs)]
    return fields


def _spelled(jobs: Sequence[NewJob], callbacks: Collection[str]) -> list[Argument]:
    """Jobs as scripts take several of them."""
    flat: list[Argument] = []
    for job in jobs:
        fields = _fields(job, job.job_id in callbacks)
        flat += [job.job_id, job.spec, len(fields) // 2, *fields]
    return flat


class _Crowd:
    """Submits of one job each on their way: those that come while others are under way go together after them."""

    def __init__(self, room: Room, limit: int) -> None:
        self._room = room
        self._limit = limit
        self._waiting: deque[_Waiting] = deque()
        self._under_way = False

    def join(self, keys: list[str], args: list[Argument], size: int) -> asyncio.Future[Any]:
        """The store's reply to this one, or what became of the whole step."""
        loop = asyncio.get_running_loop()
        reply: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((keys, args, size, reply))
        if not self._under_way:
            self._under_way = True
            loop.call_soon(self._send)
        return reply

    def _send(self) -> None:
        group: list[_Waiting] = []
        size = 0
        while self._waiting and len(group) < MAX_TOGETHER and size < MAX_TOGETHER_BYTES:
            group.append(self._waiting.popleft())
            size += group[-1][2]
        if not group:
            self._under_way = False
            return
        keys = [key for one in group for key in one[0]]
        args = [value for one in group for value in one[1]]
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            reply = self._room.bulk.post("submit", keys, self._room.args(self._limit, *args))
        except FleetError as error:
            self._tell(group, error)
            loop.call_soon(self._send)
            return
        reply.add_done_callback(lambda done: self._came(group, done, begun))

    def _came(self, group: list[_Waiting], done: asyncio.Future[Any], begun: float) -> None:
        error = done.exception()
        if error is not None:
            self._tell(group, error)
        else:
            for (_, _, _, reply), row in zip(group, done.result(), strict=True):
                if not reply.done():
                    reply.set_result(row)
        loop = asyncio.get_running_loop()
        pause = begun + GATHER_SECONDS - loop.time() if len(group) >= CROWD else 0.0
        loop.call_later(max(0.0, pause), self._send)

    def _tell(self, group: list[_Waiting], error: BaseException) -> None:
        for _, _, _, reply in group:
            if not reply.done():
                reply.set_exception(error)


def _in_groups(jobs: Sequence[NewJob]) -> list[NewJob]:
    """The jobs with what groups hand on to their children. Raises ValueError where groups and children differ."""
    groups = {job.job_id: job for job in jobs if job.child_job_ids}
    children: dict[str, list[str]] = {job_id: [] for job_id in groups}
    found: list[NewJob] = []
    for job in jobs:
        if job.group_job_id:
            group = groups.get(job.group_job_id)
            if group is None or job.child_job_ids:
                raise ValueError(f"group_job_id: {job.group_job_id} is no group of this submit")
            children[job.group_job_id].append(job.job_id)
            schedule_ms = job.schedule_ms if job.schedule_ms is not None else group.schedule_ms
            after = tuple(dict.fromkeys(job.after + group.after))
            found.append(replace(job, after=after, schedule_ms=schedule_ms))
        else:
            found.append(job)
    for job_id, group in groups.items():
        if tuple(children[job_id]) != group.child_job_ids:
            raise ValueError(f"child_job_ids: give the children of {job_id} in the same submit, in order")
    return found


class JobSubmitter:
    """See `submit`."""

    def __init__(self, room: Room, memory: MemoryGuard) -> None:
        self._room = room
        self._memory = memory
        self._crowds: dict[int, _Crowd] = {}

    async def submit(
        self,
        jobs: Sequence[NewJob],
        *,
        idempotency: Idempotency | None = None,
        limit: int = 1_000_000,
        callbacks: Collection[str] = (),
        posted: Callable[[], None] | None = None,
    ) -> Submitted:
        """Accepts 1 to 1,000 jobs, all or none; when it returns they are logged as the store's durability says.

        Groups' children come besides, each after its group, 4,000 in all; only what is no child is answered with.
        A job of whose `after` one has failed or been cancelled already is accepted and cancelled at once.

        `callbacks` are the job ids that want a webhook row at their end. The same idempotency key and
        fingerprint within 24 h gives the first job ids with `replayed`. A job id that exists with the very same
        spec is that job, accepted again. Raises IDEMPOTENCY_KEY_REUSED (other fingerprint), QUEUE_FULL (over
        `limit` queued jobs or 80 % of the store's memory), INVALID_FIELD (`job_id` is taken by another job, or too
        many children), JOB_NOT_FOUND (`after` names an unknown job, or a later one of the same submit).

        `posted`, for one job alone, is called once its submit is on the way by the connection of claims: those that
        are posted from then on come after it, and in the same batch if that is at once.
        """
        alone = sum(1 for job in jobs if not job.group_job_id)
        if not 1 <= alone <= MAX_BATCH:
            raise ValueError(f"jobs: give 1 to {MAX_BATCH}; got {alone}")
        if len(jobs) > MAX_WITH_CHILDREN:
            detail = f"they make {len(jobs)} jobs, and one call may make {MAX_WITH_CHILDREN}; use several calls"
            raise FleetError("INVALID_FIELD", f"jobs: {detail}", violations=[Violation("jobs", detail)])
        jobs = _in_groups(jobs)
        await self._memory.admit()
        try:
            if len(jobs) == 1:
                return await self._one(jobs[0], idempotency, limit, callbacks, posted)
            return await self._batch(jobs, idempotency, limit, callbacks)
        except StoreFullError as error:
            raise FleetError("QUEUE_FULL", error.detail) from error

    async def _one(
        self,
        job: NewJob,
        idempotency: Idempotency | None,
        limit: int,
        callbacks: Collection[str],
        posted: Callable[[], None] | None,
    ) -> Submitted:
        own = self._room.keys.job(job.job_id)
        keys = [own, self._room.keys.spec(job.job_id), *(self._key(idempotency) or [own])]
        fields = _fields(job, job.job_id in callbacks)
        print_ = idempotency.fingerprint if idempotency else ""
        args = [print_, job.job_id, encode_lane(job.lane), job.spec, len(fields) // 2, *fields]
        if posted is None:
            reply = await self._crowd(limit).join(keys, args, len(job.spec))
        else:
            reply_of = self._room.dispatch.post("submit", keys, self._room.args(limit, *args))
            posted()
            reply = (await reply_of)[0]
        ids, replayed = self._accepted(reply, limit, [job])
        if replayed:
            return await self._replay(ids)
        return Submitted(ids, (reply[3],), False)

    async def _batch(
        self, jobs: Sequence[NewJob], idempotency: Idempotency | None, limit: int, callbacks: Collection[str]
    ) -> Submitted:
        if len({job.job_id for job in jobs}) < len(jobs):
            raise FleetError("INVALID_FIELD", "jobs: each needs a job_id of its own")
        lanes: dict[str, bytes] = {}
        for job in jobs:
            if job.lane.lane_id not in lanes:
                lanes[job.lane.lane_id] = encode_lane(job.lane)
        ids = [job.job_id for job in jobs]
        alone = [job.job_id for job in jobs if not job.group_job_id]
        keys = [self._room.keys.job(job_id) for job_id in ids]
        print_ = idempotency.fingerprint if idempotency else ""
        along = len(jobs) <= MAX_ALONG and sum(len(job.spec) for job in jobs) <= MAX_ALONG_BYTES
        for _ in range(MAX_STAGINGS):
            chunks = [] if along else await self.stage(jobs, callbacks)
            rest: list[Argument] = [part for lane in lanes.items() for part in lane]
            if along:
                rest += _spelled(jobs, callbacks)
            args = self._room.args(limit, print_, len(ids), len(chunks), ",".join(alone), len(lanes), *rest)
            reply = await self._room.bulk.run("commit", [*keys, *chunks, *self._key(idempotency)], args)
            if reply[0] != b"expired":
                break
        accepted, replayed = self._accepted(reply, limit, jobs)
        if replayed:
            return await self._replay(accepted)
        places: Sequence[int | None] = reply[3]
        if len(places) < len(alone):
            # A repeated step that had succeeded no longer has the staged jobs.
            pairs = [(job.lane.cluster, job.job_id) for job in jobs if not job.group_job_id]
            places = await positions(self._room, pairs)
        return Submitted(accepted, tuple(places), False)

    def _crowd(self, limit: int) -> _Crowd:
        crowd = self._crowds.get(limit)
        if crowd is None:
            crowd = self._crowds[limit] = _Crowd(self._room, limit)
        return crowd

    async def stage(self, jobs: Sequence[NewJob], callbacks: Collection[str] = ()) -> list[str]:
        """Writes the jobs of a batch aside, gone after a minute without commit; the keys of their chunks."""
        batch = uuid.uuid4().hex
        stays: list[str] = []
        for start in range(0, len(jobs), CHUNK):
            chunk = jobs[start : start + CHUNK]
            rest = _spelled(chunk, callbacks)
            stays.append(self._room.keys.staged(batch, start))
            reply = await self._room.bulk.run("stage", stays[-1:], self._room.args(*rest))
            if reply[0] == b"taken":
                raise _taken(f"jobs[{start + reply[1]}].job_id", chunk[reply[1]].job_id)
        return stays

    def _key(self, idempotency: Idempotency | None) -> list[str]:
        if idempotency is None:
            return []
        return [self._room.keys.idempotency(idempotency.owner, idempotency.method, idempotency.key)]

    def _accepted(self, reply: Any, limit: int, jobs: Sequence[NewJob]) -> tuple[tuple[str, ...], bool]:
        """The job ids of a submit's reply and whether an earlier call made them; raises its refusals."""
        if reply[0] == b"ok":
            return tuple(reply[2].decode().split(",")), bool(reply[1])
        if reply[0] == b"reused":
            raise key_reused()
        if reply[0] == b"full":
            raise FleetError(
                "QUEUE_FULL", f"{reply[1]} jobs are queued and {limit} are allowed; submit again when some have run"
            )
        if reply[0] == b"unknown":
            raise _unknown_parent(jobs, *reply[1:])
        if reply[0] == b"taken":
            if len(jobs) == 1:
                raise _taken("job_id", jobs[0].job_id)
            if len(reply) > 1:
                raise _taken(f"jobs[{reply[1]}].job_id", jobs[reply[1]].job_id)
            raise _taken("job_id", "of one of these jobs")
        raise FleetError("STORE_UNAVAILABLE", "the batch took too long to be written; nothing was stored, submit again")

    async def _replay(self, ids: tuple[str, ...]) -> Submitted:
        keys = [key for job_id in ids for key in self._room.keys.whole_job(job_id)]
        rows = await self._room.bulk.run("get", keys, self._room.args())
        wanted: list[tuple[str, str]] = []
        for job_id, row in zip(ids, rows, strict=True):
            record = self._room.whole(job_id, row)
            wanted.append((record.cluster if record else "", job_id))
        return Submitted(ids, tuple(await positions(self._room, wanted)), True)


def key_reused() -> FleetError:
    """The refusal of a second content under one idempotency key."""
    return FleetError(
        "IDEMPOTENCY_KEY_REUSED",
        "request_id: this key was used within 24 hours with other content; use a new key or send the same content",
    )


def _unknown_parent(jobs: Sequence[NewJob], number: int, place: int) -> FleetError:
    """Names the fault by the job's place among those that are no children: a child waits for what its group does."""
    job = jobs[number]
    parent = job.after[place]
    asked = [one for one in jobs if not one.group_job_id]
    group = next((one for one in asked if one.job_id in {job.job_id, job.group_job_id}), job)
    field = f"after[{group.after.index(parent) if parent in group.after else place}]"
    if len(asked) > 1:
        field = f"jobs[{asked.index(group)}].{field}"
    detail = f"no job has the id {parent}; ended jobs are kept 7 days"
    return FleetError("JOB_NOT_FOUND", f"{field}: {detail}", violations=[Violation(field, detail)])


def _taken(field: str, job_id: str) -> FleetError:
    detail = f"another job has the id {job_id}; choose a new one"
    return FleetError("INVALID_FIELD", f"{field}: {detail}", violations=[Violation(field, detail)])
