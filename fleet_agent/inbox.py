"""What a slot's child says about one task, on its way to whoever follows that task."""

from __future__ import annotations

import asyncio
from collections import deque

from fleet_agent.frames import Message

Frame = tuple[Message, bytes]
_LIMIT = 2
"""A start and an end pass in one go; who says more leaves the others their turns."""


class Inbox:
    """A bounded queue of frames with an end. One puts, one takes."""

    def __init__(self, limit: int = _LIMIT) -> None:
        self._limit = limit
        self._waiting: deque[Frame] = deque()
        self._ended = False
        self._why: Exception | None = None
        self._changed = asyncio.Event()

    async def put(self, frame: Frame) -> None:
        """Waits for room; after the end frames are thrown away."""
        while len(self._waiting) >= self._limit and not self._ended:
            self._changed.clear()
            await self._changed.wait()
        if not self._ended:
            self._waiting.append(frame)
            self._changed.set()

    def end(self, why: Exception | None = None) -> None:
        """No more frames come, or are wanted; `why` is raised by who takes the last one."""
        if not self._ended:
            self._ended, self._why = True, why
        self._changed.set()

    async def take(self) -> Frame | None:
        """The next frame; None after the last one. Raises what the inbox was ended with."""
        while not self._waiting:
            if self._ended:
                if self._why is not None:
                    raise self._why
                return None
            self._changed.clear()
            await self._changed.wait()
        self._changed.set()
        return self._waiting.popleft()
