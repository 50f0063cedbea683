"""Claimed jobs on their way to an agent; those that read files go when it is known which."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fleet.v1 import node_pb2 as pb
from fleet.v1.types_pb2 import JobSpec

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Claim
from fleet_server.domain.node import NodeView
from fleet_server.services.completion import job_error
from fleet_server.services.inputs import InputResolver, has_inputs


def assignment(claim: Claim, node: NodeView | None, *, previews: bool) -> pb.Assign:
    """What an agent is told of a job."""
    record = claim.job
    spec = JobSpec.FromString(record.spec)
    model = node.models.get(spec.resolved_model) if node is not None and spec.resolved_model else None
    return pb.Assign(
        job_id=record.job_id,
        token=claim.token,
        generation=record.generation,
        attempt=record.attempt,
        job_type=spec.job_type,
        payload=spec.payload,
        model=spec.resolved_model,
        model_sha256=model.sha256 if model is not None else "",
        target_model=spec.target_model,
        timeout_seconds=record.timeout_ms / 1000,
        previews=previews,
        exclusive=spec.exclusive,
    )


class Handout:
    """Of one session. `send` takes what is ready, `failed` the end of a job whose files are gone.

    `wanted(token)` says whether the attempt is still to be begun.
    """

    def __init__(
        self,
        resolver: InputResolver,
        *,
        send: Callable[[pb.Assign], None],
        failed: Callable[[pb.JobComplete], Awaitable[None]],
        wanted: Callable[[str], bool],
        repeat_seconds: float,
    ) -> None:
        self._resolver = resolver
        self._send = send
        self._failed = failed
        self._wanted = wanted
        self._repeat_seconds = repeat_seconds
        self._tasks: set[asyncio.Task[None]] = set()

    def give(self, assign: pb.Assign) -> None:
        """Sends it at once, or when its files are known."""
        if not has_inputs(assign.payload):
            self._send(assign)
            return
        task = asyncio.create_task(self._resolve(assign))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """The session is over: what has not gone does not go; its lease runs out, uncounted."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _resolve(self, assign: pb.Assign) -> None:
        while self._wanted(assign.token):
            try:
                assign.inputs.extend(await self._resolver.resolve(assign.payload))
            except FleetError as error:
                if error.reason != "STORE_UNAVAILABLE":
                    end = job_error(error.reason, error.detail)
                    again = error.reason == "S3_UNAVAILABLE"
                    await self._failed(
                        pb.JobComplete(job_id=assign.job_id, token=assign.token, error=end, retryable=again)
                    )
                    return
            else:
                if self._wanted(assign.token):
                    self._send(assign)
                return
            await asyncio.sleep(self._repeat_seconds)
