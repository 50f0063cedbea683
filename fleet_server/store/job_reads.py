"""Reading jobs: whole records, pages, lanes and counts. Nothing here writes."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

from fleet_server.domain.comfy import Need
from fleet_server.domain.job import JobRecord, JobState, Lane, Priority
from fleet_server.store._room import Room, Rows
from fleet_server.store.client import gather
from fleet_server.store.records import LaneView, PageKey

READ_CHUNK = 50
_FOR_EVER_MS = 1 << 60

Records = list[JobRecord]
Lanes = list[LaneView]
Positions = list[int | None]
MaybeRecords = list[JobRecord | None]
Page = tuple[list[JobRecord], PageKey | None]


def decode_lane(lane_id: str, definition: bytes) -> Lane:
    """A lane from its stored definition; a mixed one knows its cluster alone."""
    known = orjson.loads(definition)
    return Lane(
        lane_id=lane_id,
        cluster=known["cluster"],
        job_type=known.get("job_type", ""),
        model=known.get("model", ""),
        loras=tuple(known.get("loras", ())),
        node_id=known.get("node_id", ""),
        labels=tuple((name, value) for name, value in known.get("labels", ())),
        vram_class=known.get("vram_class", 0),
        needs=tuple(Need(**need) for need in known.get("needs", ())),
        engine=known.get("engine", ""),
    )


def _int(value: bytes) -> int | None:
    return int(value) if value else None


async def positions(room: Room, pairs: Sequence[tuple[str, str]]) -> Positions:
    """See `JobReader.queue_positions`."""
    if not pairs:
        return []
    ranks = await gather([room.bulk.post_call("ZRANK", room.keys.waiting(cluster), job) for cluster, job in pairs])
    return [None if rank is None else rank + 1 for rank in ranks]


class JobReader:
    """Each record is one instant of its job; a page is not one instant of the store."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def get(self, job_id: str) -> JobRecord | None:
        """The whole job, read at one instant: short fields, spec, result, attempts."""
        return (await self.get_many([job_id]))[0]

    async def get_many(self, job_ids: Sequence[str]) -> MaybeRecords:
        """As `get`, for many, in the order asked."""
        if not job_ids:
            return []
        chunks = [job_ids[i : i + READ_CHUNK] for i in range(0, len(job_ids), READ_CHUNK)]
        replies = await gather(
            [
                self._room.bulk.post(
                    "get", [key for job in chunk for key in self._room.keys.whole_job(job)], self._room.args()
                )
                for chunk in chunks
            ]
        )
        return [
            self._room.whole(job_id, row)
            for chunk, reply in zip(chunks, replies, strict=True)
            for job_id, row in zip(chunk, reply, strict=True)
        ]

    async def list(
        self,
        *,
        states: Sequence[JobState] = (),
        before: PageKey | None = None,
        limit: int = 100,
        created_after_ms: int | None = None,
        created_before_ms: int | None = None,
        group: str | None = None,
    ) -> Page:
        """Jobs of the states (none given: all), newest created first, whole records; both bounds are exclusive.

        The children of groups are left out; with `group` they alone are listed, the last one first.

        The key of the next page is None at the end; a page may be shorter than `limit` and still have one. A job
        that changed its state between two pages shows at its one place, once at most.
        """
        wanted = tuple(states) or tuple(JobState)
        if group is not None:
            rows, following = await self._room.page([self._room.keys.children(group)], before, limit)
            after, until = created_after_ms or 0, created_before_ms or _FOR_EVER_MS
            children = [one for one in await self._records(rows) if after < one.created_ms < until]
            return [record for record in children if record.state in wanted], following
        rows, following = await self._room.page(
            [self._room.keys.state(state.value) for state in wanted],
            before,
            limit,
            newer_than_ms=created_after_ms,
            older_than_ms=created_before_ms,
        )
        records = await self._records(rows)
        return [record for record in records if record.state in wanted], following

    async def list_dead(
        self,
        *,
        job_type: str | None = None,
        cluster: str | None = None,
        model: str | None = None,
        reason: str | None = None,
        before: PageKey | None = None,
        limit: int = 100,
        examine: int = 1000,
    ) -> Page:
        """Jobs failed for good that match each filter given, newest end first; the newest 10,000 are kept here.

        `model` is the resolved one, `reason` the error's. A page examines at most `examine` jobs, so that it may be
        short, or empty, and still have a next one. A group stands here for its children.
        """
        ceiling, member = ("", "") if before is None else (before.time_ms, before.member)
        filters = [job_type or "", cluster or "", model or "", reason or ""]
        args = self._room.args(ceiling, member, limit, examine, *filters)
        flat, last = await self._room.bulk.run("dead", [self._room.keys.dead], args)
        rows = [(flat[i].decode(), int(flat[i + 1])) for i in range(0, len(flat), 2)]
        records = await self._records(rows)
        following = PageKey(int(last[1]), last[0].decode()) if last else None
        return [record for record in records if record.state is JobState.FAILED], following

    async def _records(self, rows: Rows) -> Records:
        return [record for record in await self.get_many([row[0] for row in rows]) if record is not None]

    async def lanes(self, *, idle: bool = False) -> Lanes:
        """Every lane in which jobs wait in line; with `idle` also those with running or put off jobs alone."""
        return self.read_lanes(await self.post_lanes(idle=idle))

    def post_lanes(self, *, idle: bool = False) -> asyncio.Future[Any]:
        """Asks for the lanes; read the reply with `read_lanes`."""
        return self._room.dispatch.post("lanes", [self._room.keys.events], self._room.args(1 if idle else 0))

    def read_lanes(self, reply: Any) -> Lanes:
        """What `post_lanes` was answered."""
        return [
            LaneView(
                lane=decode_lane(lane_id.decode(), definition),
                waiting=int(waiting),
                running=int(running),
                head_priority=Priority(priority.decode()) if priority else None,
                head_effective_ms=_int(effective),
                oldest_enqueued_ms=_int(oldest),
                paused=bool(paused),
                head_owner=owner.decode(),
                head_owner_lag=float(lag),
                high_waiting=bool(high),
            )
            for (
                lane_id,
                definition,
                waiting,
                running,
                priority,
                effective,
                oldest,
                paused,
                owner,
                lag,
                high,
            ) in reply
        ]

    async def peek(self, lane_id: str, limit: int = 32) -> Records:
        """The next waiting jobs of a lane by effective age, whole records; a look, not a claim."""
        reply = await self._room.dispatch.run("peek", [self._room.keys.events], self._room.args(lane_id, limit))
        records = await self.get_many([job_id.decode() for job_id in reply])
        return [record for record in records if record is not None and record.state is JobState.QUEUED]

    async def queue_positions(self, pairs: Sequence[tuple[str, str]]) -> Positions:
        """For each (cluster, job_id): 1 for the next in its cluster, None if not in line.

        The rank is by enqueue time less boost over the whole cluster, so it reflects priority, not which nodes are
        free.
        """
        return await positions(self._room, pairs)

    async def counts(self) -> dict[JobState, int]:
        """Jobs kept, by state; groups and their children alike."""
        states = list(JobState)
        keys = [key(state.value) for key in (self._room.keys.state, self._room.keys.child_state) for state in states]
        sizes = await gather([self._room.bulk.post_call("ZCARD", key) for key in keys])
        return {state: sizes[n] + sizes[n + len(states)] for n, state in enumerate(states)}

    async def waiting_by_priority(self) -> dict[Priority, int]:
        """Queued jobs by priority, delayed ones included."""
        priorities = list(Priority)
        sizes = await self._room.bulk.call("HMGET", self._room.keys.priorities, *(p.value for p in priorities))
        return {priority: int(size or 0) for priority, size in zip(priorities, sizes, strict=True)}

    async def held_by(self, node_id: str) -> dict[str, str]:
        """What the node runs by the store's book: attempt token -> job id."""
        flat = await self._room.dispatch.call("HGETALL", self._room.keys.held(node_id))
        return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}
