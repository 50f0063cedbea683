"""One simulated node: the real agent's runner and session around modelled slots, files and readings."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleet.v1 import node_pb2, types_pb2

from fleet_agent import __version__
from fleet_agent.attempt import Attempt
from fleet_agent.engines.base import ModelFile
from fleet_agent.inventory import JOB_TYPE_WORDS, Inventory
from fleet_agent.link import Link
from fleet_agent.metrics.reader import MetricsReader, Readings
from fleet_agent.runner import Runner
from fleet_agent.session import Session
from fleet_agent.settings import AgentSettings
from fleet_agent.simulation.channels import Channels
from fleet_agent.simulation.faults import Faults
from fleet_agent.simulation.profiles import GIB, NodePlan
from fleet_agent.simulation.session import SimulatedSession
from fleet_agent.simulation.slot import ENGINE, ModelledSlot, Pace
from fleet_agent.simulation.spool import MemorySpool
from fleet_agent.simulation.tally import Tally


@dataclass(frozen=True, slots=True)
class World:
    """What all nodes of a simulation share."""

    settings: AgentSettings
    channels: Channels
    tally: Tally
    pace: Pace
    faults: Faults
    folder: Path


class ModelledInventory(Inventory):
    """The files and the one engine of a plan; nothing is looked for on a disk."""

    def __init__(self, settings: AgentSettings, plan: NodePlan) -> None:
        super().__init__(settings)
        words = list(plan.job_types)
        names = [model.name for model in plan.models if model.kind == "checkpoint"]
        self._infos = {
            ENGINE: {"version": __version__, "job_types": words, "builtin_models": names, "architectures": [ENGINE]}
        }
        self._statuses = [
            {"name": ENGINE, "version": __version__, "status": "ready", "detail": None, "job_types": words}
        ]
        self._listed: list[node_pb2.ModelFile] = []
        for model in plan.models:
            kind = "checkpoint" if model.kind == "checkpoint" else "lora"
            path = None if kind == "checkpoint" else Path(model.name)
            size = int(model.size_gib * GIB)
            self._files["checkpoint" if kind == "checkpoint" else "lora", model.name] = ModelFile(
                model.name, path, "checkpoint" if kind == "checkpoint" else "lora", size, "", ENGINE
            )
            self._listed.append(
                node_pb2.ModelFile(
                    name=model.name,
                    kind=kind,
                    size_bytes=size,
                    architecture=ENGINE,
                    job_types=[JOB_TYPE_WORDS[word] for word in model.job_types],
                    engine=ENGINE,
                )
            )

    def models(self) -> list[node_pb2.ModelFile]:
        return self._listed

    def intake(self) -> None:
        """It brings nothing from buckets."""


class ModelledMetrics(MetricsReader):
    """Readings of a modelled GPU: memory by what is loaded, warm and busy while it works."""

    def __init__(self, plan: NodePlan, slots: Sequence[ModelledSlot], runner: Runner, rng: random.Random) -> None:
        super().__init__(Path(), 1.0, sources=())
        self._plan = plan
        self._slots = slots
        self._runner = runner
        self._rng = rng

    async def read(self) -> Readings:
        gpu, slots = self._plan.gpu, len(self._slots)
        busy = (slots - self._runner.slots_free) / slots
        used = sum(model.memory_bytes for slot in self._slots for model in slot.loaded)
        noise = self._rng.uniform(-2, 2)
        reading = types_pb2.Gpu(
            index=0,
            name=f"{gpu.title} (simulated)",
            utilization_percent=round(max(0.0, min(100.0, 97 * busy + noise)), 1),
            memory_total_bytes=gpu.memory_gib * GIB,
            memory_used_bytes=min(used + GIB // 2, gpu.memory_gib * GIB),
            unified_memory=gpu.unified,
            temperature_celsius=round(38 + 35 * busy + noise, 1),
        )
        host = types_pb2.Host(cpu_count=8, cpu_percent=round(10 + 20 * busy + noise, 1))
        return Readings(host, [reading], types_pb2.METRICS_SOURCE_NONE)


class SimulatedRunner(Runner):
    """The real Runner on modelled slots; the tally hears of what no message says."""

    def __init__(
        self,
        settings: AgentSettings,
        inventory: Inventory,
        spool: MemorySpool,
        slots: Sequence[ModelledSlot],
        tally: Tally,
    ) -> None:
        super().__init__(settings, inventory, spool)
        self._slots = list(slots)
        self._tally = tally

    def connected(self, link: Link, kill_tokens: Iterable[str] = ()) -> None:
        tokens = list(kill_tokens)
        self._tally.killed(tokens, self._settings.node_id, time.monotonic())
        super().connected(link, tokens)

    def assign(self, assign: node_pb2.Assign) -> None:
        super().assign(assign)
        if assign.token not in self._running and assign.token not in self.deliveries:
            self._tally.rejected(assign.token)

    async def _run(self, attempt: Attempt) -> None:
        await super()._run(attempt)
        if attempt.token not in self.deliveries:
            self._tally.left(attempt.token)


class SimulatedNode:
    """A node that can be connected, cut off and crashed. `run` is its life."""

    def __init__(self, number: int, plan: NodePlan, world: World, seed: int) -> None:
        self.plan = plan
        self._number = number
        self._world = world
        self._rng = random.Random(seed)
        self._settings = world.settings.model_copy(
            update={
                "node_id": plan.node_id,
                "slots": plan.gpu.slots,
                "labels": {"simulated": "true", "gpu": plan.gpu.name},
                "data_dir": world.folder,
            }
        )
        # It outlives a crash, as a disk does.
        self._spool = MemorySpool(world.folder, world.tally.forgotten)
        self._session: Session | None = None
        self._runner: Runner | None = None
        self._life: asyncio.Task[None] | None = None
        self._down = 0.0

    @property
    def slots_free(self) -> int:
        return self._runner.slots_free if self._runner is not None else 0

    def crash(self, seconds: float) -> None:
        """The agent dies; a new one starts after that many seconds."""
        if self._life is not None:
            self._down = seconds
            self._life.cancel()

    def disconnect(self, seconds: float) -> None:
        """The network goes away for that long."""
        if isinstance(self._session, SimulatedSession):
            self._session.cut(seconds)

    async def run(self, delay: float, stopping: asyncio.Event) -> None:
        """Starts the agent after `delay` seconds, and again after each crash; until `stopping`, then says goodbye."""
        self._down = delay
        while not stopping.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._down):
                    await stopping.wait()
            if stopping.is_set():
                return
            self._down = 0.0
            life = self._life = asyncio.create_task(self._live(stopping), name=self.plan.node_id)
            try:
                await asyncio.wait({life})
            finally:
                life.cancel()
            if not life.cancelled() and (error := life.exception()) is not None:
                raise error
            if life.cancelled():
                self._world.tally.crashed(self.plan.node_id)

    async def _live(self, stopping: asyncio.Event) -> None:
        """One boot of the agent."""
        world, plan = self._world, self.plan
        inventory = ModelledInventory(self._settings, plan)
        slots = [self._slot(index) for index in range(plan.gpu.slots)]
        runner = self._runner = SimulatedRunner(self._settings, inventory, self._spool, slots, world.tally)
        session = self._session = SimulatedSession(
            self._settings,
            inventory,
            runner,
            ModelledMetrics(plan, slots, runner, self._rng),
            number=self._number,
            channels=world.channels,
            tally=world.tally,
            rng=self._rng,
        )
        async with asyncio.TaskGroup() as tasks:
            await runner.open(tasks)
            connected = tasks.create_task(session.run())
            await stopping.wait()
            await runner.release()
            await session.goodbye()
            connected.cancel()
            runner.cancel_tasks()

    def _slot(self, index: int) -> ModelledSlot:
        world, plan = self._world, self.plan
        return ModelledSlot(
            index,
            plan,
            world.pace,
            world.faults,
            self._rng,
            worked=lambda *what: world.tally.worked(plan, *what),
        )
