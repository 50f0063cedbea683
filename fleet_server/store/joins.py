"""Join tokens, and which identity a node's certificates name."""

from __future__ import annotations

import hashlib

from fleet_server.domain.errors import Code, FleetError
from fleet_server.store._room import Room


class JoinStore:
    """Tokens are kept hashed, for as long as they are good."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def mint(self, secret: str, ttl_ms: int) -> None:
        """Makes a token good, once, for so long."""
        await self._room.bulk.run("join_mint", [self._key(secret)], self._room.args(ttl_ms))

    async def join(self, secret: str, node_id: str, key: str, identity: str) -> str:
        """Makes the machine with the key of this fingerprint the node; its identity, `identity` the first time.

        Raises JOIN_REFUSED (UNAUTHENTICATED) for a token that is unknown, over or used by another key or name, and
        NAME_IN_USE where a node of the name has an identity already or is online.
        """
        keys = [self._key(secret), self._room.keys.node(node_id)]
        found = await self._room.dispatch.run("join", keys, self._room.args(node_id, key, identity))
        if found[0] == b"ok":
            return str(found[1].decode())
        if found[0] == b"taken":
            raise FleetError(
                "NAME_IN_USE",
                f"node_id: there is a node {node_id} already: stop its agent and delete it (fleet nodes rm {node_id}), "
                "or join with another --node-id",
            )
        raise FleetError(
            "JOIN_REFUSED",
            "the join token is unknown, older than 15 minutes or used: make another with `fleet nodes token`",
            code=Code.UNAUTHENTICATED,
        )

    async def identity(self, node_id: str) -> str | None:
        """The identity that the node's certificates must name; None where it has none or was deleted."""
        found = await self._room.dispatch.call("HGET", self._room.keys.identities, node_id)
        return None if found is None else found.decode()

    def _key(self, secret: str) -> str:
        return self._room.keys.join(hashlib.sha256(secret.encode()).hexdigest()[:40])
