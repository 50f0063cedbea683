"""What this replica knows of the nodes, in memory. One writer: services.sessions."""

from __future__ import annotations

import json
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from fleet.v1.node_pb2 import AgentHeartbeat, Hello
from fleet.v1.types_pb2 import Heartbeat, NodeInfo

from fleet_server.domain.comfy import Catalogue
from fleet_server.domain.node import NodeStatus, NodeView
from fleet_server.services.nodes import (
    clusters_of,
    gpu_memory,
    heartbeat_of,
    info_of,
    labels_of,
    now_ms,
    set_time,
    status_number,
    view_of,
)
from fleet_server.store import NodeRow, Store

Listener = Callable[[str], None]
_DECIDED = (
    "version",
    "cordoned",
    "clusters",
    "labels",
    *(one.name for one in fields(NodeRow) if one.name.startswith("drain_")),
)


@dataclass(slots=True)
class _Node:
    hello: Hello
    row: NodeRow
    view: NodeView
    beat: Heartbeat
    running: tuple[str, ...] = ()
    address: str = ""
    skew_seconds: float | None = None
    beat_ms: int = 0
    leaving: bool = False
    """Its agent takes no more: it is being shut down."""
    containers: int = 0
    """Containers of the fleet's that run there, by the last beat."""


class FleetView:
    """All nodes that the store knows, with what their agents said last. Reads never wait.

    After a start the nodes are as the store had them, none online, until their agents come again.
    """

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._order: list[str] = []
        self._listeners: list[Listener] = []
        self._beat_listeners: list[Listener] = []
        self._avoided: dict[tuple[str, str], float] = {}
        self._offers: dict[str, Catalogue] = {}

    # Reading.

    def nodes(self) -> list[NodeView]:
        """All nodes, by node_id."""
        return [self._nodes[node_id].view for node_id in self._order]

    def online(self) -> list[NodeView]:
        """The nodes whose agents are connected, by node_id."""
        return [view for view in self.nodes() if view.status is NodeStatus.ONLINE]

    def any_online(self, judge: Callable[[str], object]) -> bool:
        """Whether `judge(node_id)` says yes to a node whose agent is connected; asks no further then."""
        nodes = self._nodes
        return any(nodes[each].view.status is NodeStatus.ONLINE and judge(each) for each in self._order)

    def node(self, node_id: str) -> NodeView | None:
        """One node, None if unknown."""
        node = self._nodes.get(node_id)
        return None if node is None else node.view

    def info(self, node_id: str) -> NodeInfo | None:
        """The node as the API shows it, a fresh message; None if unknown."""
        node = self._nodes.get(node_id)
        if node is None:
            return None
        row = replace(
            node.row,
            status=node.view.status.value,
            heartbeat=node.beat.SerializeToString(),
            heartbeat_ms=max(node.beat_ms, node.row.heartbeat_ms),
        )
        info = info_of(row)
        info.slots_free = node.view.slots_free
        info.ClearField("running_job_ids")
        info.running_job_ids.extend(node.running)
        if node.row.ssh:
            info.address = json.loads(node.row.ssh)["address"]
        elif node.address:
            info.address = node.address
        if node.skew_seconds is not None:
            info.clock_skew_seconds = node.skew_seconds
        return info

    def heartbeat(self, node_id: str) -> Heartbeat | None:
        """The last beat of the node, a fresh message; None if unknown or if it never beat."""
        node = self._nodes.get(node_id)
        if node is None or not node.beat.HasField("heartbeat_time"):
            return None
        beat = Heartbeat()
        beat.CopyFrom(node.beat)
        beat.status = status_number(node.view.status)
        beat.slots_free = node.view.slots_free
        beat.ClearField("running_job_ids")
        beat.running_job_ids.extend(node.running)
        return beat

    def hello(self, node_id: str) -> Hello | None:
        """The node's description as its agent gave it last; not to be changed."""
        node = self._nodes.get(node_id)
        return None if node is None else node.hello

    def row(self, node_id: str) -> NodeRow | None:
        """What the store knows of the node, as far as this replica has heard; None if unknown."""
        node = self._nodes.get(node_id)
        return None if node is None else node.row

    def draining(self) -> list[NodeRow]:
        """The nodes whose drain is not done."""
        return [node.row for node in self._nodes.values() if node.row.draining and not node.row.drain_done]

    def containers(self, node_id: str) -> tuple[int, int]:
        """Containers of the fleet's that ran there at the last beat, and when that came (Unix ms; 0: not yet here)."""
        node = self._nodes.get(node_id)
        return (0, 0) if node is None else (node.containers, node.beat_ms)

    def running(self, node_id: str) -> tuple[str, ...]:
        """The jobs that fill slots of the node."""
        node = self._nodes.get(node_id)
        return () if node is None else node.running

    def replica(self, node_id: str) -> str:
        """The server that holds, or held, the node's stream; "" where none is known."""
        node = self._nodes.get(node_id)
        return "" if node is None else node.row.replica

    def version(self, node_id: str) -> int:
        """Of the node's row as it is known here; 0 where none is."""
        node = self._nodes.get(node_id)
        return 0 if node is None else node.row.version

    def has_others(self, replica: str) -> bool:
        """Whether some node's row was written by another replica than this."""
        return any(node.row.replica not in ("", replica) for node in self._nodes.values())

    def avoided(self) -> set[tuple[str, str]]:
        """Pairs (node_id, lane_id) that do not go together for a moment: the node has just refused one of the lane."""
        now = time.monotonic()
        return {pair for pair, until in self._avoided.items() if until > now}

    def subscribe_changes(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener(node_id)` after each change that matters to placement or to readers of states; it must not
        wait. A beat that says nothing new is none. Returns how to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    def subscribe_beats(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener(node_id)` after each beat; it must not wait. Returns how to end it."""
        self._beat_listeners.append(listener)
        return lambda: self._beat_listeners.remove(listener)

    # Writing: services.sessions alone.

    async def load(self, store: Store) -> list[NodeRow]:
        """Takes over what the store knows; nodes that seem online are disconnected until their agents are back."""
        rows = await store.nodes.list()
        for row in rows:
            if row.node_id not in self._nodes:
                status = NodeStatus.DOWN if row.status == NodeStatus.DOWN else NodeStatus.DISCONNECTED
                self._keep(row, Hello.FromString(row.info), status)
        return rows

    def told(self, row: NodeRow) -> None:
        """How the store has a node whose stream another replica holds; its readings are as old as `row.heartbeat`."""
        known = self._nodes.get(row.node_id)
        if known is not None and known.row == row:
            return
        node = self._keep(row, Hello.FromString(row.info), NodeStatus(row.status))
        node.beat_ms = row.heartbeat_ms
        if node.view.online:
            node.running = tuple(node.beat.running_job_ids)
        free = node.beat.slots_free if node.view.online else 0
        node.view = replace(node.view, slots_free=free, gpu_memory_bytes=gpu_memory(node.beat.gpus))

    def connected(
        self,
        row: NodeRow,
        hello: Hello,
        beat: AgentHeartbeat,
        *,
        address: str,
        slots_free: int,
        running: tuple[str, ...] = (),
    ) -> None:
        """The agent is here: a new session."""
        node = self._keep(row, hello, NodeStatus.ONLINE)
        node.address = address
        node.running = running
        self.beat(row.node_id, hello, beat, slots_free=slots_free)

    def beat(self, node_id: str, hello: Hello, beat: AgentHeartbeat, *, slots_free: int) -> Heartbeat:
        """A heartbeat came; `hello` is the description after it, the same object as before where it has not changed.

        Returns the beat as callers read it.
        """
        node, at = self._nodes[node_id], now_ms()
        before, memory = node.view, gpu_memory(beat.gpus)
        node.beat = heartbeat_of(node_id, beat, at_ms=at, slots_free=slots_free)
        node.beat_ms = at
        node.containers = beat.managed_containers
        if beat.HasField("now"):
            node.skew_seconds = round((beat.now.ToMilliseconds() - at) / 1000, 3)
        if hello is not node.hello:
            node.hello = hello
            self._describe(node, hello, beat, slots_free)
        elif memory != before.gpu_memory_bytes or slots_free != before.slots_free:
            node.view = replace(before, gpu_memory_bytes=memory, slots_free=slots_free)
        if node.view is not before and _matter(node.view) != _matter(before):
            self._changed(node_id)
        for listener in tuple(self._beat_listeners):
            listener(node_id)
        return node.beat

    def _describe(self, node: _Node, hello: Hello, beat: AgentHeartbeat, slots_free: int) -> None:
        view = node.view
        made = view_of(
            hello,
            status=view.status,
            session=view.session,
            facts=node.row,
            slots_free=slots_free,
            gpus=beat.gpus,
        )
        made = replace(made, offers=view.offers)
        # The same object while it says the same: who has looked at an inventory need not look again.
        models = view.models if view.models == made.models else made.models
        job_types = view.job_types if view.job_types == made.job_types else made.job_types
        node.view = replace(made, models=models, job_types=job_types, draining=made.draining or node.leaving)

    def decided(self, row: NodeRow) -> None:
        """What operators decided of a node, as the store has it; what is older than what is known changes nothing."""
        node = self._nodes.get(row.node_id)
        if node is None or row.version < node.row.version:
            return
        before = node.row
        node.row = replace(before, updated_ms=row.updated_ms, **{name: getattr(row, name) for name in _DECIDED})
        if node.row == replace(before, version=row.version, updated_ms=row.updated_ms):
            return
        node.view = replace(
            node.view,
            cordoned=row.cordoned,
            draining=row.draining or node.leaving,
            clusters=clusters_of(node.hello, row),
            labels=labels_of(node.hello, row),
        )
        self._changed(row.node_id)

    def described(self, node_id: str, info: bytes) -> None:
        """The store has taken a new description."""
        node = self._nodes[node_id]
        node.row = replace(node.row, info=info, updated_ms=now_ms())

    def occupy(self, node_id: str, *, slots_free: int, running: tuple[str, ...], draining: bool = False) -> None:
        """Work was given to the node or ended there; `draining`: its agent takes no more."""
        node = self._nodes[node_id]
        node.running = running
        node.leaving = draining
        node.view = replace(node.view, slots_free=slots_free, draining=draining or node.row.draining)
        self._changed(node_id)

    def set_status(self, node_id: str, status: NodeStatus) -> None:
        """The connection changed; a node that is not online has no free slots."""
        node = self._nodes[node_id]
        free = node.view.slots_free if status is NodeStatus.ONLINE else 0
        node.view = replace(node.view, status=status, slots_free=free)
        node.row = replace(node.row, status=status.value, updated_ms=now_ms())
        if status is NodeStatus.DOWN:
            node.running = ()
        self._changed(node_id)

    def offer(self, node_id: str, catalogue: Catalogue | None) -> None:
        """What the node's ComfyUI has is known now; None: it is not any more."""
        if catalogue is None:
            self._offers.pop(node_id, None)
        else:
            self._offers[node_id] = catalogue
        node = self._nodes.get(node_id)
        if node is not None and node.view.offers is not catalogue:
            node.view = replace(node.view, offers=catalogue)
            self._changed(node_id)

    def touch(self, node_id: str) -> None:
        """Work of the node went back to the queue: those who listen should look."""
        self._changed(node_id)

    def avoid(self, node_id: str, lane_id: str, seconds: float) -> None:
        """For so long the node gets no job of the lane."""
        now = time.monotonic()
        self._avoided = {pair: until for pair, until in self._avoided.items() if until > now}
        self._avoided[node_id, lane_id] = now + seconds

    def forget(self, node_id: str) -> None:
        """The node was deleted."""
        if self._nodes.pop(node_id, None) is not None:
            self._order = sorted(self._nodes)
            self._changed(node_id)

    def _keep(self, row: NodeRow, hello: Hello, status: NodeStatus) -> _Node:
        before = self._nodes.get(row.node_id)
        if before is not None and before.row.version > row.version:
            # It was read before somebody decided something that is known here already.
            row = replace(row, **{name: getattr(before.row, name) for name in _DECIDED})
        kept = Hello()
        kept.CopyFrom(hello)
        # The name under which the store knows it, whatever an old record says.
        kept.node_id = row.node_id
        view = view_of(kept, status=status, session=row.session, facts=row)
        view = replace(view, offers=self._offers.get(row.node_id))
        beat = Heartbeat.FromString(row.heartbeat)
        if not beat.HasField("heartbeat_time") and row.heartbeat:
            set_time(beat.heartbeat_time, row.heartbeat_ms)
        node = _Node(kept, replace(row, status=status.value), view, beat, address=before.address if before else "")
        self._nodes[row.node_id] = node
        if before is None:
            insort(self._order, row.node_id)
        self._changed(row.node_id)
        return node

    def _changed(self, node_id: str) -> None:
        for listener in tuple(self._listeners):
            listener(node_id)


def _matter(view: NodeView) -> tuple[object, ...]:
    """What of a beat placement looks at: all but when models were loaded and used."""
    loaded = [(one.name, one.engine, one.loras) for one in view.loaded]
    return (
        view.slots,
        view.slots_free,
        view.models,
        view.engines,
        view.job_types,
        view.clusters,
        view.gpu_memory_bytes,
        loaded,
    )
