"""A bounded line between one task that puts and one that takes."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Pipe(Generic[T]):
    """At most `limit` items wait; who puts waits for room, so that a slow taker slows the source down.

    `end` is the source's last word: what waits is still taken. `close` is the taker's: nothing is taken any more.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._items: deque[T] = deque()
        self._changed = asyncio.Event()
        self._ended = False
        self._closed = False

    async def put(self, item: T) -> bool:
        """Whether the item found a place; False once the pipe has ended or was closed."""
        while len(self._items) >= self._limit and not (self._ended or self._closed):
            await self._wait()
        if self._ended or self._closed:
            return False
        self._items.append(item)
        self._changed.set()
        return True

    async def get(self) -> T | None:
        """The next item; None after the last."""
        while not self._items:
            if self._ended or self._closed:
                return None
            await self._wait()
        item = self._items.popleft()
        self._changed.set()
        return item

    def end(self) -> None:
        """Nothing more will be put."""
        self._ended = True
        self._changed.set()

    def close(self) -> None:
        """Nothing more will be taken."""
        self._closed = True
        self._items.clear()
        self._changed.set()

    async def _wait(self) -> None:
        # Each side waits only for what the other changes next, and looks again after every change.
        self._changed.clear()
        await self._changed.wait()
