"""What both clients can do with machines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fleet_client import calls
from fleet_client.calls import Json, segment


class MachineCalls:
    """Part of the blocking client."""

    _json: Callable[..., Json]

    def node_heartbeats(self, node_id: str, step_seconds: int | None = None) -> Json:
        """The last hour of one node, oldest first, one reading a step: `heartbeats`."""
        params = calls.given({"step_seconds": step_seconds})
        return self._json("GET", f"/api/nodes/{segment(node_id)}/heartbeats", params=params)

    def cordon_node(self, node_id: str) -> Json:
        """Give a node no new work; the node."""
        return self._json("POST", f"/api/nodes/{segment(node_id)}/cordon")

    def uncordon_node(self, node_id: str) -> Json:
        """Give a node work again, and end its drain; the node."""
        return self._json("POST", f"/api/nodes/{segment(node_id)}/uncordon")

    def drain_node(self, node_id: str, deadline_seconds: int | None = None, containers: bool | None = None) -> Json:
        """Empty a node: no new work, and after the deadline what is left is stopped; its `drain` says how far it
        is."""
        body = calls.given({"deadline_seconds": deadline_seconds, "containers": containers})
        return self._json("POST", f"/api/nodes/{segment(node_id)}/drain", json=body)

    def update_node(
        self, node_id: str, clusters: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> Json:
        """Replace clusters or labels of a node, each as a whole; the node."""
        lists = None if clusters is None else list(clusters)
        body = calls.given({"clusters": lists, "labels": None if labels is None else dict(labels)})
        return self._json("PATCH", f"/api/nodes/{segment(node_id)}", json=body)

    def delete_node(self, node_id: str) -> Json:
        """Forget a node that is not online; the node as it was. Its agent must join again."""
        return self._json("DELETE", f"/api/nodes/{segment(node_id)}")

    def create_node(self, node_id: str, address: str, user: str, host_key: str, **fields: Any) -> Json:
        """Add a node that is reached by SSH; further fields as POST /api/nodes takes them."""
        body = {"node_id": node_id, "address": address, "user": user, "host_key": host_key, **calls.given(fields)}
        return self._json("POST", "/api/nodes", json=body)

    def create_join_token(self, request_id: str | None = None) -> Json:
        """A `token` with which one machine may join, for 15 minutes: `fleet agent --join TOKEN`."""
        params = calls.given({"request_id": request_id})
        return self._json("POST", "/api/nodes/tokens", params=params)


class AsyncMachineCalls:
    """Part of the asynchronous client."""

    _json: Callable[..., Awaitable[Json]]

    async def node_heartbeats(self, node_id: str, step_seconds: int | None = None) -> Json:
        """The last hour of one node, oldest first, one reading a step: `heartbeats`."""
        params = calls.given({"step_seconds": step_seconds})
        return await self._json("GET", f"/api/nodes/{segment(node_id)}/heartbeats", params=params)

    async def cordon_node(self, node_id: str) -> Json:
        """Give a node no new work; the node."""
        return await self._json("POST", f"/api/nodes/{segment(node_id)}/cordon")

    async def uncordon_node(self, node_id: str) -> Json:
        """Give a node work again, and end its drain; the node."""
        return await self._json("POST", f"/api/nodes/{segment(node_id)}/uncordon")

    async def drain_node(
        self, node_id: str, deadline_seconds: int | None = None, containers: bool | None = None
    ) -> Json:
        """Empty a node: no new work, and after the deadline what is left is stopped; its `drain` says how far it
        is."""
        body = calls.given({"deadline_seconds": deadline_seconds, "containers": containers})
        return await self._json("POST", f"/api/nodes/{segment(node_id)}/drain", json=body)

    async def update_node(
        self, node_id: str, clusters: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> Json:
        """Replace clusters or labels of a node, each as a whole; the node."""
        lists = None if clusters is None else list(clusters)
        body = calls.given({"clusters": lists, "labels": None if labels is None else dict(labels)})
        return await self._json("PATCH", f"/api/nodes/{segment(node_id)}", json=body)

    async def delete_node(self, node_id: str) -> Json:
        """Forget a node that is not online; the node as it was. Its agent must join again."""
        return await self._json("DELETE", f"/api/nodes/{segment(node_id)}")

    async def create_node(self, node_id: str, address: str, user: str, host_key: str, **fields: Any) -> Json:
        """Add a node that is reached by SSH; further fields as POST /api/nodes takes them."""
        body = {"node_id": node_id, "address": address, "user": user, "host_key": host_key, **calls.given(fields)}
        return await self._json("POST", "/api/nodes", json=body)

    async def create_join_token(self, request_id: str | None = None) -> Json:
        """A `token` with which one machine may join, for 15 minutes: `fleet agent --join TOKEN`."""
        params = calls.given({"request_id": request_id})
        return await self._json("POST", "/api/nodes/tokens", params=params)
