"""Nodes whose streams other replicas hold: known here from the store, so that every replica answers alike."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import structlog

from fleet_server.domain.errors import Code, FleetError
from fleet_server.domain.node import NodeStatus
from fleet_server.services.fleet import FleetView
from fleet_server.services.nodes import now_ms
from fleet_server.services.session import Session
from fleet_server.services.session_parts import SessionSettings
from fleet_server.store import NodeRow, Store

_log = structlog.get_logger("fleet.sessions")


class Elsewhere:
    """Follows the rows of nodes that have no stream here.

    Changes come with the store's events (`told`), readings by a look at the rows now and then. A node of which nothing
    was heard for long, and whose replica gives no sign of life either, is written down as disconnected, and as down a
    lease later: nobody else would do it.
    """

    def __init__(
        self, store: Store, fleet: FleetView, settings: SessionSettings, replica: str, *, live: Mapping[str, Session]
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._settings = settings
        self._replica = replica
        self._live = live

    def told(self, row: NodeRow) -> None:
        """A node_update came. What this replica wrote itself is known already, but for what operators decided.

        The stream of a node that has begun another one elsewhere ends: its line may be dead, and nobody have noticed.
        """
        session = self._live.get(row.node_id)
        if session is not None and row.replica != self._replica and row.version > self._fleet.version(row.node_id):
            session.stop(FleetError("TAKEN_OVER", "this node has a newer stream at another server", code=Code.ABORTED))
        if row.deleted:
            if row.node_id not in self._live:
                self._fleet.forget(row.node_id)
        elif row.node_id not in self._live and (row.replica != self._replica or self._is_new(row)):
            self._fleet.told(row)
        else:
            self._fleet.decided(row)

    def _is_new(self, row: NodeRow) -> bool:
        """A node that was not known here. One whose stream begins here is known with that, and online no sooner."""
        return self._fleet.node(row.node_id) is None and row.status != NodeStatus.ONLINE

    async def run(self) -> None:
        """Looks at the rows until cancelled; while the store is away it waits."""
        while True:
            await asyncio.sleep(self._settings.persist_seconds)
            try:
                await self.look()
            except FleetError as error:
                _log.warning("nodes of other replicas not looked at", detail=error.detail)

    async def look(self) -> None:
        """One look at all rows, if any node is another replica's. Raises STORE_UNAVAILABLE."""
        if not self._fleet.has_others(self._replica):
            return
        rows = await self._store.nodes.list()
        self._forget_others({row.node_id for row in rows})
        for row in rows:
            if row.node_id in self._live or row.replica == self._replica:
                continue
            self._fleet.told(row)
            if self._silent_seconds(row) > 0:
                await self._give_up(row)

    def _forget_others(self, known: set[str]) -> None:
        """Nodes that were deleted while no event came through."""
        for view in self._fleet.nodes():
            if view.node_id not in known and view.node_id not in self._live:
                self._fleet.forget(view.node_id)

    async def _give_up(self, row: NodeRow) -> None:
        nodes = self._store.nodes
        if row.status == NodeStatus.ONLINE:
            if await nodes.silent(row.node_id, row.session):
                _log.warning("node of a silent replica", node_id=row.node_id, replica=row.replica)
        elif row.status == NodeStatus.DISCONNECTED and self._silent_seconds(row) > self._settings.lease_seconds:
            await nodes.set_down(row.node_id, row.session)

    def _silent_seconds(self, row: NodeRow) -> float:
        """How long the node's last reading is overdue; its replica writes one down every `persist_seconds`."""
        patience = self._settings.persist_seconds + 2 * self._settings.heartbeat_seconds
        return (now_ms() - row.heartbeat_ms) / 1000 - patience
