"""Nodes without a stream: disconnected at once, down when they stay away; a goodbye gives their work back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection

import structlog

from fleet_server.domain.errors import FleetError
from fleet_server.domain.node import NodeStatus
from fleet_server.services.fleet import FleetView
from fleet_server.services.session import Session
from fleet_server.services.session_parts import SessionSettings
from fleet_server.store import Store

_log = structlog.get_logger("fleet.sessions")


class Departures:
    """Writes down who left, again and again until the store has taken it; watches who stays away.

    `live` holds the ids of nodes with a stream; `lock` is the lock under which a node's stream begins and ends.
    """

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        settings: SessionSettings,
        replica: str,
        *,
        live: Collection[str],
        lock: Callable[[str], asyncio.Lock],
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._settings = settings
        self._replica = replica
        self._live = live
        self._lock = lock
        self._left: dict[str, Session] = {}
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()
        self._down_at: dict[str, tuple[float, str]] = {}
        self._loaded = asyncio.Event()
        self.closing = False
        """This server is going: those who leave now did not vanish."""

    def add(self, session: Session) -> None:
        """A stream is over. The node is not online from here on; what the store must hear follows."""
        self._left[session.node_id] = session
        self._none.clear()
        self._some.set()
        if self._fleet.node(session.node_id) is not None:
            goodbye = session.goodbye_at is not None
            self._fleet.set_status(session.node_id, NodeStatus.DOWN if goodbye else NodeStatus.DISCONNECTED)

    def came_back(self, node_id: str) -> None:
        """The node has a stream again."""
        self._down_at.pop(node_id, None)

    async def settle(self, node_id: str) -> None:
        """Writes the departure of one node down, if there is one and the store takes it. The caller holds its lock."""
        session = self._left.get(node_id)
        if session is None:
            return
        await session.ended.wait()
        try:
            known = await self._write(session)
            if not known:
                await self._moved(node_id)
        except FleetError as error:
            _log.warning("departure not written down yet", node_id=node_id, detail=error.detail)
            return
        if self._left.get(node_id) is session:
            del self._left[node_id]
        if not self._left:
            self._none.set()
        if known and session.goodbye_at is None:
            self._stays_away(node_id, session.session_id)
        elif known:
            self._fleet.touch(node_id)

    async def loaded(self) -> None:
        """Returns when the nodes that the store knows are known here."""
        await self._loaded.wait()

    async def settled(self) -> None:
        """Returns when all departures are written down."""
        await self._none.wait()

    async def run(self) -> None:
        """Loads the nodes that the store knows, then does its work until cancelled."""
        await self._load()
        self._loaded.set()
        while True:
            self._some.clear()
            for node_id in tuple(self._left):
                async with self._lock(node_id):
                    await self.settle(node_id)
            await self._give_up()
            try:
                async with asyncio.timeout(
                    self._settings.repeat_seconds if self._left else self._settings.watch_seconds
                ):
                    await self._some.wait()
            except TimeoutError:
                continue

    async def _write(self, session: Session) -> bool:
        """Whether the store still knew the session. After a goodbye the node's work goes back at once, uncounted."""
        node_id, jobs = session.node_id, self._store.jobs
        lost = session.goodbye_at is None and not self.closing
        known = await self._store.nodes.disconnect(node_id, session.session_id, lost=lost)
        if known and session.goodbye_at is not None:
            for token, job_id in (await jobs.held_by(node_id)).items():
                await jobs.release(job_id, token)
            await self._store.nodes.set_down(node_id, session.session_id)
        return known

    async def _moved(self, node_id: str) -> None:
        """The node has another session; where it began at another replica, its state here is as the store has it."""
        row = await self._store.nodes.get(node_id)
        if row is not None and row.replica != self._replica and node_id not in self._live:
            self._fleet.told(row)

    def _stays_away(self, node_id: str, session_id: str) -> None:
        self._down_at[node_id] = (asyncio.get_running_loop().time() + self._settings.lease_seconds, session_id)

    async def _give_up(self) -> None:
        now = asyncio.get_running_loop().time()
        for node_id, (at, session_id) in tuple(self._down_at.items()):
            if at > now:
                continue
            async with self._lock(node_id):
                try:
                    down = await self._store.nodes.set_down(node_id, session_id)
                except FleetError as error:
                    _log.warning("node not given up yet", node_id=node_id, detail=error.detail)
                    continue
                self._down_at.pop(node_id, None)
                if down and node_id not in self._live:
                    self._fleet.set_status(node_id, NodeStatus.DOWN)

    async def _load(self) -> None:
        while True:
            try:
                for row in await self._fleet.load(self._store):
                    if row.replica == self._replica and row.node_id not in self._live:
                        # It was this server that went.
                        await self._store.nodes.disconnect(row.node_id, row.session, lost=False)
                        if row.status != NodeStatus.DOWN:
                            self._stays_away(row.node_id, row.session)
                return
            except FleetError as error:
                _log.warning("nodes not loaded yet", detail=error.detail)
                await asyncio.sleep(self._settings.repeat_seconds)
