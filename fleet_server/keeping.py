"""The machines' side of the server, put together: what operators decide, drains, the last hour of readings."""

from __future__ import annotations

import asyncio

from fleet_server.rpc.machines import MachineParts
from fleet_server.services.drains import Drains, Runs, container_stopper
from fleet_server.services.fleet import FleetView
from fleet_server.services.history import History
from fleet_server.services.inputs import InputResolver
from fleet_server.services.joins import Joins
from fleet_server.services.machines import Machines
from fleet_server.services.rights import NodeRights
from fleet_server.services.sessions import Sessions
from fleet_server.store import NodeRow, Store


class Keeping:
    """Makes these parts and runs their loop."""

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        sessions: Sessions,
        commands: Runs,
        inputs: InputResolver,
        joins: Joins | None = None,
    ) -> None:
        self._fleet = fleet
        self._drains = Drains(
            store, fleet, sessions, stop_containers=container_stopper(commands), deployed_ms=commands.deployed_ms
        )
        self._history = History()
        self.parts = MachineParts(
            Machines(store.nodes, fleet, self._drains.wake),
            self._history,
            store.replies,
            NodeRights(store.jobs, inputs),
            joins,
        )
        self._rows: dict[str, NodeRow] = {}
        fleet.subscribe_beats(self._on_beat)
        fleet.subscribe_changes(self._on_change)

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._drains.run(), name="drains")

    def _on_beat(self, node_id: str) -> None:
        beat = self._fleet.heartbeat(node_id)
        if beat is not None:
            self._history.keep(beat)

    def _on_change(self, node_id: str) -> None:
        row = self._fleet.row(node_id)
        if row is None:
            self._rows.pop(node_id, None)
            self._history.forget(node_id)
        elif row is not self._rows.get(node_id):
            # The readings of nodes whose streams other replicas hold come with their rows; most changes are of slots.
            self._rows[node_id] = row
            self._on_beat(node_id)
