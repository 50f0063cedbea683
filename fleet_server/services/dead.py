"""Jobs that failed for good: looked through, and run again in bulk."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass

from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.domain.job import JobRecord
from fleet_server.services.intake import idempotency
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.services.ports import Wake
from fleet_server.services.queue import names_model, not_theirs, other_owner
from fleet_server.services.shield import Shield
from fleet_server.services.views import JobViews
from fleet_server.services.words import type_word
from fleet_server.store import JobStore, PageKey, ReplyStore

_FILTERS = ("job_type", "target_cluster", "target_model", "reason")
Request = queue_pb2.ListDeadRequest | queue_pb2.RedriveJobsRequest


@dataclass(frozen=True, slots=True)
class DeadSettings:
    """A page looks at `examined` jobs at most, `chunk` in one read; a redrive retries `retried` in one go."""

    examined: int = 2_000
    chunk: int = 500
    retried: int = 200


class DeadLetters:
    """The dead list. The store keeps the newest 10,000 there; a group stands there for its images."""

    def __init__(
        self,
        jobs: JobStore,
        replies: ReplyStore,
        views: JobViews,
        dispatcher: Wake,
        settings: DeadSettings | None = None,
    ) -> None:
        self._jobs = jobs
        self._replies = replies
        self._views = views
        self._dispatcher = dispatcher
        self._settings = settings or DeadSettings()
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for the redrives under way."""
        await self._shield.aclose()

    async def page(self, request: queue_pb2.ListDeadRequest) -> tuple[list[types_pb2.Job], str]:
        """A page, newest end first, and the next page's token; it may be short. Raises INVALID_PAGE_TOKEN."""
        found: list[JobRecord] = []
        before, examined = page_key_of(request), 0
        while True:
            # No more than fits: what follows the last of a page is the next page's.
            room = min(self._settings.chunk, request.limit - len(found))
            rows, before = await self._page(request, before, room)
            found += [row for row in rows if _fits(request, row)]
            examined += self._settings.chunk
            if before is None or len(found) == request.limit or examined >= self._settings.examined:
                break
        return await self._views.messages(found), token_of(request, before)

    async def redrive(
        self, request: queue_pb2.RedriveJobsRequest, *, owner: str, key: str | None, only: str | None = None
    ) -> queue_pb2.RedriveJobsResponse:
        """Retries the jobs named, or the newest `limit` that fit; how many, what is left, what could not be.

        With both, those named that fit. Raises INVALID_FIELD (neither), IDEMPOTENCY_KEY_REUSED. `only` is whose jobs
        these may be, None for everybody's.
        """
        if not request.job_ids and not _filtered(request):
            raise invalid_field("job_ids", "or a filter must be given: " + ", ".join(_FILTERS))
        once = idempotency(request, method="Queue/RedriveJobs", owner=owner, key=key)
        if once is None:
            return await self._shield.run(self._redrive(request, only, uuid.uuid4().hex))

        async def work(operation: str) -> bytes:
            return (await self._redrive(request, only, operation)).SerializeToString()

        reply = await self._shield.run(self._replies.once(once, work))
        return queue_pb2.RedriveJobsResponse.FromString(reply)

    async def _redrive(
        self, request: queue_pb2.RedriveJobsRequest, only: str | None, operation: str
    ) -> queue_pb2.RedriveJobsResponse:
        reply = queue_pb2.RedriveJobsResponse()
        if request.job_ids:
            job_ids = await self._allowed(request, only, reply)
            reply.remaining = max(0, len(job_ids) - request.limit)
            wanted = job_ids[: request.limit]
        else:
            wanted = []
            async for record in self._fitting(request, only):
                if len(wanted) < request.limit:
                    wanted.append(record.job_id)
                else:
                    reply.remaining += 1
        for start in range(0, len(wanted), self._settings.retried):
            part = wanted[start : start + self._settings.retried]
            for job_id, outcome in zip(part, await self._jobs.retry_many(part, operation=operation), strict=True):
                if isinstance(outcome, FleetError):
                    _fail(reply, job_id, outcome)
                else:
                    reply.redriven += 1
            self._dispatcher.wake()
        return reply

    async def _allowed(
        self, request: queue_pb2.RedriveJobsRequest, only: str | None, reply: queue_pb2.RedriveJobsResponse
    ) -> list[str]:
        """The ids that fit the filters, less those of others' jobs, which are told as failures."""
        wanted = list(dict.fromkeys(request.job_ids))
        if only is None and not _filtered(request):
            return wanted
        allowed = []
        for job_id, record in zip(wanted, await self._jobs.get_many(wanted), strict=True):
            if record is not None and not_theirs(record, only):
                _fail(reply, job_id, other_owner(job_id))
            elif record is None or (_fits(request, record) and _fits_short(request, record)):
                allowed.append(job_id)
        return allowed

    async def _fitting(self, request: queue_pb2.RedriveJobsRequest, only: str | None) -> AsyncIterator[JobRecord]:
        before: PageKey | None = None
        while True:
            rows, before = await self._page(request, before, self._settings.chunk)
            for row in rows:
                if _fits(request, row) and not not_theirs(row, only):
                    yield row
            if before is None:
                return
            await asyncio.sleep(0)

    async def _page(
        self, request: Request, before: PageKey | None, limit: int
    ) -> tuple[list[JobRecord], PageKey | None]:
        return await self._jobs.list_dead(
            job_type=type_word(request.job_type) if request.HasField("job_type") else None,
            cluster=request.target_cluster if request.HasField("target_cluster") else None,
            reason=request.reason if request.HasField("reason") else None,
            before=before,
            limit=limit,
            examine=self._settings.chunk,
        )


def _filtered(request: queue_pb2.RedriveJobsRequest) -> bool:
    return any(field.name in _FILTERS for field, _ in request.ListFields())


def _fits_short(request: Request, record: JobRecord) -> bool:
    """What the store judges where it lists."""
    return (
        (not request.HasField("job_type") or record.job_type == type_word(request.job_type))
        and (not request.HasField("target_cluster") or record.cluster == request.target_cluster)
        and (not request.HasField("reason") or record.reason == request.reason)
    )


def _fits(request: Request, record: JobRecord) -> bool:
    """What the store cannot judge: an alias is a name of the spec."""
    return not request.HasField("target_model") or names_model(record, request.target_model)


def _fail(reply: queue_pb2.RedriveJobsResponse, job_id: str, error: FleetError) -> None:
    reply.failures.add(job_id=job_id[:128], reason=error.reason, detail=error.detail)
