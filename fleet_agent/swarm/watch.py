"""Looks at the swarm's services while this node manages them, and says which have changed."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable

import structlog
from fleet.v1 import types_pb2

from fleet_agent.commands.faults import CommandFault
from fleet_agent.docker_engine import DockerEngine, DockerRefusedError, DockerUnavailableError
from fleet_agent.swarm.manager import SwarmManager

_log = structlog.get_logger("fleet.agent.swarm")
REMOVED = "removed"
"""`update.status` of a service that is no more."""
MOST_TASKS = 64
"""What is told of a change names no more tasks: whoever wants all asks for the service."""


class SwarmWatch:
    """`run` looks every `seconds`, and at once when the engine speaks of a change.

    `changed(service)` is called for each service that is not as it was, and again while it says that it could not tell
    anybody. After `told_nothing` (a new session) all of them count as changed.
    """

    def __init__(
        self,
        engine: DockerEngine,
        manager: SwarmManager,
        changed: Callable[[types_pb2.SwarmService], bool],
        *,
        seconds: float = 5.0,
        gather_seconds: float = 0.2,
    ) -> None:
        self._engine = engine
        self._manager = manager
        self._changed = changed
        self._seconds = seconds
        self._gather_seconds = gather_seconds
        self._known: dict[str, tuple[bytes, types_pb2.SwarmService]] = {}
        self._look_now = asyncio.Event()

    def told_nothing(self) -> None:
        """Nobody knows the services yet: they are told again at the next look."""
        self._known.clear()
        self._look_now.set()

    async def run(self) -> None:
        """Until cancelled. Whatever the engine does, it goes on looking."""
        looked = -self._seconds
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(), name="swarm-events")
            while True:
                self._look_now.clear()
                if time.monotonic() - looked >= self._seconds:
                    # The role may change while the engine runs.
                    await self._engine.look()
                    looked = time.monotonic()
                if self._engine.facts.swarm_role == "manager":
                    try:
                        await self._look()
                    except Exception:
                        # An engine that answers what nobody expects must not end the agent.
                        _log.exception("the swarm's services cannot be read")
                else:
                    self._known.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._seconds):
                        await self._look_now.wait()
                # What changes a service changes its tasks in the next moment.
                await asyncio.sleep(self._gather_seconds)

    async def _look(self) -> None:
        try:
            services = await self._manager.services()
        except CommandFault as fault:
            _log.warning("the swarm's services cannot be read", why=fault.detail)
            return
        for service in services:
            _shorten(service)
            digest = hashlib.sha256(service.SerializeToString(deterministic=True)).digest()
            known = self._known.get(service.service_id)
            if (known is None or known[0] != digest) and self._changed(service):
                self._known[service.service_id] = digest, service
        for service_id in self._known.keys() - {service.service_id for service in services}:
            gone = types_pb2.SwarmService()
            gone.CopyFrom(self._known[service_id][1])
            gone.running_replicas = 0
            gone.ClearField("tasks")
            gone.update.Clear()
            gone.update.status = REMOVED
            if self._changed(gone):
                del self._known[service_id]

    async def _listen(self) -> None:
        """The engine's own events: of services that it manages, of containers for the tasks that it runs."""
        params = {"filters": '{"type":["service","container"],"event":["create","update","remove","start","die"]}'}
        while True:
            try:
                async with self._engine.stream("/events", params) as chunks:
                    async for _ in chunks:
                        if self._engine.facts.swarm_role == "manager":
                            self._look_now.set()
            except (DockerUnavailableError, DockerRefusedError):
                pass
            await asyncio.sleep(self._seconds)


def _shorten(service: types_pb2.SwarmService) -> None:
    del service.tasks[MOST_TASKS:]
