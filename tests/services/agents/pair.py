"""Two servers on one store."""

from __future__ import annotations

import asyncio
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fleet_server.store import Store
from tests.services.agents.agent import ScriptedAgent
from tests.services.agents.bench import QUICK, Bench, bench_on

PATIENT = replace(QUICK, silence_seconds=600, lease_seconds=600, accept_seconds=600)
"""A scripted agent beats when it is told to."""


@dataclass
class Pair:
    """Two servers on one store."""

    a: Bench
    b: Bench
    stack: AsyncExitStack

    async def dial(self, server: Bench, *names: str) -> list[ScriptedAgent]:
        agents = [server.agent(name) for name in names]
        for agent in agents:
            await agent.dial()
        return agents

    async def die(self, server: Bench) -> None:
        """As by SIGKILL: nobody says goodbye, and nothing is written down."""
        for task in server.tasks:
            task.cancel()
        await asyncio.gather(*server.tasks, return_exceptions=True)
        await server.server.stop(0)


async def opened(stack: AsyncExitStack, store: Store, name: str) -> Bench:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fleet-", dir="/tmp")))
    return await stack.enter_async_context(bench_on(store, folder, settings=PATIENT, replica=name))
