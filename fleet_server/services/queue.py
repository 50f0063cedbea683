"""The job queue as callers use it: submit, look, list, cancel, retry."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from fleet.v1 import queue_pb2, types_pb2, vision_pb2

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.domain.job import JobRecord, JobState, Priority
from fleet_server.services.intake import Admitted, Intake, idempotency
from fleet_server.services.jobs import Live, receipt
from fleet_server.services.outlook import at_once, may_ride
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.services.ports import Attempts, Line
from fleet_server.services.shield import Shield
from fleet_server.services.times import ceil_ms
from fleet_server.services.views import JobViews
from fleet_server.services.words import priority_of, state_of, type_word
from fleet_server.store import Idempotency, JobStore, PageKey, Submitted

_BREATH = 50
"""Jobs of a batch, or of a page, that are worked on before others get the loop."""
_MOST_RIDING = 4
"""Submits that travel each with its own claim at a time; what comes besides is cheaper in one step for all."""


@dataclass(frozen=True, slots=True)
class QueueSettings:
    """`queued_jobs` are the most that may wait; a page of a list looks at `rows_examined` jobs, `chunk` in one read."""

    queued_jobs: int = 1_000_000
    rows_examined: int = 2_000
    chunk: int = 200


class JobQueue:
    """Accepts jobs and answers for them. A submit that has begun is finished even if its caller leaves.

    `refresh` makes the outputs of one job's result say where they are now.
    """

    def __init__(
        self,
        jobs: JobStore,
        intake: Intake,
        views: JobViews,
        dispatcher: Line,
        attempts: Attempts,
        settings: QueueSettings | None = None,
        refresh: Callable[[types_pb2.Job], Awaitable[None]] | None = None,
    ) -> None:
        self._jobs = jobs
        self._intake = intake
        self._views = views
        self._dispatcher = dispatcher
        self._attempts = attempts
        self._settings = settings or QueueSettings()
        self._refresh = refresh
        self._shield = Shield()
        self._riding = 0

    async def aclose(self) -> None:
        """Waits for the submits under way."""
        await self._shield.aclose()

    async def create(self, request: queue_pb2.CreateJobRequest, *, owner: str, key: str | None) -> types_pb2.Receipt:
        """Submits one job. Raises what `Intake.job` and `JobStore.submit` do."""
        admitted = await self._intake.job(request, owner=owner)
        once = idempotency(request, method="Queue/CreateJob", owner=owner, key=key)
        return (await self._submit([admitted], once))[0]

    async def accept(self, admitted: Admitted) -> types_pb2.Receipt:
        """Submits one job that has been admitted already. Raises what `JobStore.submit` does."""
        return (await self._submit([admitted], None))[0]

    async def create_many(
        self, request: queue_pb2.BatchCreateJobsRequest, *, owner: str, key: str | None
    ) -> list[types_pb2.Receipt]:
        """Submits all or none; a fault names `jobs[i].field`."""
        admitted = []
        for index, job in enumerate(request.jobs):
            if job.HasField("request_id"):
                raise invalid_field(f"jobs[{index}].request_id", "must be left out: the batch has one of its own")
            admitted.append(await self._intake.job(job, owner=owner, path=f"jobs[{index}]"))
            if index % _BREATH == _BREATH - 1:
                await asyncio.sleep(0)
        once = idempotency(request, method="Queue/BatchCreateJobs", owner=owner, key=key)
        return await self._submit(admitted, once)

    async def create_image(
        self, request: vision_pb2.VisionGenerateRequest, *, owner: str, key: str | None
    ) -> types_pb2.Receipt:
        """Submits a picture of Vision.Generate: above 0 is high, below 0 is low priority."""
        priority = Priority.NORMAL
        if request.priority:
            priority = Priority.HIGH if request.priority > 0 else Priority.LOW
        admitted = await self._intake.picture(request, owner=owner, priority=priority)
        once = idempotency(request, method="Vision/Generate", owner=owner, key=key)
        return (await self._submit([admitted], once))[0]

    async def create_again(
        self, spec: types_pb2.JobSpec, request: vision_pb2.RerunOutputRequest, *, owner: str, key: str | None
    ) -> types_pb2.Receipt:
        """Submits a job that was one before. Raises what `Intake.again` and `JobStore.submit` do."""
        admitted = await self._intake.again(spec, owner=owner)
        once = idempotency(request, method="Vision/RerunOutput", owner=owner, key=key)
        return (await self._submit([admitted], once))[0]

    async def _submit(self, admitted: Sequence[Admitted], once: Idempotency | None) -> list[types_pb2.Receipt]:
        submitted = await self._shield.run(self._store(admitted, once))
        if submitted.replayed:
            return await self._receipts_again(submitted.job_ids)
        # What became of a job that waits for others only the store knows: it may be cancelled already.
        waiting = iter(await self._receipts_again([item.job.job_id for item in admitted if item.job.after]))
        judged: dict[tuple[str, Priority], str | None] = {}
        receipts = []
        for item, position in zip(admitted, submitted.positions, strict=True):
            if item.job.after:
                receipts.append(next(waiting))
                continue
            kind = item.job.lane.lane_id, item.job.priority
            if kind not in judged:
                judged[kind] = await self._views.obstacle(item.job.lane, item.job.priority)
            reason = "SCHEDULED" if item.job.schedule_ms is not None else judged[kind]
            receipts.append(_first_receipt(item, position, reason))
        return receipts

    async def _store(self, admitted: Sequence[Admitted], once: Idempotency | None) -> Submitted:
        callbacks = [item.job.job_id for item in admitted if item.callback]
        all_jobs = [one for item in admitted for one in item.all]
        # Kept first: the event of the new job may come before the reply.
        for item in all_jobs:
            self._views.keep(item.job.job_id, item.spec)
        jobs = [item.job for item in all_jobs]
        rides = may_ride(jobs) and self._riding < _MOST_RIDING and self._dispatcher.rides()
        self._riding += rides
        try:
            submitted = await self._jobs.submit(
                jobs,
                idempotency=once,
                limit=self._settings.queued_jobs,
                callbacks=callbacks,
                posted=(lambda: self._dispatcher.expect(jobs)) if rides else None,
            )
        finally:
            self._riding -= rides
        if not submitted.replayed and not rides:
            if at_once(jobs):
                self._dispatcher.expect([job for job in jobs if not job.child_job_ids])
            else:
                self._dispatcher.wake()
        return submitted

    async def _receipts_again(self, job_ids: Sequence[str]) -> list[types_pb2.Receipt]:
        if not job_ids:
            return []
        records = [record for record in await self._jobs.get_many(job_ids) if record is not None]
        if len(records) < len(job_ids):
            raise _not_found("the jobs of this idempotency key have been deleted; use another key")
        specs = [types_pb2.JobSpec.FromString(record.spec) for record in records]
        lives: Sequence[Live] = await self._views.live(records, specs)
        return [receipt(record, spec, live) for record, spec, live in zip(records, specs, lives, strict=True)]

    async def get(self, job_id: str) -> types_pb2.Job:
        """The job. Raises JOB_NOT_FOUND."""
        record = await self._jobs.get(job_id)
        if record is None:
            raise _not_found(f"there is no job {job_id[:128]!r}: it never was, or ended too long ago")
        job = await self._views.message(record)
        if self._refresh is not None and job.result.outputs:
            await self._refresh(job)
        return job

    async def cancel(self, job_id: str, *, only: str | None = None) -> types_pb2.Job:
        """Cancels a job, a group with its images; it is cancelled when this returns, its node stops after.

        Raises JOB_NOT_FOUND, JOB_ENDED, SCOPE_MISSING (`only` may be whose it is, and it is another's).
        """
        await self._check_owner(job_id, only)
        record = await self._shield.run(self._cancel(job_id))
        return await self._views.message(record)

    async def _cancel(self, job_id: str) -> JobRecord:
        record = await self._whole(await self._jobs.cancel(job_id))
        images = types_pb2.JobSpec.FromString(record.spec).child_job_ids if record.children else ()
        for one in (record, *await self._jobs.get_many(images)):
            token = one.token or one.last_token if one is not None else ""
            if one is not None and one.state is JobState.CANCELLED and one.node_id and token:
                await self._attempts.cancel_attempt(one.job_id, one.node_id, token)
        # Its slot is free for another, and so is its place in line.
        self._dispatcher.wake()
        return record

    async def _check_owner(self, job_id: str, only: str | None) -> None:
        if only is None:
            return
        record = await self._jobs.get(job_id)
        if record is not None and not_theirs(record, only):
            raise other_owner(job_id)

    async def retry(
        self, request: queue_pb2.RetryJobRequest, *, owner: str, key: str | None, only: str | None = None
    ) -> types_pb2.Job:
        """Queues a failed job again, as its next generation; of a group the images that did not succeed.

        Raises JOB_NOT_FOUND, JOB_NOT_FAILED, SCOPE_MISSING as `cancel`.
        """
        await self._check_owner(request.job_id, only)
        once = idempotency(request, method="Queue/RetryJob", owner=owner, key=key)
        record = await self._shield.run(self._retry(request.job_id, once))
        return await self._views.message(await self._whole(record))

    async def _retry(self, job_id: str, once: Idempotency | None) -> JobRecord:
        record = await self._jobs.retry(job_id, idempotency=once)
        self._dispatcher.wake()
        return record

    async def _whole(self, record: JobRecord) -> JobRecord:
        """The record with its spec, result and attempts, which steps do not return."""
        if record.spec:
            return record
        whole = await self._jobs.get(record.job_id)
        if whole is None:
            raise _not_found(f"the job {record.job_id!r} has been deleted")
        return whole

    async def running_models(self, job_ids: Sequence[str]) -> Mapping[tuple[str, str], int]:
        """How many of these jobs run each model on each node: (node_id, model) -> jobs."""
        records = [record for record in await self._jobs.get_many(job_ids) if record is not None]
        return Counter((r.node_id, r.model) for r in records if r.state is JobState.RUNNING)

    async def list(self, request: queue_pb2.ListJobsRequest) -> tuple[list[types_pb2.Job], str]:
        """A page of jobs, newest first, and the next page's token; of a group's images only by `group_job_id`.

        Looks at a bounded number of jobs: a page may be short and still have a token. Raises INVALID_PAGE_TOKEN.
        """
        wanted = _Filter.of(request)
        before = page_key_of(request)
        found: list[JobRecord] = []
        examined = 0
        while True:
            room = min(request.limit - len(found), self._settings.chunk) if wanted.plain else self._settings.chunk
            rows, next_key = await self._jobs.list(
                states=wanted.states,
                before=before,
                limit=room,
                created_after_ms=wanted.after_ms,
                created_before_ms=wanted.before_ms,
                group=wanted.group,
            )
            for row in rows:
                if wanted.fits(row):
                    found.append(row)
                    if len(found) == request.limit:
                        break
            examined += max(1, len(rows))
            if len(found) == request.limit and (rows[-1] is not found[-1]):
                next_key = PageKey(found[-1].created_ms, found[-1].job_id)
            before = next_key
            if next_key is None or len(found) == request.limit or examined >= self._settings.rows_examined:
                break
        messages: list[types_pb2.Job] = []
        for start in range(0, len(found), _BREATH):
            messages += await self._views.messages(found[start : start + _BREATH])
        return messages, token_of(request, before)


@dataclass(frozen=True, slots=True)
class _Filter:
    states: tuple[JobState, ...]
    job_type: str | None
    priority: Priority | None
    cluster: str | None
    model: str | None
    node_id: str | None
    owner: str | None
    group: str | None
    after_ms: int | None
    before_ms: int | None

    @classmethod
    def of(cls, request: queue_pb2.ListJobsRequest) -> _Filter:
        def given(name: str) -> str | None:
            return getattr(request, name) if request.HasField(name) else None  # type: ignore[arg-type]

        return cls(
            states=tuple(dict.fromkeys(state_of(number) for number in request.status)),
            job_type=type_word(request.job_type) if request.HasField("job_type") else None,
            priority=priority_of(request.priority) if request.HasField("priority") else None,
            cluster=given("target_cluster"),
            model=given("target_model"),
            node_id=given("node_id"),
            owner=given("owner"),
            group=given("group_job_id"),
            # The store's bounds are both exclusive and in whole milliseconds.
            after_ms=ceil_ms(request.created_after) - 1 if request.HasField("created_after") else None,
            before_ms=ceil_ms(request.created_before) if request.HasField("created_before") else None,
        )

    @property
    def plain(self) -> bool:
        """Whether the store applies it all."""
        rest = (self.job_type, self.priority, self.cluster, self.model, self.node_id, self.owner)
        return all(value is None for value in rest)

    def fits(self, record: JobRecord) -> bool:
        return (
            self.job_type in (None, record.job_type)
            and self.priority in (None, record.priority)
            and self.cluster in (None, record.cluster)
            and self.node_id in (None, record.node_id)
            and self.owner in (None, record.owner)
            and (self.model is None or names_model(record, self.model))
        )


def _first_receipt(item: Admitted, position: int | None, reason: str | None) -> types_pb2.Receipt:
    message = types_pb2.Receipt(job_id=item.job.job_id, status=types_pb2.JOB_STATUS_QUEUED, wait_reason=reason)
    if reason is None and position is not None:
        message.queue_position = position
    if item.spec.HasField("target_model"):
        message.target_model = item.spec.target_model
    if item.spec.HasField("resolved_model"):
        message.resolved_model = item.spec.resolved_model
    return message


def names_model(record: JobRecord, model: str) -> bool:
    """Whether the job was asked for with that model, or runs it."""
    return record.model == model or types_pb2.JobSpec.FromString(record.spec).target_model == model


def not_theirs(record: JobRecord, only: str | None) -> bool:
    """Whether the job is another key's; None may everything, and a job of a time without keys is everybody's."""
    return only is not None and bool(record.owner) and record.owner != only


def other_owner(job_id: str) -> FleetError:
    """The refusal of an ordinary key at another's job."""
    return FleetError("SCOPE_MISSING", f"job_id: job {job_id} is another key's: use that one, or an admin key")


def _not_found(detail: str) -> FleetError:
    return FleetError("JOB_NOT_FOUND", detail)
