"""Nodes in the store. One writer: services.sessions."""

from __future__ import annotations

from fleet_server.store.records import NodeRow


class NodeStore:
    """Each change of a node's state writes its node_update event in the same script."""

    async def connect(
        self,
        node_id: str,
        *,
        session: str,
        instance_id: str,
        info: bytes,
        replica: str,
        expected_session: str | None = None,
    ) -> NodeRow | None:
        """Makes `session` the node's; the row as it was before (None: new node). Repeatable by session.

        With `expected_session` only if that is still the stored one ("" for none), else raises NODE_ONLINE.
        """
        raise NotImplementedError

    async def heartbeat(self, node_id: str, session: str, heartbeat: bytes) -> bool:
        """Keeps the last heartbeat; online again if it was not. False if the session is not the node's."""
        raise NotImplementedError

    async def update_info(self, node_id: str, session: str, info: bytes) -> bool:
        """Replaces `info` (engines, models, labels changed), with an event if it differs."""
        raise NotImplementedError

    async def disconnect(self, node_id: str, session: str) -> bool:
        """The stream of this session ended: status disconnected. False if the session is not the node's."""
        raise NotImplementedError

    async def set_down(self, node_id: str, session: str) -> bool:
        """Gives a disconnected node up. False if it is online or has another session."""
        raise NotImplementedError

    async def set_cordoned(self, node_id: str, cordoned: bool) -> NodeRow | None:
        """Cordons or uncordons; the row afterwards, None if unknown."""
        raise NotImplementedError

    async def get(self, node_id: str) -> NodeRow | None:
        raise NotImplementedError

    async def list(self) -> list[NodeRow]:
        """All nodes by node_id."""
        raise NotImplementedError

    async def delete(self, node_id: str) -> NodeRow | None:
        """Forgets a node; the row as it was. Raises NODE_ONLINE if it is online."""
        raise NotImplementedError
