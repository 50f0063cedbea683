"""Steps that a leaving caller must not cut in two."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Shield:
    """Runs steps to their end even if the one who waits for them is cancelled; owns them until then."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, step: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Begins a step that nobody need wait for."""
        task = asyncio.create_task(step)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    async def run(self, step: Coroutine[Any, Any, T]) -> T:
        """The step's result. A cancelled caller leaves at once; the step goes on."""
        return await asyncio.shield(self.start(step))

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Marks the failure as seen where nobody waits for it any more.
            task.exception()

    async def aclose(self, seconds: float = 5.0) -> None:
        """Waits for the steps under way, at most so long, then cancels them."""
        if not self._tasks:
            return
        _, late = await asyncio.wait(set(self._tasks), timeout=seconds)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
