"""Tells the server of containers of the fleet that are started, end or are removed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable

import structlog
from fleet.v1 import types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.containers.containers import Containers
from fleet_agent.containers.messages import MANAGED
from fleet_agent.docker_engine import DockerEngine, DockerRefusedError, DockerUnavailableError

_log = structlog.get_logger("fleet.agent.containers")
_RUNNING = types_pb2.CONTAINER_STATUS_RUNNING
_Told = tuple[str, int, int, int]


class ContainerWatch:
    """`run` looks when the engine speaks of a container, and now and then.

    `changed(container)` says whether the server could be told; what could not is told at a later look.
    """

    def __init__(
        self,
        engine: DockerEngine,
        containers: Containers,
        changed: Callable[[types_pb2.Container], bool],
        *,
        seconds: float = 5.0,
    ) -> None:
        self._engine = engine
        self._containers = containers
        self._changed = changed
        self._seconds = seconds
        self._known: dict[str, tuple[_Told, types_pb2.Container]] | None = None
        self._look_now = asyncio.Event()
        self._looking = asyncio.Lock()
        self.running = 0
        """How many containers of the fleet run, as of the last look that the engine answered."""

    async def run(self) -> None:
        """Until cancelled. Whatever the engine does, it goes on looking."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="container-events")
            while True:
                self._look_now.clear()
                await self.look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(12 * self._seconds):
                        await self._look_now.wait()

    async def look(self) -> None:
        """Reads the fleet's containers and tells what is new. What was there at the first look is no news.

        What is seen is no older than the call.
        """
        async with self._looking:
            await self._look()

    async def _look(self) -> None:
        # Containers outlive an engine that is away: nobody says that they have ended.
        if not self._engine.facts.version:
            return
        await self._containers.tidy()
        try:
            found = {one.container_id: one for one in await self._containers.all(managed=True)}
        except CommandFault as fault:
            _log.warning("the node's containers cannot be read", why=fault.detail)
            return
        self.running = sum(one.status == _RUNNING for one in found.values())
        if self._known is None:
            self._known = {name: (_state(one), one) for name, one in found.items()}
            return
        for name, one in found.items():
            before = self._known.get(name)
            # Until it runs it is on its way; one whose start fails is never heard of.
            if before is None and one.status == types_pb2.CONTAINER_STATUS_CREATED:
                continue
            if (before is None or before[0] != _state(one)) and self._changed(one):
                self._known[name] = _state(one), one
        for name in self._known.keys() - found.keys():
            gone = types_pb2.Container()
            gone.CopyFrom(self._known[name][1])
            gone.status = types_pb2.CONTAINER_STATUS_REMOVED
            if self._changed(gone):
                del self._known[name]

    async def _listen(self) -> None:
        events = ["start", "die", "destroy", "pause", "unpause"]
        words = json.dumps({"type": ["container"], "event": events, "label": [MANAGED]})
        while True:
            try:
                async with self._engine.stream("/events", {"filters": words}) as chunks:
                    self._look_now.set()
                    async for _ in chunks:
                        self._look_now.set()
            except (DockerUnavailableError, DockerRefusedError):
                pass
            await asyncio.sleep(self._seconds)


def _state(container: types_pb2.Container) -> _Told:
    return (
        container.container_id,
        container.status,
        container.start_time.ToNanoseconds(),
        container.end_time.ToNanoseconds(),
    )
