"""What all sessions share: durations of the protocol, counters, and what they work with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from fleet.v1 import node_pb2

from fleet_server.services.completion import Completions
from fleet_server.services.fleet import FleetView
from fleet_server.services.inputs import InputResolver
from fleet_server.services.progress import ProgressHub
from fleet_server.store import Store

Listener = Callable[[str, node_pb2.AgentMessage], None]
"""Takes a node's message that is about no job."""


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """Durations of the agents' protocol, in seconds; the defaults are those of production."""

    heartbeat_seconds: float = 5.0
    lease_seconds: float = 30.0
    silence_seconds: float = 12.5
    accept_seconds: float = 10.0
    write_seconds: float = 10.0
    hello_seconds: float = 10.0
    goodbye_seconds: float = 10.0
    drain_seconds: float = 5.0
    """How long the end of a stream waits for what has been said on it to be written down."""
    spool_seconds: float = 10.0
    """How long a restarted agent's lost work waits for the results that it has brought along."""
    avoid_seconds: float = 5.0
    """How long a lane keeps away from a node that rejected one of its jobs or did not take it."""
    persist_seconds: float = 14.0
    """How often the store is given a node's last readings; with every third heartbeat."""
    repeat_seconds: float = 0.5
    watch_seconds: float = 1.0
    hellos_per_second: float = 200.0
    outbox: int = 1_024
    backlog: int = 1_024
    """Reports of one agent that wait for the store; then its stream is not read."""

    @property
    def silent_seconds(self) -> float:
        """An agent that has said nothing for so long is not reached any more: two beats and a half, or a lease where
        that is shorter. Its leases go on; gRPC's own pings would take up to 15 s."""
        return min(self.lease_seconds, max(self.silence_seconds, 2.5 * self.heartbeat_seconds))

    @property
    def lease_ms(self) -> int:
        return int(self.lease_seconds * 1000)


@dataclass(slots=True)
class SessionCounters:
    """What went by since the start, for metrics."""

    hellos: int = 0
    refused_hellos: int = 0
    ignored_messages: int = 0
    unaccepted: int = 0
    rejected: int = 0
    stuck_writers: int = 0


@dataclass(frozen=True, slots=True)
class SessionParts:
    """What a session works with."""

    store: Store
    fleet: FleetView
    hub: ProgressHub
    completions: Completions
    settings: SessionSettings
    counters: SessionCounters
    inputs: InputResolver
    listeners: dict[str, Listener] = field(default_factory=dict)
    """Who takes the messages of a kind that are about no job."""

    def pass_on(self, node_id: str, message: node_pb2.AgentMessage) -> None:
        """Gives a message that is about no job to its listener; without one it is ignored, and counted."""
        listener = self.listeners.get(message.WhichOneof("message") or "")
        if listener is None:
            self.counters.ignored_messages += 1
        else:
            listener(node_id, message)
