"""Where the servers of one fleet find each other."""

from __future__ import annotations

from fleet_server.store._room import Room


class DoorStore:
    """One gRPC address for each server, by its name. Each method raises STORE_UNAVAILABLE if the store is away."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def tell(self, replica: str, door: str) -> None:
        """This server is dialled at `door` (host:port)."""
        await self._room.bulk.call("HSET", self._room.keys.doors, replica, door)

    async def find(self, replica: str) -> str | None:
        """Where that server is dialled; None where it never said."""
        found: bytes | None = await self._room.bulk.call("HGET", self._room.keys.doors, replica)
        return None if found is None else found.decode()
