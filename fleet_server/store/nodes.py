"""Nodes in the store: what their agents say (by services.sessions) and what operators decide (by services.machines)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.store._room import Room
from fleet_server.store.client import Argument, gather
from fleet_server.store.node_rows import NodeRow, decode_node
from fleet_server.store.records import pairs

NodeRows = list[NodeRow]


class NodeStore:
    """One row for each node that ever joined. A change that watchers see writes its node_update event in the same
    step.
    """

    def __init__(self, room: Room) -> None:
        self._room = room

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
        """Makes `session` the node's and the node online; the row as it was before (None: a new node).

        Repeatable by session. With `expected_session` only if that is still the stored one ("" for none), else
        raises NODE_ONLINE: another session came in between.
        """
        rest: list[Argument] = [session, instance_id, info, replica]
        rest += [0, ""] if expected_session is None else [1, expected_session]
        outcome, flat = await self._run("node_connect", node_id, *rest)
        if outcome == b"other":
            raise FleetError("NODE_ONLINE", f"node_id: {node_id} has just been taken by another session; connect again")
        return None if flat is None else decode_node(pairs(flat))

    async def create_ssh(self, node_id: str, *, ssh: str, info: bytes, heartbeat: bytes, replica: str) -> NodeRow:
        """A node that is reached by SSH as `ssh` (JSON) says. Raises NAME_IN_USE."""
        flat = await self._run("node_create", node_id, ssh, info, heartbeat, replica)
        if flat is None:
            raise FleetError("NAME_IN_USE", f"node_id: there is a node {node_id!r} already: give this one another name")
        return decode_node(pairs(flat))

    async def heartbeat(self, node_id: str, session: str, heartbeat: bytes) -> bool:
        """Keeps the last heartbeat; online again if it was not. False if the session is not the node's."""
        return await self._update(node_id, "heartbeat", session, heartbeat) is not None

    async def update_info(self, node_id: str, session: str, info: bytes) -> bool:
        """Replaces `info` (engines, models, labels changed), with an event if it differs."""
        return await self._update(node_id, "info", session, info) is not None

    async def disconnect(self, node_id: str, session: str, *, lost: bool = True) -> bool:
        """The stream of this session ended: status disconnected. False if the session is not the node's.

        `lost`: neither side meant it to; it counts towards a mass loss until the node is back.
        """
        return await self._update(node_id, "disconnect", session, int(lost)) is not None

    async def silent(self, node_id: str, session: str) -> bool:
        """Nothing was heard of this session for long: disconnected, and lost, unless its replica shows signs of life.

        False if it does, or if the session is not the node's.
        """
        return await self._update(node_id, "disconnect", session, "silent") is not None

    async def set_down(self, node_id: str, session: str) -> bool:
        """Gives a disconnected node up. False if it is online or has another session."""
        return await self._update(node_id, "down", session, "") is not None

    async def set_cordoned(self, node_id: str, cordoned: bool) -> NodeRow | None:
        """Cordons, or uncordons and ends a drain; the row afterwards, None if unknown.

        Once this has returned, no claim gives a cordoned node a job, on whatever replica.
        """
        return await self._decide(node_id, "cordon" if cordoned else "uncordon")

    async def drain(self, node_id: str, deadline_seconds: int, *, containers: bool) -> NodeRow | None:
        """Cordons and begins a drain, or gives the present one another deadline; the row, None if unknown."""
        return await self._decide(node_id, "drain", deadline_seconds, int(containers))

    async def drain_looked(
        self, node_id: str, start_ms: int, *, jobs: int, containers: int, stopped: bool, done: bool
    ) -> NodeRow | None:
        """How far the drain that began at `start_ms` is; a later one is left alone. The row, None if unknown."""
        return await self._decide(node_id, "looked", start_ms, jobs, containers, int(stopped), int(done))

    async def describe(
        self, node_id: str, *, clusters: Sequence[str] | None = None, labels: Mapping[str, str] | None = None
    ) -> NodeRow | None:
        """Replaces clusters or labels, each as a whole, whatever the agent says of them; the row, None if unknown."""
        words = "" if clusters is None else json.dumps(list(clusters))
        pairs_ = "" if labels is None else json.dumps(dict(labels), sort_keys=True)
        return await self._decide(node_id, "describe", words, pairs_)

    async def get(self, node_id: str) -> NodeRow | None:
        """One row, None if unknown."""
        flat = await self._room.dispatch.call("HGETALL", self._room.keys.node(node_id))
        return decode_node(pairs(flat)) if flat else None

    async def list(self) -> NodeRows:
        """All nodes by node_id."""
        ids = sorted(member.decode() for member in await self._room.bulk.call("SMEMBERS", self._room.keys.nodes))
        if not ids:
            return []
        rows = await gather([self._room.bulk.post_call("HGETALL", self._room.keys.node(node)) for node in ids])
        return [decode_node(pairs(flat)) for flat in rows if flat]

    async def delete(self, node_id: str) -> NodeRow | None:
        """Forgets a node; the row as it was, None if unknown. Raises NODE_ONLINE if it is online."""
        reply = await self._run("node_delete", node_id)
        if reply is None:
            return None
        if reply[0] == b"online":
            raise FleetError("NODE_ONLINE", f"node_id: {node_id} is online; stop its agent first")
        return decode_node(pairs(reply[1]))

    async def _decide(self, node_id: str, what: str, *rest: Argument) -> NodeRow | None:
        keys = [self._room.keys.node(node_id), self._room.keys.held(node_id)]
        flat = await self._room.dispatch.run("node_facts", keys, self._room.args(node_id, what, *rest))
        return None if flat is None else decode_node(pairs(flat))

    async def _update(self, node_id: str, what: str, session: str, value: Argument) -> NodeRow | None:
        flat = await self._run("node_update", node_id, what, session, value)
        return None if flat is None else decode_node(pairs(flat))

    async def _run(self, script: str, node_id: str, *rest: Argument) -> Any:
        return await self._room.dispatch.run(script, [self._room.keys.node(node_id)], self._room.args(node_id, *rest))
