"""One seeded source of faults. The same seed does the same things at the same moments of a run."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.chaos.world import LEASE_SECONDS, World
from tests.waiting import wait_until

PATIENCE_SECONDS = 180.0
"""So long a fault of the plan that must be done waits for something to do it to."""
ERR_RATE = 0.03
"""Share of the messages between agents and server that are lost, doubled or late."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens at a moment, in seconds from the beginning. `must`: it waits for what it is done to, where
    that is just being started again."""

    at: float
    what: str
    node: str = ""
    must: bool = False


def plan(seed: int, seconds: float, nodes: list[str]) -> list[Fault]:
    """The faults of a run, by time: each kind once for sure, the rest drawn, calm at the very beginning and end."""
    chance = random.Random(seed)
    kinds = ["kill agent", "stop agent", "kill store", "kill server", "cut", "stall", "kill engine"]
    chance.shuffle(kinds)
    sure = len(kinds)
    drawn = ["kill agent", "stop agent", "cut", "cut", "stall", "kill engine", "kill store", "stop server"]
    kinds += [chance.choice(drawn) for _ in range(int(seconds / 3))]
    # A stopped agent needs a lease's time to be missed, so such faults come early.
    faults = []
    for n, kind in enumerate(kinds):
        at = 1.0 + (seconds - 2.0) * (n + chance.random()) / len(kinds)
        if kind == "stop agent":
            at = min(at, max(1.0, seconds - 2.5 * LEASE_SECONDS))
        faults.append(Fault(at, kind, chance.choice(nodes), n < sure))
    return sorted(faults, key=lambda fault: (fault.at, fault.what))


class Nemesis:
    """Does what the plan says to a world; what holds for a while is ended by itself."""

    def __init__(self, world: World, faults: list[Fault]) -> None:
        self._world = world
        self._faults = faults
        self._acts: dict[str, Callable[[str], bool]] = {
            "kill agent": world.kill_agent,
            "kill engine": world.kill_engine,
            "cut": world.cut,
            "kill store": lambda _: world.kill_store(),
            "kill server": lambda _: world.kill_server(),
        }
        self._holds: dict[str, tuple[Callable[[str], bool], Callable[[str], bool], float]] = {
            "stop agent": (world.stop_agent, world.continue_agent, 1.6 * LEASE_SECONDS),
            "stall": (world.stall, world.resume, 0.5 * LEASE_SECONDS),
            "stop server": (lambda _: world.stop_server(), lambda _: world.continue_server(), 0.7),
        }

    async def run(self) -> None:
        """Returns when all has been done and what held has been let go."""
        self._world.errs.rate = ERR_RATE
        began = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as holds:
            for fault in self._faults:
                await asyncio.sleep(began + fault.at - asyncio.get_running_loop().time())
                holds.create_task(self._do(fault))

    async def _do(self, fault: Fault) -> None:
        if fault.what in self._acts:
            await self._begun(self._acts[fault.what], fault)
            return
        begin, end, seconds = self._holds[fault.what]
        if await self._begun(begin, fault):
            try:
                await asyncio.sleep(seconds)
            finally:
                end(fault.node)

    async def _begun(self, act: Callable[[str], bool], fault: Fault) -> bool:
        """Whether there was something to do it to."""
        if not fault.must:
            return act(fault.node)

        async def begun() -> bool:
            done = self._world.up and act(fault.node)
            if not done:
                await asyncio.sleep(0.1)
            return done

        with contextlib.suppress(AssertionError):
            return await wait_until(begun, seconds=PATIENCE_SECONDS)
        return False
