"""Running a call next to its watchers: it ends when the client leaves, takes nothing, or the server stops."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fleet_server.bridge.asgi import ClientGoneError, ClientStuckError, Receive

_LOG = logging.getLogger(__name__)


class Stop(enum.Enum):
    """Why a call was stopped from outside."""

    GONE = "the client left"
    STUCK = "the client took nothing"
    SHUTDOWN = "the server stops"
    HEAD = "only the head was asked for"
    OVERSIZE = "a frame was too large"

    @property
    def is_callers(self) -> bool:
        """Whether the caller is no longer there for the reply."""
        return self in (Stop.GONE, Stop.STUCK)


class Stopper:
    """Stops one call, once; the first reason counts."""

    def __init__(self) -> None:
        self.reason: Stop | None = None
        self._task: asyncio.Task[None] | None = None

    def watch(self, task: asyncio.Task[None]) -> None:
        """The task to cancel."""
        self._task = task

    def stop(self, reason: Stop) -> None:
        """Cancel the call."""
        if self.reason is None and self._task is not None and not self._task.done():
            self.reason = reason
            self._task.cancel()


class LiveCalls:
    """The streams and sockets in progress, so that a shutdown can end them."""

    def __init__(self) -> None:
        self._stoppers: set[Stopper] = set()
        self._idle = asyncio.Event()
        self.closing = False

    def __len__(self) -> int:
        return len(self._stoppers)

    def add(self, stopper: Stopper) -> None:
        """Take a call in."""
        self._stoppers.add(stopper)

    def discard(self, stopper: Stopper) -> None:
        """Let an ended call go."""
        self._stoppers.discard(stopper)
        if not self._stoppers:
            self._idle.set()

    async def shut_down(self, timeout_seconds: float) -> None:
        """End all calls, and wait until they have said so to their clients."""
        self.closing = True
        self._idle.clear()
        if not self._stoppers:
            return
        for stopper in list(self._stoppers):
            stopper.stop(Stop.SHUTDOWN)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self._idle.wait()


Helper = Callable[[Stopper], Coroutine[Any, Any, None]]


async def supervise(
    main: Coroutine[Any, Any, None],
    helpers: Sequence[Helper],
    *,
    live: LiveCalls | None = None,
    finish: Callable[[Stop | None], Coroutine[Any, Any, None]] | None = None,
) -> Stop | None:
    """Run `main` in a task of its own with `helpers` beside it, and return why it was stopped, None if it ended itself.

    `finish` runs last, after main and helpers have ended, with the reason. What main raises is raised here; a client
    that is found stuck or gone by any of them stops the call. Nothing is left running.
    """
    stopper = Stopper()
    task = asyncio.create_task(main)
    stopper.watch(task)
    if live is not None:
        live.add(stopper)
    tasks = [asyncio.create_task(_guarded(helper, stopper)) for helper in helpers]
    try:
        try:
            await asyncio.wait({task})
        finally:
            for each in (task, *tasks):
                each.cancel()
            await asyncio.gather(task, *tasks, return_exceptions=True)
        reason = _outcome(task, stopper)
        if finish is not None:
            await finish(reason)
        return reason
    finally:
        if live is not None:
            live.discard(stopper)


def _outcome(task: asyncio.Task[None], stopper: Stopper) -> Stop | None:
    if task.cancelled():
        if stopper.reason is None:
            raise asyncio.CancelledError
        return stopper.reason
    error = task.exception()
    if isinstance(error, ClientStuckError):
        return Stop.STUCK
    if isinstance(error, ClientGoneError):
        return Stop.GONE
    if error is not None:
        raise error
    return None


async def _guarded(helper: Helper, stopper: Stopper) -> None:
    try:
        await helper(stopper)
    except ClientStuckError:
        stopper.stop(Stop.STUCK)
    except ClientGoneError:
        stopper.stop(Stop.GONE)
    except Exception:
        _LOG.exception("a stream's watcher failed")
        stopper.stop(Stop.GONE)


def disconnect_watcher(receive: Receive) -> Helper:
    """A helper that stops the call when the HTTP client leaves."""

    async def watch(stopper: Stopper) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        stopper.stop(Stop.GONE)

    return watch
