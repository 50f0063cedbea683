"""Jobs in the store: every step is one Lua script, atomic and repeatable with the same arguments."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Claim, JobRecord
from fleet_server.store._room import Room, short
from fleet_server.store.client import Argument, gather
from fleet_server.store.job_reads import JobReader
from fleet_server.store.job_submit import JobSubmitter, key_reused
from fleet_server.store.memory import MemoryGuard
from fleet_server.store.records import (
    ClaimRequest,
    Completion,
    Held,
    Idempotency,
    Outcome,
    OutputRow,
    ReapErrors,
    ReapResult,
    Report,
    decode_job,
    pairs,
)

WEEK_MS = 604_800_000
AVOID_MS = 30_000
"""How long a node that failed or lost a job is passed by for it, where another could run it."""

Tokens = list[str]
Claims = list[Claim | None]
Records = list[JobRecord]
MaybeRecords = list[JobRecord | None]
Completions = list[Completion]
Retried = list[JobRecord | FleetError]


def _optional(value: int | None) -> Argument:
    return "" if value is None else value


def _completion(reply: Any) -> Completion:
    outcome, flat = reply
    return Completion(Outcome(outcome.decode()), short(flat) if flat is not None else None)


class JobStore(JobSubmitter, JobReader):
    """The life of jobs. The attempt token decides who may write; each move writes its event in the same step.

    Every method raises FleetError STORE_UNAVAILABLE if the store is away or an outcome stays unknown. Records
    returned by moves have no spec, result and attempts (a Claim's job has its spec).
    """

    def __init__(self, room: Room, memory: MemoryGuard) -> None:
        JobSubmitter.__init__(self, room, memory)

    async def defer(self, lane_id: str) -> int:
        """Notes that a cold node passed this lane's head by; when it first did since the lane's last claim (ms)."""
        reply = await self._room.dispatch.run("defer", [self._room.keys.events], self._room.args(lane_id))
        return int(reply)

    async def claim(self, requests: Sequence[ClaimRequest]) -> Claims:
        """One job for each request, or None: nothing waits, or `session` is no longer its node's. One batch.

        Inside a lane every second claim while `high` waits takes a high one, else the priority whose oldest job is
        oldest after boosts; owners of that priority take turns. The job is running with `attempt` + 1 afterwards;
        watchers hear of it at `started`. The same token gives the same claim while it is held.
        """
        if not requests:
            return []
        replies = await gather(
            [
                self._room.dispatch.post(
                    "claim",
                    [self._room.keys.held(wish.node_id), self._room.keys.node(wish.node_id)],
                    self._room.args(wish.lane_id, wish.node_id, wish.session, wish.token, wish.lease_ms, wish.job_id),
                )
                for wish in requests
            ]
        )
        return [
            None if reply is None else Claim(decode_job(pairs(reply[0]), spec=reply[1]), wish.token)
            for wish, reply in zip(requests, replies, strict=True)
        ]

    async def started(self, job_id: str, token: str) -> JobRecord | None:
        """The engine began: `started_ms`, the deadline, and losses count from here on; again: the same.

        None if the token is not the current one.
        """
        reply = await self._move("started", job_id, token)
        return None if reply is None else short(reply)

    async def started_many(self, attempts: Sequence[tuple[str, str]]) -> MaybeRecords:
        """As `started`, for (job_id, token) pairs, in order."""
        return [await self.started(job_id, token) for job_id, token in attempts]

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
        rest: list[Argument] = [result, _optional(load_ms), _optional(run_ms), _optional(upload_ms)]
        for row in outputs:
            rest += [row.filename, row.created_ms, row.size_bytes, row.record]
        return _completion(await self._move("complete", job_id, token, *rest))

    async def complete_many(self, reports: Sequence[Report]) -> Completions:
        """As `complete`, for many attempts in as few steps of the store as can be, in order; each stands alone."""
        return [
            await self.complete(
                one.job_id,
                one.token,
                result=one.result,
                outputs=one.outputs,
                load_ms=one.load_ms,
                run_ms=one.run_ms,
                upload_ms=one.upload_ms,
            )
            for one in reports
        ]

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
    ) -> Completion:
        """Failure of the attempt: queued again (BACKOFF) while retryable and failures <= max_retries, else failed.

        Counted losses are no failures. `attempt` is the encoded fleet.v1.JobAttempt to remember, `result` what came
        about before the failure (kept if this ends the job).
        """
        reply = await self._move("fail", job_id, token, error, attempt, int(retryable), backoff_ms, result)
        return _completion(reply)

    async def release(self, job_id: str, token: str, *, attempt: bytes | None = None) -> bool:
        """Gives a claimed or running job back uncounted, to its old place in line; again: True.

        False if the token is not the current one.
        """
        return bool(await self._move("release", job_id, token, attempt or b""))

    async def cancel(self, job_id: str, *, error: bytes = b"") -> JobRecord:
        """Ends a queued or running job as cancelled; again: the same record. Raises JOB_NOT_FOUND, JOB_ENDED."""
        reply = await self._move("cancel", job_id, error)
        if reply is None:
            raise _unknown(job_id)
        record = short(reply[1])
        if reply[0] == b"ended":
            raise FleetError("JOB_ENDED", f"job_id: job {job_id} has {record.state} already and cannot be cancelled")
        return record

    async def retry(self, job_id: str, *, idempotency: Idempotency | None = None) -> JobRecord:
        """Queues a failed job again: generation + 1, attempt 0, a new place in line.

        Raises JOB_NOT_FOUND, JOB_NOT_FAILED, IDEMPOTENCY_KEY_REUSED.
        """
        keys = [self._room.keys.job(job_id), self._room.keys.whole_job(job_id)[2], *self._key(idempotency)]
        print_ = idempotency.fingerprint if idempotency else ""
        reply = await self._room.bulk.run("retry", keys, self._room.args(job_id, uuid.uuid4().hex, print_))
        if reply is None:
            raise _unknown(job_id)
        if reply[0] == b"reused":
            raise key_reused()
        record = short(reply[1])
        if reply[0] == b"state":
            raise FleetError(
                "JOB_NOT_FAILED", f"job_id: job {job_id} is {record.state}; only a failed one can be retried"
            )
        return record

    async def retry_many(self, job_ids: Sequence[str], *, operation: str) -> Retried:
        """Redrive: as `retry` for each, in one pipeline; in order, a refusal in the place of its record.

        The same `operation` (1-128 characters) again retries none a second time.
        """
        retried: Retried = []
        for job_id in job_ids:
            try:
                retried.append(await self.retry(job_id))
            except FleetError as refused:
                retried.append(refused)
        return retried

    async def lose_session(
        self,
        node_id: str,
        session: str,
        *,
        error: bytes,
        error_poison: bytes = b"",
        single_node: bool = False,
        limit: int = 100,
    ) -> Records:
        """The node's agent began anew: what it ran in `session`, or in any but its current one, is lost at once.

        `limit` bounds each step, not the whole. Returns the jobs as they are afterwards (queued, or failed as poison).
        """
        keys = [self._room.keys.held(node_id), self._room.keys.node(node_id)]
        lost: Records = []
        while True:
            more, *rows = await self._room.dispatch.run(
                "lose_session",
                keys,
                self._room.args(session, error, error_poison or error, int(single_node), limit),
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
    ) -> ReapResult:
        """One bounded sweep: expired leases, overdue runs (timeout + `margin_ms`), queue TTLs, due scheduled jobs.

        `hold` leaves leases and overdue runs alone (the 60 s after a start or failover). A counted loss requeues at
        the old place; the third, if two nodes saw one (one is enough if `single_node` or the job's lane is one of
        `single_node_lanes`), is poison. An overdue run is a failed attempt. Each of the four takes at most `limit`.
        """
        reply = await self._room.dispatch.run(
            "reap",
            [self._room.keys.events],
            self._room.args(
                limit,
                int(hold),
                margin_ms,
                backoff_ms,
                int(single_node),
                errors.lost,
                errors.poison,
                errors.timeout,
                errors.ttl,
                *single_node_lanes,
            ),
        )
        more, *groups = reply
        requeued, failed, promoted = (tuple(short(row) for row in group) for group in groups)
        return ReapResult(requeued, failed, promoted, bool(more))

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


def _unknown(job_id: str) -> FleetError:
    return FleetError("JOB_NOT_FOUND", f"job_id: no job has the id {job_id}; ended jobs are kept 7 days")
