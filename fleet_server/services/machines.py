"""What operators decide of nodes (cordon, drain, clusters, labels, deletion): facts in the store, for every replica."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fleet.v1.node_pb2 import Hello
from fleet.v1.types_pb2 import Heartbeat, NodeInfo

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.services.fleet import FleetView
from fleet_server.store import NodeRow, NodeStore

MOST_LABELS = 64
_RESERVED = frozenset({"heartbeats", "tokens"})
_CLUSTER = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}\Z")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\Z")
_MOST_TEXT = 255


class SshRoom(Protocol):
    """Reaches nodes that have no agent."""

    @property
    def public_key(self) -> str:
        """With which it logs in. Blocks."""
        ...

    def described(self, *, address: str, port: int, user: str, host_key: str) -> str:
        """How such a node is reached, as the store keeps it. Blocks. Raises INVALID_FIELD for a bad host key."""
        ...

    def wake(self) -> None:
        """A node was added."""
        ...

    async def release(self, node_id: str) -> None:
        """The node is about to be deleted: returns when it is left alone."""
        ...


class Machines:
    """Each call answers when the store has it: from then on no replica gives the node what it should not have.

    `wake` is called after a drain began, so that it is looked at at once. Every method raises NODE_NOT_FOUND.
    """

    def __init__(self, nodes: NodeStore, fleet: FleetView, wake: Callable[[], None] = lambda: None) -> None:
        self.ssh: SshRoom | None = None
        """Who reaches nodes by SSH; set before the first call."""
        self._nodes = nodes
        self._fleet = fleet
        self._wake = wake

    async def cordon(self, node_id: str) -> NodeInfo:
        """It gets no new work; what it runs goes on."""
        return self._told(node_id, await self._nodes.set_cordoned(node_id, True))

    async def add_ssh(
        self,
        node_id: str,
        *,
        address: str,
        port: int,
        user: str,
        host_key: str,
        clusters: Sequence[str],
        labels: Mapping[str, str],
    ) -> NodeInfo:
        """Adds a node that is reached by SSH; it comes online by itself. Raises NAME_IN_USE, INVALID_FIELD."""
        check_name(node_id)
        if self.ssh is None:
            raise FleetError("NOT_IMPLEMENTED", "this server has no way to reach nodes by SSH")
        for field, text in (("address", address), ("user", user)):
            if text.startswith("-") or any(letter.isspace() or not letter.isprintable() for letter in text):
                raise invalid_field(field, "must be one word, and must not begin with '-'")
        found, checked = _clusters(clusters), _labels(labels)
        room = self.ssh
        ssh, own_key = await asyncio.to_thread(
            lambda: (
                room.described(address=address, port=port, user=user, host_key=host_key),
                room.public_key,
            )
        )
        told = Heartbeat(node_id=node_id, warnings=[f"let this server in on the host: {own_key}"])
        hello = Hello(node_id=node_id, clusters=found, labels=checked)
        row = await self._nodes.create_ssh(
            node_id, ssh=ssh, info=hello.SerializeToString(), heartbeat=told.SerializeToString(), replica=""
        )
        if found or checked:
            row = await self._nodes.describe(node_id, clusters=found, labels=checked) or row
        self._fleet.told(row)
        room.wake()
        return self._told(node_id, row)

    async def uncordon(self, node_id: str) -> NodeInfo:
        """It gets work again; a drain is over."""
        return self._told(node_id, await self._nodes.set_cordoned(node_id, False))

    async def drain(self, node_id: str, deadline_seconds: int, *, containers: bool) -> NodeInfo:
        """Cordons it and waits for its work; at the deadline what is left is stopped. Again: another deadline."""
        info = self._told(node_id, await self._nodes.drain(node_id, deadline_seconds, containers=containers))
        self._wake()
        return info

    async def update(
        self, node_id: str, *, clusters: Sequence[object] | None, labels: Mapping[str, object] | None
    ) -> NodeInfo:
        """Replaces clusters or labels, each as a whole. Raises INVALID_FIELD."""
        if clusters is None and labels is None:
            raise invalid_field("clusters", "must be given, or labels: nothing is asked to change")
        row = await self._nodes.describe(
            node_id,
            clusters=None if clusters is None else _clusters(clusters),
            labels=None if labels is None else _labels(labels),
        )
        return self._told(node_id, row)

    async def delete(self, node_id: str) -> NodeInfo:
        """Forgets it, its certificate too; the node as it was. Raises NODE_ONLINE."""
        info = self._fleet.info(node_id)
        known = self._fleet.row(node_id)
        if known is not None and known.ssh and self.ssh is not None:
            # Its agent is ours: it goes first.
            await self.ssh.release(node_id)
        row = await self._nodes.delete(node_id)
        if row is None or info is None:
            self._fleet.forget(node_id)
            raise not_found(node_id)
        self._fleet.forget(node_id)
        return info

    def _told(self, node_id: str, row: NodeRow | None) -> NodeInfo:
        """The node after a change, which placement here has seen by now."""
        if row is None:
            raise not_found(node_id)
        if self._fleet.node(node_id) is None:
            self._fleet.told(row)
        self._fleet.decided(row)
        info = self._fleet.info(node_id)
        assert info is not None
        return info


def check_name(node_id: str) -> None:
    """Raises INVALID_FIELD for a name that is a word of the API; its characters are judged by the contract."""
    if node_id in _RESERVED:
        raise invalid_field("node_id", "must not be `heartbeats` or `tokens`: these are words of the API")


def not_found(node_id: str) -> FleetError:
    """The refusal of a name that no node has."""
    return FleetError("NODE_NOT_FOUND", f"node_id: there is no node {node_id!r}; see GET /api/nodes")


def _clusters(given: Sequence[object]) -> list[str]:
    found: dict[str, None] = {}
    for index, name in enumerate(given):
        if not isinstance(name, str) or not _CLUSTER.match(name):
            raise invalid_field(
                f"clusters[{index}]", "must be a name of at most 63 characters: a-z, 0-9, '_' and '-'", name
            )
        found[name] = None
    if len(found) > MOST_LABELS:
        raise invalid_field("clusters", f"must be at most {MOST_LABELS} names", len(found))
    return list(found)


def _labels(given: Mapping[str, object]) -> dict[str, str]:
    if len(given) > MOST_LABELS:
        raise invalid_field("labels", f"must be at most {MOST_LABELS}", len(given))
    found: dict[str, str] = {}
    for name, value in given.items():
        if not _LABEL.match(name):
            raise invalid_field(f"labels.{name[:80]}", "must be named by at most 63 letters, digits and . _ / -")
        if not isinstance(value, str) or len(value) > _MOST_TEXT:
            raise invalid_field(f"labels.{name}", f"must be a text of at most {_MOST_TEXT} characters")
        found[name] = value
    return found
