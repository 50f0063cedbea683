"""Our bridge with everything on that `fleet up` puts around a call: uvicorn on uvloop with our limits of headers and
connections, the guard of Host and Origin, routing, the JSON codec, and the chain (API key, limits, defaults,
validation, deadline, metrics, request id). The servicer does as little as those of the other peers.

`python -m bench.peers.ours` prints the port that it listens on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry

from bench.peers.contract import SERVICE, sample
from bench.peers.sample import API_KEY, JOB_ID
from fleet_server.bridge import Bridge
from fleet_server.bridge.guard import HostOriginGuard
from fleet_server.domain.errors import FleetError
from fleet_server.http import HttpServer, bind
from fleet_server.memory import settle_memory
from fleet_server.rpc.auth import ApiKey, KeyRing
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import methods_of
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.scopes import Scope


class Jobs:
    """The servicer."""

    def __init__(self) -> None:
        self._jobs = {JOB_ID: sample()}

    async def GetJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        job = self._jobs.get(request.job_id)
        if job is None:
            raise FleetError("JOB_NOT_FOUND", f"job_id: there is no job {request.job_id}")
        return job

    async def CreateJob(self, request: Any, context: Any) -> Any:  # noqa: N802
        return request.job


async def main() -> None:
    """Serves until it is terminated."""
    methods = methods_of(SERVICE, Jobs(), scope_of=lambda _: Scope.ADMIN)
    keys = KeyRing([ApiKey.of("bench", API_KEY)], clock=time.monotonic)
    invoker = Invoker(methods, keys=keys, metrics=RpcMetrics(CollectorRegistry(), methods))
    app = HostOriginGuard(Bridge([SERVICE], invoker))
    server = HttpServer(app, bind("127.0.0.1", 0, "port"), grace_seconds=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.run())
        await server.started()
        settle_memory()
        sys.stdout.write(f"{server.port}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
