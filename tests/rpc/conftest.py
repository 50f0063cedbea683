"""A servicer of our own protos behind the real chain, on the real server, for pytest-grpc's fixtures.

pytest-grpc would serve with grpc's threads; `grpc_server` is overridden with our asyncio server in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import grpc
import pytest
from fleet.v1 import queue_pb2, queue_pb2_grpc, types_pb2
from prometheus_client import CollectorRegistry

from fleet_server.domain.errors import FleetError
from fleet_server.rpc.auth import ApiKey, KeyRing
from fleet_server.rpc.caller import caller_of, idempotency_key
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import methods_of
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.server import GrpcServer

KEY = "a-key-for-tests"
ORDINARY_KEY = "a-key-of-no-admin"


class EchoQueue:
    """Answers with what it was given, or does what the request's words ask for."""

    def __init__(self) -> None:
        self.closed = threading.Event()

    def __getattr__(self, name: str) -> Any:
        if name not in queue_pb2.DESCRIPTOR.services_by_name["Queue"].methods_by_name:
            raise AttributeError(name)

        async def unknown(request: Any, context: Any) -> Any:
            raise FleetError("NOT_IMPLEMENTED", f"{name}: not in these tests")

        return unknown

    async def CreateJob(self, request: queue_pb2.CreateJobRequest, context: Any) -> queue_pb2.CreateJobResponse:
        key = idempotency_key(context, request) or ""
        caller = caller_of(context)
        words = f"{request.max_retries} {request.priority} {request.timeout_seconds} {caller.owner} {key}"
        return queue_pb2.CreateJobResponse(receipt=types_pb2.Receipt(job_id=words))

    async def BatchCreateJobs(self, request: Any, context: Any) -> queue_pb2.BatchCreateJobsResponse:
        return queue_pb2.BatchCreateJobsResponse()

    async def GetJob(self, request: queue_pb2.GetJobRequest, context: Any) -> queue_pb2.GetJobResponse:
        if request.job_id == "wait":
            await asyncio.Event().wait()
        if request.job_id == "full":
            raise FleetError("QUEUE_FULL", "the queue is full: try again later", retry_after_seconds=1.5)
        if request.job_id == "bug":
            raise ZeroDivisionError("a secret detail")
        raise FleetError("JOB_NOT_FOUND", f"job_id: no job {request.job_id}")

    async def WatchJob(self, request: queue_pb2.WatchJobRequest, context: Any) -> AsyncIterator[types_pb2.Event]:
        try:
            for number in range(3):
                yield types_pb2.Event(id=str(number))
            if request.job_id == "fails":
                raise FleetError("STORE_UNAVAILABLE", "the store is away: try again")
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def GetStats(self, request: Any, context: Any) -> queue_pb2.GetStatsResponse:
        return queue_pb2.GetStatsResponse(window_seconds=7)


@pytest.fixture(scope="module")
def grpc_servicer() -> EchoQueue:
    return EchoQueue()


@pytest.fixture(scope="module")
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[queue_pb2_grpc.QueueStub]:
    return queue_pb2_grpc.QueueStub


@pytest.fixture(scope="module")
def grpc_server(grpc_servicer: EchoQueue, registry: CollectorRegistry) -> Iterator[str]:
    """Our server in a thread; gives the address."""
    service = queue_pb2.DESCRIPTOR.services_by_name["Queue"]
    methods = [
        replace(method, timeout_seconds=0.2) if method.path.endswith("/GetJob") else method
        for method in methods_of(service, grpc_servicer, public=["GetStats"])
    ]
    keys = KeyRing([ApiKey.of("ann", KEY), ApiKey.of("bob", ORDINARY_KEY, admin=False)], clock=lambda: 0.0)
    invoker = Invoker(methods, keys=keys, metrics=RpcMetrics(registry, methods))
    address: list[str] = []
    ready = threading.Event()
    stop: list[Callable[[], object]] = []

    async def serve() -> None:
        server = GrpcServer(invoker)
        address.append(f"127.0.0.1:{await server.start('127.0.0.1:0')}")
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        stop.append(lambda: loop.call_soon_threadsafe(ended.set))
        ready.set()
        await ended.wait()
        await server.stop(0)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(50)
    yield address[0]
    stop[0]()
    thread.join(50)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def grpc_create_channel(grpc_server: str) -> Callable[..., grpc.Channel]:
    def create(credentials: grpc.ChannelCredentials | None = None, options: Any = None) -> grpc.Channel:
        return grpc.insecure_channel(grpc_server, options)

    return create
