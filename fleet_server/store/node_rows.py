"""Nodes as the store keeps them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class NodeRow:
    """One node as stored. `info` and `heartbeat` are encoded messages; `status` is online, disconnected or down.

    What an agent says is written by services.sessions. What operators decide stays over every connection: `cordoned`,
    the drain (`drain_start_ms` is 0 where there is none), `clusters` and `labels` (None: as the agent says), and
    `ssh`, the JSON of how a node without an agent is reached. `deleted` is set in the event of its deletion alone.
    """

    node_id: str
    info: bytes = b""
    status: str = "down"
    session: str = ""
    instance_id: str = ""
    replica: str = ""
    connect_ms: int = 0
    heartbeat_ms: int = 0
    heartbeat: bytes = b""
    created_ms: int = 0
    updated_ms: int = 0
    cordoned: bool = False
    version: int = 0
    drain_start_ms: int = 0
    drain_deadline_ms: int = 0
    drain_containers: bool = False
    drain_stopped: bool = False
    """The deadline has passed, and what was left was told to stop."""
    drain_jobs: int = 0
    drain_left: int = 0
    """Containers that were left at the last look."""
    drain_done: bool = False
    clusters: tuple[str, ...] | None = None
    labels: Mapping[str, str] | None = None
    ssh: str = ""
    deleted: bool = False

    @property
    def draining(self) -> bool:
        return self.drain_start_ms > 0


_INTS = frozenset(
    {
        "connect_ms",
        "heartbeat_ms",
        "created_ms",
        "updated_ms",
        "version",
        "drain_start_ms",
        "drain_deadline_ms",
        "drain_jobs",
        "drain_left",
    }
)
_BYTES = frozenset({"info", "heartbeat"})
_BOOLS = frozenset({"cordoned", "drain_containers", "drain_stopped", "drain_done", "deleted"})
_TEXTS = frozenset({"node_id", "status", "session", "instance_id", "replica", "ssh"})


def decode_node(fields: Mapping[str, bytes]) -> NodeRow:
    """The row of a node_update event's fields, or of a node's hash."""
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if name in _INTS:
            values[name] = int(value)
        elif name in _BYTES:
            values[name] = value
        elif name in _BOOLS:
            values[name] = value == b"1"
        elif name in _TEXTS:
            values[name] = value.decode()
        elif name == "clusters":
            values[name] = tuple(json.loads(value))
        elif name == "labels":
            values[name] = dict(json.loads(value))
    return NodeRow(**values)
