"""Frames of engines' own protocols that wait to be sent: in their order, bounded, their pictures limited in rate.

Where too many wait, a picture gives way first, then progress, of which more comes; then the oldest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from fleet.v1 import node_pb2

LIMIT = 1024
LIMIT_BYTES = 8 << 20
PICTURE_SECONDS = 0.1
"""Pictures of one attempt are not sent oftener, on the whole."""
BURST = 3
"""So many may come early: a step that is done every tenth of a second is not always on time."""
LAST_PROGRESS = 32
"""So much of the progress that waits when an attempt ends is still told: of a short prompt its client sees all."""
LAST_PICTURES = 4
LAST_PICTURE_BYTES = 1 << 20
"""And so many of its pictures: where the agent was busy they wait together with the end."""
_PLAIN_JPEG = bytes((0, 0, 0, 1, 0, 0, 0, 1))
_WITH_METADATA = bytes((0, 0, 0, 4))
_PROGRESS = ('{"type": "progress', '{"type":"progress')


class FrameQueue:
    """Messages with an EngineFrame each."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._waiting: deque[node_pb2.AgentMessage] = deque()
        self._bytes = 0
        self._clock = clock
        self._picture_at: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def put(self, message: node_pb2.AgentMessage) -> None:
        """Queues a frame, unless it is a picture that comes too soon after the last."""
        frame = message.frame
        if _is_preview(frame.binary):
            now = self._clock()
            due = max(now, self._picture_at.get(frame.token, now))
            if due - now > BURST * PICTURE_SECONDS:
                return
            self._picture_at[frame.token] = due + PICTURE_SECONDS
        self._waiting.append(message)
        self._bytes += _size(message)
        while len(self._waiting) > LIMIT or self._bytes > LIMIT_BYTES:
            self._give_way()

    def take(self) -> node_pb2.AgentMessage | None:
        """The oldest; None where none waits."""
        if not self._waiting:
            return None
        message = self._waiting.popleft()
        self._bytes -= _size(message)
        return message

    def last_of(self, token: str) -> list[node_pb2.AgentMessage]:
        """Takes out what waits of an attempt that has ended: all of it, but of its pictures and of its
        progress the last."""
        self._picture_at.pop(token, None)
        if not self._waiting:
            return []
        own = [message for message in self._waiting if message.frame.token == token]
        self._waiting = deque(message for message in self._waiting if message.frame.token != token)
        self._bytes = sum(map(_size, self._waiting))
        progress = [message for message in own if _may_go(message) and not _is_preview(message.frame.binary)]
        pictures = [message for message in own if _is_preview(message.frame.binary)]
        dropped = {id(message) for message in (*progress[:-LAST_PROGRESS], *pictures[:-LAST_PICTURES])}
        room = LAST_PICTURE_BYTES
        for picture in reversed(pictures[-LAST_PICTURES:]):
            room -= _size(picture)
            if room < 0:
                dropped.add(id(picture))
        return [one for one in own if id(one) not in dropped]

    def _give_way(self) -> None:
        pictures = (message for message in self._waiting if _is_preview(message.frame.binary))
        progress = (message for message in self._waiting if _may_go(message))
        loser = next(pictures, None) or next(progress, None) or self._waiting[0]
        for index, message in enumerate(self._waiting):
            if message is loser:
                del self._waiting[index]
                break
        self._bytes -= _size(loser)


def _may_go(message: node_pb2.AgentMessage) -> bool:
    """Of no use once a later one is there."""
    return _is_preview(message.frame.binary) or message.frame.text.startswith(_PROGRESS)


def _is_preview(binary: bytes) -> bool:
    """A JPEG of ComfyUI, with metadata or without. PNGs are results (SaveImageWebsocket), and events of type 3 text."""
    if binary.startswith(_PLAIN_JPEG):
        return True
    return binary.startswith(_WITH_METADATA) and b"image/png" not in binary[8 : 8 + int.from_bytes(binary[4:8], "big")]


def _size(message: node_pb2.AgentMessage) -> int:
    frame = message.frame
    return len(frame.binary) if frame.HasField("binary") else len(frame.text)
