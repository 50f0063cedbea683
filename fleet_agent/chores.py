"""Tasks of which none may take the agent down: what one raises is logged, and ends that one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

_log = structlog.get_logger("fleet.agent")


class Chores:
    """Tasks of a task group, cancelled together."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task."""
        task = self._group.create_task(_guarded(work, name), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # One that is cancelled before its first step never comes to its work.
        task.add_done_callback(lambda _: work.close())
        return task

    def cancel(self) -> None:
        """Ends all that are under way."""
        for task in list(self._tasks):
            task.cancel()


async def _guarded(work: Coroutine[Any, Any, None], name: str) -> None:
    try:
        await work
    except Exception:
        _log.exception("a task of the agent failed", task=name)
