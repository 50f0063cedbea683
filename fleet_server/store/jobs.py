"""Jobs in the store: every step is one Lua script, atomic and repeatable with the same arguments."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Claim, JobRecord
from fleet_server.store._room import Room, reason_of, short
from fleet_server.store.client import Argument, gather
from fleet_server.store.file_records import OutputRow
from fleet_server.store.job_reads import JobReader, Lanes
from fleet_server.store.job_submit import JobSubmitter, key_reused
from fleet_server.store.memory import MemoryGuard
from fleet_server.store.reaping import UNWATCHED, ReapErrors, ReapResult, ReapWatch
from fleet_server.store.records import (
    ClaimRequest,
    Completion,
    Held,
    Idempotency,
    Outcome,
    Report,
    decode_job,
    pairs,
)

WEEK_MS = 604_800_000
MAX_CLAIMS = 32
MAX_REPORTS = 32
MAX_REPORTS_BYTES = 128 * 1024
AVOID_MS = 30_000
"""How long a node that failed or lost a job is passed by for it, where another could run it."""

Tokens = list[str]
Claims = list[Claim | None]
Records = list[JobRecord]
MaybeRecords = list[JobRecord | None]
Completions = list[Completion]
Retried = list[JobRecord | FleetError]
Posted = list[tuple[list[int], asyncio.Future[Any]]]


def _optional(value: int | None) -> Argument:
    return "" if value is None else value


def _completion(reply: Any) -> Completion:
    outcome, flat = reply
    return Completion(Outcome(outcome.decode()), flat)


class JobStore(JobSubmitter, JobReader):
    """The life of jobs. The attempt token decides who may write; each move writes its event in the same step.

    Every method raises FleetError STORE_UNAVAILABLE if the store is away or an outcome stays unknown. Records
    returned by moves have no spec, result and attempts (a Claim's job has its spec).
    """

    def __init__(self, room: Room, memory: MemoryGuard) -> None:
        JobSubmitter.__init__(self, room, memory)

    async def claim(self, requests: Sequence[ClaimRequest]) -> Claims:
        """One job for each request, or None: nothing of the lane may go now, or `session` is no longer its node's.

        One batch; requests of a node for one lane are one step of the store. Inside a lane every second claim while
        `high` waits takes a high one, else the priority whose oldest job is oldest after boosts. What is paused is
        passed by. The job is running with `attempt` + 1 afterwards; watchers hear of it at `started`. The same token
        gives the same claim while it is held.

        Owners of a priority take turns by virtual time: the jobs given to each in the whole cluster, counted from the
        level at which the owner came into line. Of two owners who both wait in a lane at a priority, and are served
        from there alone, over any stretch of time one gets at most 2 jobs more than the other. Jobs from elsewhere in
        the cluster count against their owner, for 32 turns at most: between two jobs that an owner who waits is given,
        in whatever lane, any one other is put before them at most 33 times. Who comes into line is level with the
        least served in line, or where they left if that is further on: leaving and coming back gains nothing.
        """
        return await self._claims(requests, self._post_claims(requests)) if requests else []

    async def claim_and_look(self, requests: Sequence[ClaimRequest]) -> tuple[Claims, Lanes]:
        """`claim`, and `lanes` as they are after it, in one round trip."""
        posted = self._post_claims(requests)
        looked = self.post_lanes()
        claims = await self._claims(requests, posted) if requests else []
        return claims, self.read_lanes(await looked)

    def _post_claims(self, requests: Sequence[ClaimRequest]) -> Posted:
        together: dict[tuple[str, ...], list[list[int]]] = {}
        for n, wish in enumerate(requests):
            alike = (wish.lane_id, wish.node_id, wish.session, str(wish.lease_ms), wish.job_id, str(int(wish.avoid)))
            parts = together.setdefault(alike, [[]])
            if len(parts[-1]) == MAX_CLAIMS or (parts[-1] and wish.job_id):
                parts.append([])
            parts[-1].append(n)
        return [
            (
                part,
                self._room.dispatch.post(
                    "claim",
                    [self._room.keys.held(alike[1]), self._room.keys.node(alike[1])],
                    self._room.args(*alike, *(requests[n].token for n in part)),
                ),
            )
            for alike, parts in together.items()
            for part in parts
        ]

    async def _claims(self, requests: Sequence[ClaimRequest], posted: Posted) -> Claims:
        replies = await gather([future for _, future in posted])
        claims: Claims = [None] * len(requests)
        for (part, _), reply in zip(posted, replies, strict=True):
            for n, row in zip(part, reply, strict=True):
                if row is not None:
                    claims[n] = Claim(decode_job(pairs(row[0]), spec=row[1]), requests[n].token)
        return claims

    async def started(self, job_id: str, token: str) -> JobRecord | None:
        """The engine began: `started_ms`, the deadline, and losses count from here on; again: the same.

        None if the token is not the current one.
        """
        return (await self.started_many([(job_id, token)]))[0]

    async def started_many(self, attempts: Sequence[tuple[str, str]]) -> MaybeRecords:
        """As `started`, for (job_id, token) pairs, in order, in as few steps of the store as can be."""
        if not attempts:
            return []
        parts = [attempts[i : i + MAX_REPORTS] for i in range(0, len(attempts), MAX_REPORTS)]
        replies = await gather(
            [
                self._room.dispatch.post(
                    "started",
                    [self._room.keys.job(job_id) for job_id, _ in part],
                    self._room.args(*(value for attempt in part for value in attempt)),
                )
                for part in parts
            ]
        )
        return [None if row is None else short(row) for reply in replies for row in reply]

    async def renew(self, held: Sequence[Held], lease_ms: int) -> Tokens:
        """Prolongs leases and keeps the last progress (no event, no new version).

        Returns the tokens that the agent must drop: not the current one of a running job.
        """
        if not held:
            return []
        rest: list[Argument] = []
        for one in held:
            rest += [one.job_id, one.token, _optional(one.progress), _optional(one.step), _optional(one.steps)]
        keys = [self._room.keys.job(one.job_id) for one in held]
        reply = await self._room.dispatch.run("renew", keys, self._room.args(lease_ms, *rest))
        return [token.decode() for token in reply]

    async def complete(
        self,
        job_id: str,
        token: str,
        *,
        result: bytes,
        outputs: Sequence[OutputRow] = (),
        load_ms: int | None = None,
        run_ms: int | None = None,
        upload_ms: int | None = None,
    ) -> Completion:
        """Success of the attempt `token`: state, result, output rows, webhook row and event in one step.

        The token of an attempt that was lost or given back still wins while the job is queued, never after another
        claim. `already` is the same report again.
        """
        report = Report(job_id, token, result, outputs, load_ms, run_ms, upload_ms)
        return (await self.complete_many([report]))[0]

    async def complete_many(self, reports: Sequence[Report]) -> Completions:
        """As `complete`, for many attempts in as few steps of the store as can be, in order; each stands alone."""
        if not reports:
            return []
        parts: list[list[Report]] = [[]]
        size = 0
        for one in reports:
            weight = len(one.result) + sum(len(row.record) + len(row.making) for row in one.outputs)
            if parts[-1] and (len(parts[-1]) == MAX_REPORTS or size + weight > MAX_REPORTS_BYTES):
                parts.append([])
                size = 0
            parts[-1].append(one)
            size += weight
        replies = await gather([self._post_reports(part) for part in parts])
        return [_completion(row) for reply in replies for row in reply]

    def _post_reports(self, reports: Sequence[Report]) -> asyncio.Future[Any]:
        keys: list[str] = []
        rest: list[Argument] = []
        for one in reports:
            whole = self._room.keys.whole_job(one.job_id)
            keys += [whole[0], whole[2]]
            rest += [one.job_id, one.token, one.result]
            rest += [_optional(one.load_ms), _optional(one.run_ms), _optional(one.upload_ms), len(one.outputs)]
            for row in one.outputs:
                rest += [row.filename, row.created_ms, row.size_bytes, row.record, row.key, row.making, row.home]
        return self._room.dispatch.post("complete", keys, self._room.args(*rest))

    async def fail(
        self,
        job_id: str,
        token: str,
        *,
        error: bytes,
        attempt: bytes,
        retryable: bool,
        backoff_ms: int = 0,
        result: bytes = b"",
        reason: str | None = None,
        avoid_ms: int = AVOID_MS,
    ) -> Completion:
        """Failure of the attempt: queued again (BACKOFF) while retryable and failures <= max_retries, else failed.

        Counted losses are no failures. `attempt` is the encoded fleet.v1.JobAttempt to remember, `result` what came
        about before the failure (kept if this ends the job). `reason` is what `list_dead` finds it by, by default
        that of `error`, an encoded fleet.v1.JobError. The node is to be avoided for `avoid_ms`.
        """
        why = reason_of(error) if reason is None else reason
        rest = (error, attempt, int(retryable), backoff_ms, result, why, avoid_ms)
        return _completion(await self._move("fail", job_id, token, *rest))

    async def release(
        self, job_id: str, token: str, *, attempt: bytes | None = None, stopped: bool = True, session: str = ""
    ) -> bool:
        """Gives a claimed or running job back uncounted, to its old place in line; again: True.

        False if the token is not the current one. `stopped`: its agent says that it does not run there. If it may, an
        exclusive job stays where it is until its lease, which is renewed no more, has ended. With a `session` only
        while that is its node's: a later one knows better what runs there.
        """
        return bool(await self._move("release", job_id, token, attempt or b"", int(stopped), session))

    async def cancel(self, job_id: str, *, error: bytes = b"") -> JobRecord:
        """Ends a queued or running job as cancelled; again: the same record. Raises JOB_NOT_FOUND, JOB_ENDED.

        A group takes its children along; the child of a group is cancelled alone. Whoever waits for the job (`after`)
        is cancelled too, the first 64 at once, the rest by the next sweeps; so at every end but success.
        """
        reply = await self._move("cancel", job_id, error)
        if reply is None:
            raise _unknown(job_id)
        record = short(reply[1])
        if reply[0] == b"ended":
            raise FleetError("JOB_ENDED", f"job_id: job {job_id} has {record.state} already and cannot be cancelled")
        return record

    async def retry(self, job_id: str, *, idempotency: Idempotency | None = None) -> JobRecord:
        """Queues a failed job again: generation + 1, attempt 0, a new place in line.

        A group's failed and cancelled children come along; a child's failed group runs again for that child alone.
        Those who waited for the job in vain stay cancelled. Raises JOB_NOT_FOUND, JOB_NOT_FAILED (also where the
        child's group was cancelled), IDEMPOTENCY_KEY_REUSED.
        """
        return _retried(job_id, await self._post_retry(job_id, uuid.uuid4().hex, idempotency))

    async def retry_many(self, job_ids: Sequence[str], *, operation: str) -> Retried:
        """Redrive: as `retry` for each, in one pipeline; in order, a refusal in the place of its record.

        The same `operation` (1-128 characters) again retries none a second time.
        """
        if not job_ids:
            return []
        replies = await gather([self._post_retry(job_id, operation, None) for job_id in job_ids])
        retried: Retried = []
        for job_id, reply in zip(job_ids, replies, strict=True):
            try:
                retried.append(_retried(job_id, reply))
            except FleetError as refused:
                retried.append(refused)
        return retried

    def _post_retry(self, job_id: str, operation: str, idempotency: Idempotency | None) -> asyncio.Future[Any]:
        keys = [self._room.keys.job(job_id), self._room.keys.whole_job(job_id)[2], *self._key(idempotency)]
        print_ = idempotency.fingerprint if idempotency else ""
        return self._room.bulk.post("retry", keys, self._room.args(job_id, operation, print_))

    async def lose_session(
        self,
        node_id: str,
        session: str,
        *,
        error: bytes,
        error_poison: bytes = b"",
        single_node: bool = False,
        limit: int = 100,
        avoid_ms: int = AVOID_MS,
    ) -> Records:
        """The node's agent began anew: what it ran in `session`, or in any but its current one, is lost at once.

        Exclusive jobs are not: those wait for the end of their lease. `limit` bounds each step, not the whole. Returns
        the jobs as they are afterwards (queued, or failed as poison).
        """
        keys = [self._room.keys.held(node_id), self._room.keys.node(node_id)]
        lost: Records = []
        while True:
            more, *rows = await self._room.dispatch.run(
                "lose_session",
                keys,
                self._room.args(session, error, error_poison or error, int(single_node), limit, avoid_ms),
            )
            lost += [short(row) for row in rows]
            if not more:
                return lost

    async def reap(
        self,
        errors: ReapErrors,
        *,
        hold: bool = False,
        margin_ms: int = 10_000,
        backoff_ms: int = 1_000,
        single_node: bool = False,
        single_node_lanes: Collection[str] = (),
        limit: int = 100,
        avoid_ms: int = AVOID_MS,
        watch: ReapWatch = UNWATCHED,
    ) -> ReapResult:
        """One bounded sweep: expired leases, overdue runs (timeout + `margin_ms`), queue TTLs, due scheduled jobs, and
        dependents whom an end has not reached yet.

        `hold` leaves leases and overdue runs alone (the 60 s after a start or failover). A counted loss requeues at
        the old place; the third, if two nodes saw one (one is enough if `single_node` or the job's lane is one of
        `single_node_lanes`), is poison. An overdue run is a failed attempt. An exclusive job comes back 5 s after the
        end of its lease at the earliest, an overdue one too. Each of the five takes at most `limit`. With a `watch` the
        caller's life sign is given, and a mass loss of nodes and replicas that are gone are reckoned with.
        """
        reply = await self._room.dispatch.run(
            "reap",
            [self._room.keys.events],
            self._room.args(
                limit,
                int(hold),
                margin_ms,
                backoff_ms,
                avoid_ms,
                int(single_node),
                errors.lost,
                errors.poison,
                errors.timeout,
                errors.ttl,
                *watch.args(),
                *single_node_lanes,
            ),
        )
        more, *groups, missing, extended = reply
        requeued, failed, promoted = (tuple(short(row) for row in group) for group in groups)
        return ReapResult(requeued, failed, promoted, bool(more), missing, extended)

    async def purge(
        self,
        *,
        keep_ms: int = WEEK_MS,
        keep_count: int = 200_000,
        keep_dead: int = 10_000,
        limit: int = 100,
    ) -> int:
        """Forgets ended jobs past retention, oldest end first, at most `limit`; how many. Outputs stay.

        The dead list alone is cut to `keep_dead`; its jobs stay as long as others.
        """
        count: int = await self._room.bulk.run(
            "purge", [self._room.keys.events], self._room.args(limit, keep_ms, keep_count, keep_dead)
        )
        return count

    async def _move(self, script: str, job_id: str, *rest: Argument) -> Any:
        job, _, result, attempts = self._room.keys.whole_job(job_id)
        return await self._room.dispatch.run(script, [job, result, attempts], self._room.args(job_id, *rest))


def _retried(job_id: str, reply: Any) -> JobRecord:
    if reply is None:
        raise _unknown(job_id)
    if reply[0] == b"reused":
        raise key_reused()
    record = short(reply[1])
    if reply[0] == b"ok":
        return record
    what = f"job {job_id} is {record.state}" if reply[0] == b"state" else f"its group {record.job_id} is {record.state}"
    raise FleetError("JOB_NOT_FAILED", f"job_id: {what}; only a failed one can be retried")


def _unknown(job_id: str) -> FleetError:
    return FleetError("JOB_NOT_FOUND", f"job_id: no job has the id {job_id}; ended jobs are kept 7 days")
