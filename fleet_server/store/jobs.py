"""Jobs in the store: every step is one Lua script, atomic and repeatable with the same arguments."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fleet_server.domain.job import Claim, JobRecord, JobState, NewJob, Priority
from fleet_server.store.records import (
    ClaimRequest,
    Completion,
    Held,
    Idempotency,
    LaneView,
    OutputRow,
    PageKey,
    ReapErrors,
    ReapResult,
    Submitted,
)


class JobStore:
    """Every method raises FleetError STORE_UNAVAILABLE if the store is away or an outcome stays unknown."""

    async def submit(
        self,
        jobs: Sequence[NewJob],
        *,
        idempotency: Idempotency | None = None,
        limit: int = 1_000_000,
        callbacks: Collection[str] = (),
    ) -> Submitted:
        """Accepts 1 to 1,000 jobs, all or none; when it returns they are in the log as the store's durability says.

        `callbacks` are the job ids that want a webhook row at their end. The same idempotency key and fingerprint within 24 h
        gives the first job ids with `replayed`. Raises IDEMPOTENCY_KEY_REUSED (other fingerprint), QUEUE_FULL (over `limit`
        queued jobs or 80 % of the store's memory), INVALID_FIELD (`job_id` is taken by another job).
        """
        raise NotImplementedError

    async def get(self, job_id: str) -> JobRecord | None:
        """The whole job, read at one instant: short fields, spec, result, attempts."""
        raise NotImplementedError

    async def get_many(self, job_ids: Sequence[str]) -> list[JobRecord | None]:
        """As `get`, for many, in the order asked."""
        raise NotImplementedError

    async def queue_positions(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """For each (cluster, job_id): 1 for the next in its cluster, None if not in line."""
        raise NotImplementedError

    async def list(
        self,
        *,
        states: Sequence[JobState] = (),
        before: PageKey | None = None,
        limit: int = 100,
        created_after_ms: int | None = None,
        created_before_ms: int | None = None,
    ) -> tuple[list[JobRecord], PageKey | None]:
        """Jobs of the states (none given: all), newest created first, whole records; bounds are exclusive/exclusive.

        The key of the next page is None at the end; a page may be shorter than `limit` and still have one.
        """
        raise NotImplementedError

    async def list_dead(
        self, *, before: PageKey | None = None, limit: int = 100
    ) -> tuple[list[JobRecord], PageKey | None]:
        """Jobs failed for good, newest end first."""
        raise NotImplementedError

    async def lanes(self, *, idle: bool = False) -> list[LaneView]:
        """Every lane in which jobs wait in line; with `idle` also those with running or deferred jobs alone."""
        raise NotImplementedError

    async def peek(self, lane_id: str, limit: int = 32) -> list[JobRecord]:
        """The next waiting jobs of a lane by effective age, whole records; a look, not a claim."""
        raise NotImplementedError

    async def defer(self, lane_id: str) -> int:
        """Notes that a cold node passed this lane's head by; the ms of the first time since the lane's last claim."""
        raise NotImplementedError

    async def claim(self, requests: Sequence[ClaimRequest]) -> list[Claim | None]:
        """One job for each request or None (nothing waits, or `session` is no longer its node's). One batch.

        Inside a lane: every second claim while `high` waits takes a high one, else the oldest after boosts; owners of the
        chosen priority take turns. The job is running with `attempt` + 1 afterwards; watchers hear of it at `started`.
        """
        raise NotImplementedError

    async def started(self, job_id: str, token: str) -> JobRecord | None:
        """The engine began: `started_ms`, deadline, losses count from here on. None if the token is not current. Again: same."""
        raise NotImplementedError

    async def renew(self, held: Sequence[Held], lease_ms: int) -> list[str]:
        """Prolongs leases and keeps the last progress (no event, no new version); the tokens that the agent must drop."""
        raise NotImplementedError

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

        A lost attempt's token still wins while the job is queued, never after another claim.
        """
        raise NotImplementedError

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
        """Failure of the attempt: queued again (BACKOFF) while retryable and failures <= max_retries, else failed for good.

        `attempt` is the encoded fleet.v1.JobAttempt to remember, `result` what came about before the failure.
        """
        raise NotImplementedError

    async def release(self, job_id: str, token: str, *, attempt: bytes | None = None) -> bool:
        """Gives a claimed or running job back uncounted, to its old place in line. False if the token is not current."""
        raise NotImplementedError

    async def cancel(self, job_id: str, *, error: bytes = b"") -> JobRecord:
        """Ends a queued or running job as cancelled; again: the same record. Raises JOB_NOT_FOUND, JOB_ENDED."""
        raise NotImplementedError

    async def retry(self, job_id: str, *, idempotency: Idempotency | None = None) -> JobRecord:
        """Queues a failed job again: generation + 1, attempt 0. Raises JOB_NOT_FOUND, JOB_NOT_FAILED, IDEMPOTENCY_KEY_REUSED."""
        raise NotImplementedError

    async def lose_session(
        self,
        node_id: str,
        session: str,
        *,
        error: bytes,
        error_poison: bytes = b"",
        single_node: bool = False,
        limit: int = 100,
    ) -> list[JobRecord]:
        """The node's agent began anew: what it ran in `session` (or in any but its current one) is lost at once.

        `limit` bounds each step, not the whole: all are done when it returns. The jobs as they are afterwards.
        """
        raise NotImplementedError

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

        `hold` leaves leases and overdue runs alone (the 60 s after a start or failover). A counted loss requeues at the old
        place; the third on >= 2 nodes (1 if `single_node`, or the job's lane is one of `single_node_lanes`) is poison.
        """
        raise NotImplementedError

    async def counts(self) -> dict[JobState, int]:
        """Jobs kept, by state."""
        raise NotImplementedError

    async def waiting_by_priority(self) -> dict[Priority, int]:
        """Queued jobs by priority, deferred ones included."""
        raise NotImplementedError

    async def held_by(self, node_id: str) -> dict[str, str]:
        """What the node runs by the store's book: attempt token -> job id."""
        raise NotImplementedError

    async def purge(
        self,
        *,
        keep_ms: int = 604_800_000,
        keep_count: int = 200_000,
        keep_dead: int = 10_000,
        limit: int = 100,
    ) -> int:
        """Forgets ended jobs past retention, oldest end first, at most `limit`; how many. Outputs stay."""
        raise NotImplementedError
