"""Callbacks as callers see them: what was sent, what came of it, and once more, please."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord
from fleet_server.domain.webhook import DeliveryState, delivery_id, generation_of
from fleet_server.services.callbacks import without_query
from fleet_server.services.intake import idempotency
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.services.queue import not_theirs, other_owner
from fleet_server.store import HookRow, JobStore, PageKey, WebhookStore

_STATES = {
    DeliveryState.PENDING: types_pb2.DELIVERY_STATUS_PENDING,
    DeliveryState.DELIVERED: types_pb2.DELIVERY_STATUS_DELIVERED,
    DeliveryState.FAILED: types_pb2.DELIVERY_STATUS_FAILED,
}


class Webhooks:
    """Reads the log of callbacks and asks for them again. `wake` tells the sender of this replica."""

    def __init__(self, jobs: JobStore, hooks: WebhookStore, wake: Callable[[], None]) -> None:
        self._jobs = jobs
        self._hooks = hooks
        self._wake = wake

    async def list(self, request: queue_pb2.ListDeliveriesRequest) -> tuple[list[types_pb2.Delivery], str]:
        """A page of a job's callbacks, newest first: one for each end; none where it has no callback address.

        Raises JOB_NOT_FOUND, INVALID_PAGE_TOKEN.
        """
        record = await self._job(request.job_id)
        url = types_pb2.JobSpec.FromString(record.spec).callback_url
        key = page_key_of(request)
        newest = record.generation if key is None else min(key.time_ms - 1, record.generation)
        if not url:
            return [], ""
        last = max(newest - request.limit, 0)
        rows = await self._hooks.get_many(record.job_id, range(newest, last, -1))
        token = token_of(request, PageKey(last + 1, record.job_id) if last else None)
        ends = [(row, _end_ms(row, record)) for row in rows]
        return [_message(row, url, end) for row, end in ends if end is not None], token

    async def redeliver(
        self, request: queue_pb2.RedeliverRequest, *, owner: str, key: str | None, only: str | None = None
    ) -> types_pb2.Delivery:
        """Makes a callback pending again, due at once; with `only`, of that owner's jobs and those of nobody.

        Raises JOB_NOT_FOUND, DELIVERY_NOT_FOUND, SCOPE_MISSING, IDEMPOTENCY_KEY_REUSED.
        """
        once = idempotency(request, method="Queue/Redeliver", owner=owner, key=key)
        record = await self._job(request.job_id)
        if not_theirs(record, only):
            raise other_owner(record.job_id)
        url = types_pb2.JobSpec.FromString(record.spec).callback_url
        generation = generation_of(request.delivery_id)
        if not url or generation is None or generation > record.generation:
            _not_there(request)
        (row,) = await self._hooks.get_many(record.job_id, [generation])
        end = _end_ms(row, record)
        if end is None or delivery_id(record.job_id, generation, end) != request.delivery_id:
            _not_there(request)
        row = await self._hooks.redeliver(record.job_id, generation, idempotency=once)
        self._wake()
        return _message(row, url, end)

    async def _job(self, job_id: str) -> JobRecord:
        record = await self._jobs.get(job_id)
        if record is None:
            raise FleetError("JOB_NOT_FOUND", f"there is no job {job_id[:128]!r}: it never was, or ended too long ago")
        return record


def _not_there(request: queue_pb2.RedeliverRequest) -> NoReturn:
    raise FleetError(
        "DELIVERY_NOT_FOUND",
        f"delivery_id: the job has no delivery {request.delivery_id[:64]!r}; "
        f"see GET /api/queue/jobs/{request.job_id[:128]}/deliveries",
    )


def _end_ms(row: HookRow, record: JobRecord) -> int | None:
    """When the callback's generation of the job ended; None if it has not, or that is known no more."""
    if row.end is not None:
        return row.end.ended_ms
    return record.ended_ms if record.generation == row.generation else None


def _message(row: HookRow, url: str, created_ms: int) -> types_pb2.Delivery:
    delivery = types_pb2.Delivery.FromString(row.log)
    delivery.delivery_id = delivery_id(row.job_id, row.generation, created_ms)
    delivery.job_id = row.job_id
    delivery.generation = row.generation
    delivery.webhook_id = row.webhook_id
    delivery.url = without_query(url)
    delivery.status = _STATES[row.state]
    delivery.create_time.FromMilliseconds(created_ms)
    if row.due_ms is not None and row.state is DeliveryState.PENDING:
        delivery.next_attempt_time.FromMilliseconds(row.due_ms)
    if row.ended_ms is not None:
        delivery.end_time.FromMilliseconds(row.ended_ms)
    return delivery
