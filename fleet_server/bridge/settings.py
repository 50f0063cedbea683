"""Limits and times of the bridge, with the defaults that production runs with."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """Seconds and bytes, each with what happens beyond it."""

    body_chunk_seconds: float = 10.0
    """The longest wait for the next piece of a request body, then 408."""

    body_min_bytes_per_second: float = 1024.0
    """The slowest a body may come, beyond the first `body_chunk_seconds`, then 408."""

    head_seconds: float = 1.0
    """A stream's head goes out with its first message or the servicer's initial metadata, at the latest after this."""

    keepalive_seconds: float = 15.0
    """SSE: a comment this often while there is nothing to say."""

    send_seconds: float = 10.0
    """A client that takes nothing for this long is let go (WebSocket: 1013)."""

    max_frame_bytes: int = 64 * 1024
    """The largest frame a WebSocket client may send (then 1009)."""

    frame_queue: int = 16
    """Frames of a bidirectional WebSocket that may wait for the servicer."""

    shared_messages: AbstractSet[str] = frozenset()
    """Full names of message types whose objects never change once a stream has yielded them: such an object is encoded
    once, and its bytes are shared by all streams that yield the very same object."""
