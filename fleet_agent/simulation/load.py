"""The jobs of a simulation: drawn from the profile's mix by the seed, submitted over gRPC at a rate."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from fleet.v1 import queue_pb2, queue_pb2_grpc, types_pb2

from fleet_agent.simulation.channels import Channels
from fleet_agent.simulation.profiles import CUSTOM, IMAGE, JobKind
from fleet_agent.simulation.tally import Tally

_TYPES = {word.removeprefix("JOB_TYPE_").lower(): number for word, number in types_pb2.JobType.items()}
_AT_ONCE = 64
_CALL_SECONDS = 30.0
_PRIORITIES = (
    (0.1, types_pb2.JOB_PRIORITY_HIGH),
    (0.8, types_pb2.JOB_PRIORITY_NORMAL),
    (0.1, types_pb2.JOB_PRIORITY_LOW),
)


@dataclass(frozen=True, slots=True)
class Load:
    """`rate` jobs a second (Poisson), `jobs` of them in all; 0 jobs: for as long as the simulation lasts."""

    rate: float
    jobs: int = 0


class JobSource:
    """Submits jobs. A submit that the server does not answer is made again with the same request id: one job."""

    def __init__(
        self, mix: Sequence[JobKind], load: Load, channels: Channels, tally: Tally, rng: random.Random, models: set[str]
    ) -> None:
        # What no node has would be refused, or wait for ever.
        self._mix = [job for job in mix if all(name in models for name in (job.model, *job.loras) if name)]
        self._load = load
        self._metadata = channels.metadata
        self._stub = queue_pb2_grpc.QueueStub(channels.calls)
        self._tally = tally
        self._rng = rng
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._stopping = asyncio.Event()
        self._run_id = f"{rng.getrandbits(64):016x}"
        self.last_refusal = ""

    async def run(self) -> None:
        """Submits all jobs, or until `stop`; returns when the server has answered them all.

        A server that is slow slows it down; lost time is caught up.
        """
        started, due, number = time.monotonic(), 0.0, 0
        async with asyncio.TaskGroup() as tasks:
            while self._load.rate > 0 and (not self._load.jobs or number < self._load.jobs):
                due += self._rng.expovariate(self._load.rate)
                if await self._stopped_within(max(0.0, started + due - time.monotonic())):
                    return
                await self._gate.acquire()
                tasks.create_task(self._submit(number, self._draw(number)))
                number += 1

    def stop(self) -> None:
        """Sends no more."""
        self._stopping.set()

    async def _stopped_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    async def check_doubtful(self) -> None:
        """Asks what became of jobs of which an attempt failed, or ended without an answer."""
        for job_id in list(self._tally.doubtful):
            try:
                call: Any = self._stub.GetJob(
                    queue_pb2.GetJobRequest(job_id=job_id), timeout=_CALL_SECONDS, metadata=self._metadata
                )
                reply: queue_pb2.GetJobResponse = await call
            except grpc.aio.AioRpcError:
                return
            if reply.job.status == types_pb2.JOB_STATUS_FAILED:
                self._tally.gave_up(job_id)
                self._tally.doubtful.discard(job_id)
            elif reply.job.status == types_pb2.JOB_STATUS_SUCCEEDED:
                self._tally.found_succeeded(job_id, reply.job.generation, time.monotonic())
                self._tally.doubtful.discard(job_id)

    async def stats(self) -> queue_pb2.GetStatsResponse | None:
        """The server's figures; None where it does not answer."""
        try:
            call: Any = self._stub.GetStats(queue_pb2.GetStatsRequest(), timeout=5.0, metadata=self._metadata)
            reply: queue_pb2.GetStatsResponse = await call
        except grpc.aio.AioRpcError:
            return None
        return reply

    def _draw(self, number: int) -> queue_pb2.CreateJobRequest:
        job = self._rng.choices(self._mix, [job.share for job in self._mix])[0]
        request = queue_pb2.CreateJobRequest(
            job_type=_TYPES[job.job_type],
            priority=self._rng.choices([word for _, word in _PRIORITIES], [share for share, _ in _PRIORITIES])[0],
            request_id=f"sim-{self._run_id}-{number}",
        )
        request.payload.update(_payload(job, number))
        return request

    async def _submit(self, number: int, request: queue_pb2.CreateJobRequest) -> None:
        try:
            called_at = time.monotonic()
            while True:
                try:
                    call: Any = self._stub.CreateJob(request, timeout=_CALL_SECONDS, metadata=self._metadata)
                    reply: queue_pb2.CreateJobResponse = await call
                    break
                except grpc.aio.AioRpcError as error:
                    if error.code() not in _AGAIN:
                        self._tally.refused_submits += 1
                        self.last_refusal = f"{error.code().name}: {error.details()}"
                        return
                await asyncio.sleep(0.5)
            self._tally.accepted(reply.receipt.job_id, called_at)
        finally:
            self._gate.release()


_AGAIN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNKNOWN})


def _payload(job: JobKind, number: int) -> dict[str, Any]:
    if job.job_type == IMAGE:
        return {
            "prompt": f"simulated picture {number}",
            "model": job.model,
            "width": job.side,
            "height": job.side,
            "steps": job.steps,
            "loras": [{"name": name, "weight": 0.8} for name in job.loras],
        }
    if job.job_type == CUSTOM:
        return {"seconds": job.seconds, "number": number}
    return {"prompt": f"simulated question {number}", "model": job.model, "max_tokens": job.tokens}
