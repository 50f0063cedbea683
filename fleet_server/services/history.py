"""The last hour of each node's heartbeats, for plots.

It is in the memory of every replica and not in the store: every replica sees each node's readings at least every
`persist_seconds` anyway, an hour of a thousand nodes would be hundreds of megabytes of writes that nothing depends on,
and a plot may begin anew after a restart.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from fleet.v1.types_pb2 import Heartbeat

HOUR_MS = 3_600_000
CHUNK = 24
"""Beats that are packed together: readings repeat, and shrink to a fifth."""
MOST_BEATS = 1_440
"""Of one node, whatever its pace."""
MOST_BYTES = 512 << 10
"""Of one node, packed: the oldest go first."""
_LENGTH = 4


@dataclass(slots=True)
class _Node:
    last_ms: int = 0
    fresh: list[bytes] = field(default_factory=list)
    packed: deque[tuple[int, bytes]] = field(default_factory=deque)
    """The time of the last beat of each chunk, and the chunk."""
    size: int = 0


class History:
    """Takes beats, gives them back. `keep` never waits."""

    def __init__(self, *, most_bytes: int = MOST_BYTES, most_beats: int = MOST_BEATS) -> None:
        self._most_bytes = most_bytes
        self._most_chunks = max(1, most_beats // CHUNK)
        self._nodes: dict[str, _Node] = {}

    def keep(self, beat: Heartbeat) -> None:
        """A beat came; one that is known already, or older than the last, is left out."""
        at = beat.heartbeat_time.ToMilliseconds()
        node = self._nodes.setdefault(beat.node_id, _Node())
        if at <= node.last_ms:
            return
        node.last_ms = at
        node.fresh.append(beat.SerializeToString())
        if len(node.fresh) >= CHUNK:
            chunk = zlib.compress(b"".join(len(one).to_bytes(_LENGTH) + one for one in node.fresh), 1)
            node.fresh.clear()
            node.packed.append((at, chunk))
            node.size += len(chunk)
        self._trim(node)

    def of(self, node_id: str, *, now_ms: int, step_seconds: int) -> list[Heartbeat]:
        """The last hour, oldest first: of each step the last beat."""
        node = self._nodes.get(node_id)
        if node is None:
            return []
        steps: dict[int, Heartbeat] = {}
        for beat in _beats(node):
            at = beat.heartbeat_time.ToMilliseconds()
            if at > now_ms - HOUR_MS:
                steps[at // (1000 * step_seconds)] = beat
        return list(steps.values())

    def forget(self, node_id: str) -> None:
        """The node was deleted."""
        self._nodes.pop(node_id, None)

    def _trim(self, node: _Node) -> None:
        while node.packed and (
            node.size > self._most_bytes
            or len(node.packed) > self._most_chunks
            or node.packed[0][0] < node.last_ms - HOUR_MS
        ):
            node.size -= len(node.packed.popleft()[1])


def _beats(node: _Node) -> Iterator[Heartbeat]:
    for _, chunk in node.packed:
        text = zlib.decompress(chunk)
        at = 0
        while at < len(text):
            end = at + _LENGTH + int.from_bytes(text[at : at + _LENGTH])
            yield Heartbeat.FromString(text[at + _LENGTH : end])
            at = end
    for one in node.fresh:
        yield Heartbeat.FromString(one)
