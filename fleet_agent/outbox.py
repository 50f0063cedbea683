"""What an agent sends, in the order of importance: control (FIFO), ticks (latest per attempt), previews (latest, few).

One writer per stream takes from here. Bounded: 1,024 control messages, one tick and one preview for each attempt; at
most ten ticks and two previews a second and attempt.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque

from fleet.v1 import node_pb2

CONTROL_LIMIT = 1024
TICK_SECONDS = 0.1
PREVIEW_SECONDS = 0.5


class OutboxFullError(RuntimeError):
    """The server takes nothing: the session is of no use any more."""


class Outbox:
    """Messages of one session. Delivery: at most once; what matters is said again after the next Welcome."""

    def __init__(self) -> None:
        self._control: deque[node_pb2.AgentMessage] = deque()
        self._latest: tuple[dict[str, node_pb2.AgentMessage], dict[str, node_pb2.AgentMessage]] = ({}, {})
        self._sent_at: tuple[dict[str, float], dict[str, float]] = ({}, {})
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._full = False

    def control(self, message: node_pb2.AgentMessage) -> None:
        """Queues a message that must go in order; past the bound the session is ended."""
        if len(self._control) >= CONTROL_LIMIT:
            self._full = True
        else:
            self._control.append(message)
        self._changed.set()

    def tick(self, message: node_pb2.AgentMessage) -> None:
        """Replaces the waiting tick of its attempt."""
        self._latest[0][message.tick.token] = message
        self._changed.set()

    def preview(self, message: node_pb2.AgentMessage) -> None:
        """Replaces the waiting preview of its attempt."""
        self._latest[1][message.preview.token] = message
        self._changed.set()

    def forget(self, token: str) -> None:
        """Drops what waits of an attempt that has ended."""
        for waiting, sent in zip(self._latest, self._sent_at, strict=True):
            waiting.pop(token, None)
            sent.pop(token, None)

    async def next(self) -> node_pb2.AgentMessage:
        """The next message to write. Raises OutboxFullError once more than the bound has been queued."""
        while True:
            if self._full:
                raise OutboxFullError("1,024 messages wait to be sent")
            if self._control:
                return self._control.popleft()
            message, wait = self._due()
            if message is not None:
                return message
            self._changed.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def written(self) -> None:
        """The message given last has been written."""
        if not self._control:
            self._drained.set()

    async def drained(self) -> None:
        """Waits until every control message queued so far has been written."""
        if self._control:
            self._drained.clear()
            await self._drained.wait()

    def _due(self) -> tuple[node_pb2.AgentMessage | None, float | None]:
        """A tick or preview whose time has come, or how long until one is."""
        now = time.monotonic()
        soonest: float | None = None
        for waiting, sent, interval in zip(self._latest, self._sent_at, (TICK_SECONDS, PREVIEW_SECONDS), strict=True):
            for token in waiting:
                left = sent.get(token, 0.0) + interval - now
                if left <= 0:
                    sent[token] = now
                    return waiting.pop(token), None
                soonest = left if soonest is None else min(soonest, left)
        return None, soonest
