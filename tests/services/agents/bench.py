"""The agents' side of a server put together on a real store, behind the real chain and a real gRPC port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleet.v1 import node_pb2, types_pb2
from prometheus_client import CollectorRegistry
from uuid_utils import uuid7

from fleet_server.domain.job import JobRecord, NewJob, Priority
from fleet_server.keeping import Keeping
from fleet_server.rpc.auth import ApiKey, KeyRing
from fleet_server.rpc.invoke import Invoker
from fleet_server.rpc.methods import methods_of
from fleet_server.rpc.metrics import RpcMetrics
from fleet_server.rpc.node import NodeServicer
from fleet_server.rpc.server import GrpcServer
from fleet_server.services.commands import Commands
from fleet_server.services.completion import Completions
from fleet_server.services.dispatch import Decision, Dispatcher, DispatchSettings
from fleet_server.services.file_reader import FileReader
from fleet_server.services.fleet import FleetView
from fleet_server.services.inputs import InputResolver
from fleet_server.services.joins import Joins
from fleet_server.services.lanes import lane_of
from fleet_server.services.nodes import now_ms
from fleet_server.services.output_files import OutputFiles
from fleet_server.services.progress import ProgressHub
from fleet_server.services.session import SessionSettings
from fleet_server.services.sessions import Sessions
from fleet_server.services.speeds import Speeds
from fleet_server.services.uploads import Uploads
from fleet_server.storage.outputs import LocalOutputs, OutputLimits
from fleet_server.storage.s3 import S3Store
from fleet_server.store import Store
from tests.services.agents.agent import ScriptedAgent

QUICK = SessionSettings(
    heartbeat_seconds=0.2,
    lease_seconds=30,
    watch_seconds=0.02,
    repeat_seconds=0.02,
    avoid_seconds=0.05,
    spool_seconds=60,
)
"""Durations of production would make the tests slow; what a test is about it sets itself."""


@dataclass
class Bench:
    """A server's agents' side. `agents` are closed with it."""

    store: Store
    outputs: LocalOutputs
    fleet: FleetView
    hub: ProgressHub
    sessions: Sessions
    dispatcher: Dispatcher
    server: GrpcServer
    address: str
    folder: Path
    commands: Commands
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    agents: list[ScriptedAgent] = field(default_factory=list)

    def agent(self, node_id: str = "agx0", instance_id: str = "boot-1", **hello: Any) -> ScriptedAgent:
        """An agent that has not dialled yet."""
        agent = ScriptedAgent(self.address, node_id, instance_id, **hello)
        self.agents.append(agent)
        return agent

    async def submit(
        self,
        *,
        prompt: str = "a sunset",
        model: str = "sketch",
        max_retries: int = 3,
        priority: Priority = Priority.NORMAL,
        **spec: Any,
    ) -> str:
        """A job that waits; its id."""
        whole = types_pb2.JobSpec(
            job_type=types_pb2.JobType.JOB_TYPE_IMAGE_GEN,
            payload=types_pb2.Payload(image_gen=types_pb2.ImagePayload(prompt=prompt)),
            priority=types_pb2.JobPriority.JOB_PRIORITY_NORMAL,
            target_cluster="vision",
            target_model="SDXL_4GB_FP8.safetensors",
            resolved_model=model,
        )
        whole.MergeFrom(types_pb2.JobSpec(**spec))
        job = NewJob(
            job_id=str(uuid7()),
            spec=whole.SerializeToString(),
            lane=lane_of(whole),
            priority=priority,
            owner="",
            max_retries=max_retries,
            timeout_ms=60_000,
            queue_ttl_ms=86_400_000,
            exclusive=whole.exclusive,
        )
        await self.store.jobs.submit([job])
        self.dispatcher.wake()
        return job.job_id

    async def job(self, job_id: str) -> JobRecord:
        record = await self.store.jobs.get(job_id)
        assert record is not None
        return record

    async def started(self, job_id: str) -> bool:
        """Whether the store knows that its engine began: what never did is given back without a loss."""
        return (await self.job(job_id)).started_ms is not None

    async def status(self, node_id: str = "agx0") -> str:
        """The node's status by the store's book."""
        row = await self.store.nodes.get(node_id)
        assert row is not None
        return row.status

    async def status_is(self, status: str, node_id: str = "agx0") -> bool:
        return await self.status(node_id) == status

    def time_is_up(self, node_id: str = "agx0") -> None:
        """What the node was sent and has not accepted is late from now on, whatever `accept_seconds` says."""
        session = self.sessions.live(node_id)
        assert session is not None
        for attempt in session._book:
            if attempt.accept_by is not None:
                attempt.accept_by = 0.0

    async def stop(self) -> None:
        for agent in self.agents:
            await agent.close()
        await self.server.stop(0)
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.outputs.aclose()


@asynccontextmanager
async def bench_on(
    store: Store,
    folder: Path,
    *,
    settings: SessionSettings = QUICK,
    dispatch: bool = True,
    limits: OutputLimits | None = None,
    replica: str = "server",
    clock: Callable[[], int] = now_ms,
    poll_seconds: float = 0.05,
    on_decision: Callable[[Decision], None] | None = None,
    joins: Joins | None = None,
    keys: Sequence[ApiKey] = (),
    listen: Callable[[GrpcServer], Awaitable[None]] | None = None,
) -> AsyncIterator[Bench]:
    """A running bench on a unix socket in `folder`, and on what `listen` binds; without `dispatch` the test takes the
    rounds itself."""
    outputs = LocalOutputs(folder / "outputs", limits or OutputLimits(reserve_bytes=0))
    await outputs.open()
    fleet, hub = FleetView(), ProgressHub()
    speeds = Speeds(clock=clock)
    completions = Completions(store, outputs, draw=lambda: 0.5, taken=speeds.taken)
    sessions = Sessions(store, fleet, hub, completions, settings=settings, replica=replica, version="1.0.0")
    dispatcher = Dispatcher(
        store,
        fleet,
        sessions,
        speeds=speeds,
        settings=DispatchSettings(poll_seconds=poll_seconds, repeat_seconds=0.02),
        clock=clock,
        on_decision=on_decision,
    )
    commands = Commands(sessions, fleet)
    inputs = InputResolver(store.jobs, store.outputs, store.inputs)
    keeping = Keeping(store, fleet, sessions, commands, inputs, joins)
    servicer = NodeServicer(fleet, sessions, Uploads(store, outputs), commands, keeping.parts, _reader(store, outputs))
    methods = methods_of(node_pb2.DESCRIPTOR.services_by_name["Node"], servicer, public=["Join"])
    metrics = RpcMetrics(CollectorRegistry(), methods)
    ring = KeyRing(keys, clock=time.monotonic)
    server = GrpcServer(Invoker(methods, keys=ring, metrics=metrics, identities=joins))
    address = f"unix:{folder / 'g'}"
    if listen is not None:
        await listen(server)
    await server.start(address)
    bench = Bench(store, outputs, fleet, hub, sessions, dispatcher, server, address, folder, commands)
    bench.tasks.append(asyncio.create_task(sessions.run()))
    bench.tasks.append(asyncio.create_task(keeping.run()))
    if dispatch:
        bench.tasks.append(asyncio.create_task(dispatcher.run()))
    try:
        yield bench
    finally:
        await bench.stop()
    for task in bench.tasks:
        assert task.cancelled(), task


def _reader(store: Store, outputs: LocalOutputs) -> FileReader:
    s3 = S3Store(None)
    return FileReader(OutputFiles(outputs, s3, store.outputs), store.outputs, store.inputs, outputs, s3)
