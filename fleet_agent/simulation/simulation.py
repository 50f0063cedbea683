"""A simulation from start to end: nodes, jobs and faults in one task group."""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from fleet_agent.settings import AgentSettings
from fleet_agent.simulation.channels import STREAMS_PER_CHANNEL, Channels
from fleet_agent.simulation.faults import NONE, Faults, afflicted
from fleet_agent.simulation.load import JobSource, Load
from fleet_agent.simulation.node import SimulatedNode, World
from fleet_agent.simulation.profiles import Profile, capacity, plan_fleet
from fleet_agent.simulation.slot import Pace
from fleet_agent.simulation.tally import Record, Tally
from fleet_agent.upload import Metadata

_WATCH_SECONDS = 1.0
_CRASH_SECONDS = (2.0, 15.0)
_AWAY_SECONDS = (1.0, 45.0)
"""Some absences are longer than a lease."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is simulated. `arrival_seconds`: the agents dial at random times within it."""

    profile: Profile
    nodes: int
    server: str = "127.0.0.1:50051"
    seed: int = 7
    pace: Pace = field(default_factory=Pace)
    faults: Faults = NONE
    arrival_seconds: float = 10.0
    streams_per_channel: int = STREAMS_PER_CHANNEL
    reconnect_seconds: float = 10.0
    """A lost stream is dialled again within that time, at random."""
    api_key: str | None = None
    detour: str = ""
    """Another address of the server, for the agents of the first channel: what lies there may be cut off."""


class Simulation:
    """`run` it once. `tally` may be read at any time."""

    def __init__(self, plan: Plan, record: Record | None = None) -> None:
        self.plan = plan
        self.tally = Tally(record=record)
        rng = random.Random(plan.seed)
        self.nodes = afflicted(plan_fleet(plan.profile, plan.nodes, rng), plan.faults, rng)
        for node in self.nodes:
            self.tally.planned(node)
        self.capacity = capacity(plan.profile, self.nodes) * plan.pace.speed
        self.started_at = time.monotonic()
        self.working_since: float | None = None
        """When the first job could be sent: all nodes were online."""
        self.source: JobSource | None = None
        self._fate = random.Random(rng.getrandbits(64))
        self._jobs = random.Random(rng.getrandbits(64))
        self._seeds = [rng.getrandbits(64) for _ in self.nodes]
        self._all_sent = False
        self._jobs_may_come = asyncio.Event()
        self._stopping = asyncio.Event()
        self.drained = asyncio.Event()
        """All jobs of the load have been sent and have ended."""

    def let_jobs_in(self) -> None:
        """Lets the load begin, where `run` was told to wait for it."""
        self._jobs_may_come.set()

    def stop_jobs(self) -> None:
        """Sends no more; `drained` is set when all that were sent have ended."""
        if self.source is not None:
            self.source.stop()

    def stop(self) -> None:
        """Lets the agents give back what they run and say goodbye; `run` returns then."""
        self._stopping.set()

    async def all_online(self) -> None:
        """Returns when every node is connected."""
        await self.tally.all_online.wait()

    async def run(self, load: Load, until: Callable[[Simulation], Awaitable[None]], *, jobs_wait: bool = False) -> None:
        """Runs the fleet until `until` returns (or `stop`), then stops it.

        Jobs come once all nodes are online, with `jobs_wait` not before `let_jobs_in`.
        """
        if not jobs_wait:
            self._jobs_may_come.set()
        settings = AgentSettings(
            server=self.plan.server,
            node_id="simulated",
            disk_floor_bytes=0,
            labels={},
            clusters=(),
            engines=(),
            reconnect_seconds=self.plan.reconnect_seconds,
        )
        metadata: Metadata = () if self.plan.api_key is None else (("x-api-key", self.plan.api_key),)
        channels = Channels(
            self.plan.server,
            metadata,
            len(self.nodes),
            settings.upload_timeout_seconds,
            self.plan.streams_per_channel,
            self.plan.detour,
        )
        self.started_at = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fleet-simulation-") as folder:
            world = World(settings, channels, self.tally, self.plan.pace, self.plan.faults, Path(folder))
            try:
                await self._run(world, load, until)
            finally:
                await channels.close()

    async def _run(self, world: World, load: Load, until: Callable[[Simulation], Awaitable[None]]) -> None:
        models = {model.name for node in self.nodes for model in node.models if model.name != node.failing}
        source = JobSource(self.plan.profile.jobs, load, world.channels, self.tally, self._jobs, models)
        self.source = source
        fleet = [
            SimulatedNode(number, plan, world, seed)
            for number, (plan, seed) in enumerate(zip(self.nodes, self._seeds, strict=True))
        ]
        async with asyncio.TaskGroup() as tasks:
            for node in fleet:
                delay = self._fate.uniform(0, self.plan.arrival_seconds)
                tasks.create_task(node.run(delay, self._stopping), name=node.plan.node_id)
            others = [
                tasks.create_task(self._submit(source)),
                tasks.create_task(self._hurt(fleet)),
                tasks.create_task(self._look_after(source)),
            ]
            ending = asyncio.ensure_future(until(self))
            stopped = asyncio.ensure_future(self._stopping.wait())
            try:
                await asyncio.wait({ending, stopped}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopped.cancel()
                ending.cancel()
                self._stopping.set()
                for task in others:
                    task.cancel()
            if ending.done() and not ending.cancelled():
                ending.result()

    async def _submit(self, source: JobSource) -> None:
        """Jobs come once the fleet is there: else the first of them would be refused for want of their models."""
        await self.all_online()
        await self._jobs_may_come.wait()
        self.working_since = time.monotonic()
        await source.run()
        self._all_sent = True

    async def _look_after(self, source: JobSource) -> None:
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            await source.check_doubtful()
            if self._all_sent and not self.tally.unfinished:
                self.drained.set()

    async def _hurt(self, fleet: list[SimulatedNode]) -> None:
        """Crashes and cuts nodes at the rates of the faults."""
        faults = self.plan.faults
        per_second = (faults.crash + faults.disconnect) * len(fleet) / 3600
        if per_second <= 0:
            return
        await self.all_online()
        while True:
            await asyncio.sleep(self._fate.expovariate(per_second))
            node = self._fate.choice(fleet)
            if self._fate.random() < faults.crash / (faults.crash + faults.disconnect):
                node.crash(self._fate.uniform(*_CRASH_SECONDS))
            else:
                node.disconnect(self._fate.uniform(*_AWAY_SECONDS))
