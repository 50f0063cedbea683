"""What an agent sends, in the order of importance: control (FIFO), ticks (latest per attempt), frames of engines' own
protocols (FIFO), previews (latest, few).

One writer per stream takes from here. Bounded: 1,024 control messages, one tick and one preview for each attempt, the
frames as `frame_queue` says; at most ten ticks and two previews a second and attempt. The texts of a language model are
put together while they wait. While the writer says that many short jobs go by, what is said of an attempt's beginning
is held back a little, and left out where its success is said meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque

from fleet.v1 import node_pb2

from fleet_agent.frame_queue import FrameQueue

CONTROL_LIMIT = 1024
BATCH_MESSAGES = 128
BATCH_BYTES = 1 << 20
"""A batch with so many bytes takes no further message."""
GATHER_SECONDS = 0.004
"""What need not be heard at once waits so long for company: a short job's start then travels with its end."""
START_SECONDS = 0.025
"""So long, where many short jobs go by: the end of one says that it began, and that it was taken."""
TICK_SECONDS = 0.1
PREVIEW_SECONDS = 0.5


class OutboxFullError(RuntimeError):
    """The server takes nothing: the session is of no use any more."""


class _Lane:
    """The latest message of each attempt, not oftener than the interval; attempts take turns."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._waiting: dict[str, node_pb2.AgentMessage] = {}
        self._sent_at: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, token: str, message: node_pb2.AgentMessage) -> None:
        self._waiting[token] = message

    def waiting(self, token: str) -> node_pb2.AgentMessage | None:
        return self._waiting.get(token)

    def forget(self, token: str) -> None:
        self._waiting.pop(token, None)
        self._sent_at.pop(token, None)

    def withdraw(self, token: str) -> None:
        self._waiting.pop(token, None)

    def take(self, now: float) -> tuple[node_pb2.AgentMessage | None, float | None]:
        """A message whose time has come, or the seconds until one is; None and None where nothing waits."""
        soonest: float | None = None
        for token in self._waiting:
            sent_at = self._sent_at.get(token)
            left = 0.0 if sent_at is None else sent_at + self._interval - now
            if left <= 0:
                self._sent_at[token] = now
                return self._waiting.pop(token), None
            soonest = left if soonest is None else min(soonest, left)
        return None, soonest


class Outbox:
    """Messages of one session. Delivery: at most once; what matters is said again after the next Welcome."""

    def __init__(self) -> None:
        self._control: deque[node_pb2.AgentMessage] = deque()
        self._held_until = 0.0
        self._starts: dict[str, tuple[float, list[node_pb2.AgentMessage]]] = {}
        """What is held back of the beginnings of attempts, by token, and until when; in the order of those times."""
        self.crowded = False
        """Many short jobs go by: the writer says so."""
        self.spared = 0
        """Messages left out so far."""
        self._ticks = _Lane(TICK_SECONDS)
        self._previews = _Lane(PREVIEW_SECONDS)
        self._frames = FrameQueue()
        self._changed = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self._full = False
        self._over = False

    def control(self, message: node_pb2.AgentMessage, *, soon: bool = False) -> None:
        """Queues a message that must go in order; past the bound the session is ended. `soon`: it may wait a little."""
        if self._over:
            return
        if soon and self.crowded:
            self._hold(message)
            return
        if self._starts:
            self._settle_start(message)
        if not soon:
            self._held_until = 0.0
        elif not self._control:
            self._held_until = time.monotonic() + GATHER_SECONDS
        if len(self._control) >= CONTROL_LIMIT:
            self._full = True
        else:
            self._control.append(message)
        self._settled.clear()
        self._changed.set()

    def _hold(self, message: node_pb2.AgentMessage) -> None:
        """Keeps what an attempt begins with until its end is said, or for a while."""
        token = message.started.token if message.HasField("started") else message.accepted.token
        held = self._starts.get(token)
        if held is not None:
            held[1].append(message)
            return
        self._starts[token] = time.monotonic() + START_SECONDS, [message]
        self._settled.clear()
        if len(self._starts) == 1:
            self._changed.set()

    def _settle_start(self, message: node_pb2.AgentMessage) -> None:
        """Of an attempt that has succeeded nobody need hear that it began; else its beginning goes first."""
        kind = message.WhichOneof("message")
        token = getattr(getattr(message, kind), "token", "") if kind is not None else ""
        held = self._starts.pop(token, None)
        if held is None:
            return
        if kind == "complete" and not message.complete.HasField("error"):
            self.spared += len(held[1])
        else:
            self._control.extend(held[1])

    def _release_starts(self, now: float) -> None:
        """Queues what has been held back long enough; all of it once no crowd goes by."""
        for token in list(self._starts):
            until, held = self._starts[token]
            if until > now and self.crowded:
                break
            del self._starts[token]
            self._control.extend(held)

    def last(self, message: node_pb2.AgentMessage) -> None:
        """Queues the last message: of what else waits only control messages go before it, and nothing goes after it."""
        self.crowded = False
        self._release_starts(0.0)
        self.control(message)
        self._over = True

    def tick(self, message: node_pb2.AgentMessage) -> None:
        """Replaces the waiting tick of its attempt; the text of that one is kept, and goes before the new text."""
        waiting = self._ticks.waiting(message.tick.token)
        if waiting is not None and waiting.tick.HasField("text"):
            _prepend(message.tick, waiting.tick)
        self._ticks.put(message.tick.token, message)
        self._changed.set()

    def frame(self, message: node_pb2.AgentMessage) -> None:
        """Queues a frame behind those that wait; see FrameQueue for what gives way."""
        self._frames.put(message)
        self._changed.set()

    def finish(self, token: str) -> None:
        """An attempt has ended: no tick or preview goes out after what is said next, and what text and frames wait go
        before it."""
        last = self._ticks.waiting(token)
        if last is not None and last.tick.HasField("text"):
            self.control(last)
        self.forget(token)
        for message in self._frames.last_of(token):
            self.control(message)

    def preview(self, message: node_pb2.AgentMessage) -> None:
        """Replaces the waiting preview of its attempt."""
        self._previews.put(message.preview.token, message)
        self._changed.set()

    def withdraw_preview(self, token: str) -> None:
        """Drops a waiting preview that nobody looks at any more."""
        self._previews.withdraw(token)

    def forget(self, token: str) -> None:
        """Drops what waits of an attempt that has ended: no tick goes out after the end."""
        self._ticks.forget(token)
        self._previews.forget(token)

    async def next(self) -> node_pb2.AgentMessage:
        """The next message to write. Raises OutboxFullError once more than the bound has been queued."""
        while True:
            if self._full:
                raise OutboxFullError(f"{CONTROL_LIMIT:,} messages wait to be sent")
            now = time.monotonic()
            # Nothing of an attempt overtakes its start.
            others = self._ticks or self._previews or self._frames
            if self._starts:
                self._release_starts(math.inf if others else now)
            held = self._held_until - now if self._control and not others else 0.0
            if self._control and held <= 0:
                return self._control.popleft()
            if self._over:
                # A write after the stream's half-close would end it at once, and what the server has not read is lost.
                await asyncio.Event().wait()
            message, tick_wait = self._ticks.take(now)
            if message is not None:
                return message
            message = self._frames.take()
            if message is not None:
                return message
            message, preview_wait = self._previews.take(now)
            if message is not None:
                return message
            self._changed.clear()
            start = next((until - now for until, _ in self._starts.values()), None)
            try:
                async with asyncio.timeout(_sooner(tick_wait, preview_wait, held or None, start)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def with_company(self, first: node_pb2.AgentMessage) -> node_pb2.AgentMessage:
        """`first`, which `next` gave, in one batch with the control messages that wait behind it."""
        if not self._control:
            return first
        messages, size = [first], first.ByteSize()
        while self._control and len(messages) < BATCH_MESSAGES and size < BATCH_BYTES:
            messages.append(self._control.popleft())
            size += messages[-1].ByteSize()
        batch = node_pb2.AgentMessage(session=first.session)
        batch.batch.messages.extend(messages)
        return batch

    def written(self) -> None:
        """What `next` gave last has been written."""
        if not self._control and not self._starts and not self._full:
            self._settled.set()

    async def drained(self) -> None:
        """Waits until every control message queued so far has been written."""
        await self._settled.wait()


def _sooner(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def _prepend(tick: node_pb2.JobTick, before: node_pb2.JobTick) -> None:
    """Puts the text of an earlier tick before that of a later one."""
    tick.text = before.text + tick.text
    tick.text_offset = before.text_offset
