"""Swarm services in the store: the rules by which they are scaled, and what was last told of them."""

from __future__ import annotations

from collections.abc import Mapping

from fleet_server.store._room import Room
from fleet_server.store.records import pairs


class SwarmStore:
    """Services are named by the ids that callers see. Each method raises STORE_UNAVAILABLE if the store is away."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def rules(self) -> Mapping[str, bytes]:
        """The rule (an encoded fleet.v1.Autoscale) of each service that has one."""
        return pairs(await self._room.bulk.call("HGETALL", self._room.keys.service_rules))

    async def rule(self, service_id: str) -> bytes | None:
        """The rule of one service."""
        found: bytes | None = await self._room.bulk.call("HGET", self._room.keys.service_rules, service_id)
        return found

    async def set_rule(self, service_id: str, rule: bytes) -> None:
        """Keeps a rule."""
        await self._room.bulk.call("HSET", self._room.keys.service_rules, service_id, rule)

    async def drop_rule(self, service_id: str) -> None:
        """Forgets the rule of a service that is no more."""
        await self._room.bulk.call("HDEL", self._room.keys.service_rules, service_id)

    async def tell(self, service_id: str, version: int, content_hash: str, service: bytes) -> bool:
        """Writes a service_update event with this fleet.v1.SwarmService, unless it is what was told last, or older: the
        nodes that manage a swarm all say the same. Whether it did."""
        keys = [self._room.keys.service_seen(service_id), self._room.keys.events]
        reply = await self._room.bulk.run(
            "service_told", keys, self._room.args(version, content_hash, "service", service)
        )
        return reply is not None

    async def may_scale(self, replica: str, lease_ms: int) -> bool:
        """Whether this replica is the one that scales services for the next `lease_ms`; renews it where it is."""
        args = self._room.args(replica, lease_ms)
        return bool(await self._room.bulk.run("autoscaler", [self._room.keys.autoscaler], args))
