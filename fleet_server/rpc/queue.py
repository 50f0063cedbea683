"""fleet.v1.Queue."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import grpc
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.rpc.scopes import check_job_type, only_own
from fleet_server.services.dead import DeadLetters
from fleet_server.services.events import EventHub
from fleet_server.services.explain import Explainer
from fleet_server.services.pauses import Pauses
from fleet_server.services.queue import JobQueue
from fleet_server.services.status import StatusBoard
from fleet_server.services.webhooks import Webhooks

Context = grpc.aio.ServicerContext[Any, Any]


class QueueServicer:
    """The job queue. Every method raises FleetError."""

    def __init__(
        self,
        queue: JobQueue,
        hub: EventHub,
        board: StatusBoard,
        webhooks: Webhooks,
        *,
        explainer: Explainer,
        pauses: Pauses,
        dead: DeadLetters,
    ) -> None:
        self._queue = queue
        self._pauses = pauses
        self._dead = dead
        self._hub = hub
        self._board = board
        self._explainer = explainer
        self._webhooks = webhooks

    async def CreateJob(self, request: queue_pb2.CreateJobRequest, context: Context) -> queue_pb2.CreateJobResponse:
        caller, key = caller_of(context), idempotency_key(context, request)
        check_job_type(request.job_type, admin=caller.admin, field="job_type")
        receipt = await self._queue.create(request, owner=caller.owner, key=key)
        return queue_pb2.CreateJobResponse(receipt=receipt)

    async def BatchCreateJobs(
        self, request: queue_pb2.BatchCreateJobsRequest, context: Context
    ) -> queue_pb2.BatchCreateJobsResponse:
        caller, key = caller_of(context), idempotency_key(context, request)
        for index, job in enumerate(request.jobs):
            check_job_type(job.job_type, admin=caller.admin, field=f"jobs[{index}].job_type")
        receipts = await self._queue.create_many(request, owner=caller.owner, key=key)
        return queue_pb2.BatchCreateJobsResponse(jobs=receipts)

    async def DryRunJob(self, request: queue_pb2.DryRunJobRequest, context: Context) -> queue_pb2.DryRunJobResponse:
        caller = caller_of(context)
        check_job_type(request.job.job_type, admin=caller.admin, field="job_type")
        explanation = await self._explainer.dry_run(request.job, owner=caller.owner)
        return queue_pb2.DryRunJobResponse(explanation=explanation)

    async def ExplainJob(self, request: queue_pb2.ExplainJobRequest, context: Context) -> queue_pb2.ExplainJobResponse:
        return queue_pb2.ExplainJobResponse(explanation=await self._explainer.explain(request.job_id))

    async def ListJobs(self, request: queue_pb2.ListJobsRequest, context: Context) -> queue_pb2.ListJobsResponse:
        jobs, token = await self._queue.list(request)
        return queue_pb2.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def GetJob(self, request: queue_pb2.GetJobRequest, context: Context) -> queue_pb2.GetJobResponse:
        return queue_pb2.GetJobResponse(job=await self._queue.get(request.job_id))

    async def CancelJob(self, request: queue_pb2.CancelJobRequest, context: Context) -> queue_pb2.CancelJobResponse:
        job = await self._queue.cancel(request.job_id, only=only_own(caller_of(context)))
        return queue_pb2.CancelJobResponse(job=job)

    async def RetryJob(self, request: queue_pb2.RetryJobRequest, context: Context) -> queue_pb2.RetryJobResponse:
        caller, key = caller_of(context), idempotency_key(context, request)
        job = await self._queue.retry(request, owner=caller.owner, key=key, only=only_own(caller))
        return queue_pb2.RetryJobResponse(job=job)

    async def WatchJob(
        self, request: queue_pb2.WatchJobRequest, context: Context
    ) -> AsyncGenerator[types_pb2.Event, None]:
        async with aclosing(self._hub.watch_job(request.job_id, previews=request.previews)) as events:
            async for event in events:
                yield event

    async def ListDead(self, request: queue_pb2.ListDeadRequest, context: Context) -> queue_pb2.ListDeadResponse:
        jobs, token = await self._dead.page(request)
        return queue_pb2.ListDeadResponse(jobs=jobs, next_page_token=token)

    async def RedriveJobs(
        self, request: queue_pb2.RedriveJobsRequest, context: Context
    ) -> queue_pb2.RedriveJobsResponse:
        caller, key = caller_of(context), idempotency_key(context, request)
        return await self._dead.redrive(request, owner=caller.owner, key=key, only=only_own(caller))

    async def PauseQueue(self, request: queue_pb2.PauseQueueRequest, context: Context) -> queue_pb2.PauseQueueResponse:
        return queue_pb2.PauseQueueResponse(pauses=await self._pauses.pause(request))

    async def ResumeQueue(
        self, request: queue_pb2.ResumeQueueRequest, context: Context
    ) -> queue_pb2.ResumeQueueResponse:
        return queue_pb2.ResumeQueueResponse(pauses=await self._pauses.resume(request))

    async def ListDeliveries(
        self, request: queue_pb2.ListDeliveriesRequest, context: Context
    ) -> queue_pb2.ListDeliveriesResponse:
        deliveries, token = await self._webhooks.list(request)
        return queue_pb2.ListDeliveriesResponse(deliveries=deliveries, next_page_token=token)

    async def Redeliver(self, request: queue_pb2.RedeliverRequest, context: Context) -> queue_pb2.RedeliverResponse:
        key = idempotency_key(context, request)
        caller = caller_of(context)
        delivery = await self._webhooks.redeliver(request, owner=caller.owner, key=key, only=only_own(caller))
        return queue_pb2.RedeliverResponse(delivery=delivery)

    async def GetStats(self, request: queue_pb2.GetStatsRequest, context: Context) -> queue_pb2.GetStatsResponse:
        return await self._board.queue_stats()
