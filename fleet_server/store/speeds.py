"""What was learned of nodes' speeds, kept over restarts. Losing it costs nothing but measurements."""

from __future__ import annotations

from collections.abc import Mapping

from fleet_server.store._room import Room
from fleet_server.store.client import Argument
from fleet_server.store.records import pairs


class SpeedStore:
    """One text for each node. Its writer is the replica that holds the node's stream, services.speeds."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def read(self) -> Mapping[str, bytes]:
        """All that is kept, by node_id. Raises STORE_UNAVAILABLE."""
        flat = await self._room.bulk.call("HGETALL", self._room.keys.speeds)
        return pairs(flat)

    async def write(self, rows: Mapping[str, bytes]) -> None:
        """Keeps the texts of these nodes; others stay. Raises STORE_UNAVAILABLE."""
        rest: list[Argument] = [part for row in rows.items() for part in row]
        if rest:
            await self._room.bulk.call("HSET", self._room.keys.speeds, *rest)
