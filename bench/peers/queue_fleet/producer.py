"""Submits custom jobs over gRPC, with the stubs alone. Orders and answers as in ../queue_python/_common.py."""

from __future__ import annotations

import os

import grpc
import uvloop
from fleet.v1 import queue_pb2, queue_pb2_grpc, types_pb2

from bench.peers.queue_python._common import TEXT, produce


def job(number: int) -> queue_pb2.CreateJobRequest:
    """One job: the engine's name, a number, a text."""
    request = queue_pb2.CreateJobRequest(job_type=types_pb2.JOB_TYPE_CUSTOM)
    fields = request.payload.fields
    fields["engine"].string_value = "noop"
    fields["number"].number_value = number
    fields["text"].string_value = TEXT
    return request


async def main() -> None:
    """Carries out orders over one channel."""
    async with grpc.aio.insecure_channel(os.environ["BENCH_SERVER"]) as channel:
        queue = queue_pb2_grpc.QueueStub(channel)
        await produce(
            lambda number: queue.CreateJob(job(number)),
            lambda numbers: queue.BatchCreateJobs(
                queue_pb2.BatchCreateJobsRequest(jobs=[job(number) for number in numbers])
            ),
        )


if __name__ == "__main__":
    uvloop.run(main())
