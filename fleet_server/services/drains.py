"""Nodes that are being emptied: how much is left, what happens at the deadline, and when it has really stopped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import structlog
from fleet.v1 import command_pb2, fleet_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.fleet import FleetView
from fleet_server.services.nodes import now_ms
from fleet_server.services.sessions import Sessions
from fleet_server.store import NodeRow, Store

_log = structlog.get_logger("fleet.drains")
StopContainers = Callable[[str], Awaitable[None]]
"""Stops the containers that the fleet deployed on a node. Raises FleetError."""


@dataclass(frozen=True, slots=True)
class DrainSettings:
    """`look_seconds`: between looks while something drains; `stop_again_seconds`: containers that are still there so
    long after they were told to stop are told again."""

    look_seconds: float = 1.0
    stop_again_seconds: float = 15.0


class Drains:
    """One task a replica. A node's drain is looked after by the replica that holds its stream; one without a stream is
    looked after by all, which do no harm to each other.

    `done` is written when nothing is left by the agent's own word: the store holds no attempt of the node, its slots
    are empty, and a heartbeat that is younger than the drain, and than every deploy, names no container.
    """

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        *,
        stop_containers: StopContainers | None = None,
        deployed_ms: Callable[[str], int] = lambda _: 0,
        settings: DrainSettings | None = None,
        clock: Callable[[], int] = now_ms,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._sessions = sessions
        self._stop_containers = stop_containers
        self._deployed_ms = deployed_ms
        self._settings = settings or DrainSettings()
        self._clock = clock
        self._some = asyncio.Event()
        self._asked: dict[str, float] = {}
        self._since: dict[str, tuple[int, int]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        fleet.subscribe_changes(self._changed)

    def wake(self) -> None:
        """Something may have changed: look soon. Never waits."""
        self._some.set()

    def _changed(self, node_id: str) -> None:
        # Slots of a busy fleet change all the time: only what drains, or is gone, is looked at.
        row = self._fleet.row(node_id)
        if row is None or (row.draining and not row.drain_done):
            self._some.set()

    async def run(self) -> None:
        """Looks until cancelled; while nothing drains it sleeps."""
        try:
            await self._watch()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            self._some.clear()
            waiting = self._fleet.draining()
            for row in waiting:
                try:
                    await self._look(row)
                except FleetError as error:
                    _log.warning("drain waits", node_id=row.node_id, reason=error.reason, detail=error.detail)
            try:
                async with asyncio.timeout(self._settings.look_seconds if waiting else None):
                    await self._some.wait()
            except TimeoutError:
                continue

    async def _look(self, row: NodeRow) -> None:
        here = self._sessions.live(row.node_id) is not None
        view = self._fleet.node(row.node_id)
        if view is None or (view.online and not here):
            return
        held = await self._store.jobs.held_by(row.node_id)
        stopped = row.drain_stopped
        if self._clock() >= row.drain_deadline_ms:
            await self._stop_jobs(row.node_id, held)
            stopped = True
        jobs = max(len(held), len(self._fleet.running(row.node_id)))
        containers, heard = self._containers(row)
        if stopped and containers:
            self._stop_there(row.node_id)
        done = here and heard and jobs == 0 and containers == 0
        if (jobs, containers, stopped, done) == (row.drain_jobs, row.drain_left, row.drain_stopped, row.drain_done):
            return
        after = await self._store.nodes.drain_looked(
            row.node_id, row.drain_start_ms, jobs=jobs, containers=containers, stopped=stopped, done=done
        )
        if after is not None:
            self._fleet.decided(after)
        if done:
            _log.info("node is drained", node_id=row.node_id)

    def _containers(self, row: NodeRow) -> tuple[int, bool]:
        """Containers that are left, and whether a heartbeat has said so since the drain is known here, and since the
        last deploy that it met."""
        if not row.drain_containers:
            return 0, True
        count, at_ms = self._fleet.containers(row.node_id)
        hello = self._fleet.hello(row.node_id)
        if row.drain_left and (hello is None or not hello.docker_version):
            # Containers outlive their engine; an agent that was started since has not seen them.
            return row.drain_left, False
        since, first = self._since.get(row.node_id, (0, 0))
        if since != row.drain_start_ms:
            first = at_ms
            self._since[row.node_id] = row.drain_start_ms, first
        return count, at_ms > max(first, self._deployed_ms(row.node_id))

    async def _stop_jobs(self, node_id: str, held: dict[str, str]) -> None:
        """They go back to the queue uncounted, to their old places, and the agent is told to stop them."""
        for token, job_id in held.items():
            await self._store.jobs.release(job_id, token, stopped=False)
            await self._sessions.cancel_attempt(job_id, node_id, token)
        if held:
            _log.warning("drain: the deadline has passed, jobs go elsewhere", node_id=node_id, jobs=len(held))
            self._fleet.touch(node_id)

    def _stop_there(self, node_id: str) -> None:
        """Tells the node to stop its containers, in a task of its own: other nodes do not wait for it."""
        now = asyncio.get_running_loop().time()
        if self._stop_containers is None or now < self._asked.get(node_id, 0.0):
            return
        self._asked[node_id] = now + self._settings.stop_again_seconds
        task = asyncio.create_task(self._stop_quietly(node_id, self._stop_containers), name=f"drain {node_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    async def _stop_quietly(node_id: str, stop: StopContainers) -> None:
        try:
            await stop(node_id)
        except FleetError as error:
            _log.warning("drain: containers not stopped", node_id=node_id, reason=error.reason, detail=error.detail)


class Runs(Protocol):
    """Gives commands to nodes: services.commands."""

    async def run(
        self,
        node_id: str,
        command: command_pb2.Command,
        *,
        timeout: float,  # noqa: ASYNC109 - it travels with the command
    ) -> command_pb2.CommandEnd:
        """Its end; raises FleetError."""
        ...

    def deployed_ms(self, node_id: str) -> int:
        """Until when (Unix ms) a deploy on the node is known of here."""
        ...


def container_stopper(commands: Runs, seconds: float = 60.0) -> StopContainers:
    """Removes all containers that the fleet deployed on a node, one after the other: a stopped one with a restart
    policy would come back."""

    async def stop(node_id: str) -> None:
        listing = command_pb2.Command(list_containers=fleet_pb2.ListContainersRequest(node_id=node_id))
        found = (await commands.run(node_id, listing, timeout=seconds)).containers.containers
        for container in found:
            if container.managed:
                request = fleet_pb2.RemoveContainerRequest(node_id=node_id, container_name=container.name)
                await commands.run(node_id, command_pb2.Command(remove=request), timeout=seconds)

    return stop
