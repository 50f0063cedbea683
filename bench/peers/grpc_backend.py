"""The bare grpc.aio server behind Envoy, on uvloop: no key, no validation, no metrics, which Envoy would leave to it.

`python -m bench.peers.grpc_backend` prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvloop

from bench.peers.contract import SERVICE, CreateJobRequest, GetJobRequest, sample
from bench.peers.sample import JOB_ID

_JOBS = {JOB_ID: sample()}


async def _get_job(request: Any, context: Any) -> Any:
    job = _JOBS.get(request.job_id)
    if job is None:
        await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no job {request.job_id}")
    return job


async def _create_job(request: Any, context: Any) -> Any:
    return request.job


def _handler(work: Any, request: Any) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        work, request_deserializer=request.FromString, response_serializer=lambda reply: reply.SerializeToString()
    )


async def main() -> None:
    """Serves until it is terminated."""
    server = grpc.aio.server()
    handlers = {"GetJob": _handler(_get_job, GetJobRequest), "CreateJob": _handler(_create_job, CreateJobRequest)}
    server.add_registered_method_handlers(SERVICE.full_name, handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    sys.stdout.write(f"{port}\n")
    sys.stdout.flush()
    await server.wait_for_termination()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
