"""The time that a call has, kept by one timer."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class ExpiredError(TimeoutError):
    """The time of a Deadline ran out."""


class Deadline:
    """Cancels the task that entered it after `seconds` (None: never), and turns that cancellation into ExpiredError.

    What `asyncio.timeout` does, for the one use of each call: it is entered once, at once, and never moved, which makes
    it three times as fast. A cancellation from outside passes as it is, also where both meet.
    """

    __slots__ = ("_cancelling", "_seconds", "_task", "_timer", "expired")

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[object] | None = None
        self._cancelling = 0
        self.expired = False
        """Whether the time ran out before the work ended."""

    def __enter__(self) -> Deadline:
        if self._seconds is not None:
            task = asyncio.current_task()
            if task is None:
                raise RuntimeError("a deadline needs a task that it can cancel")
            self._task, self._cancelling = task, task.cancelling()
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self.expired and self._task is not None:
            ours_alone = self._task.uncancel() <= self._cancelling
            if ours_alone and isinstance(error, asyncio.CancelledError):
                raise ExpiredError from error

    def _expire(self) -> None:
        self.expired = True
        if self._task is not None:
            self._task.cancel()


@types.coroutine
def within(seconds: float | None, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Awaits `work` with a Deadline from the moment that it waits for something: what never waits needs no timer.

    Raises ExpiredError.
    """
    try:
        waits_for = work.send(None)
    except StopIteration as ended:
        result: T = ended.value
        return result
    with Deadline(seconds):
        return (yield from _rest(work, waits_for))


def _rest(work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """What is left of a coroutine that was begun: passes on what it waits for, and to it what comes of that."""
    while True:
        try:
            try:
                value = yield waits_for
            except BaseException as error:
                waits_for = work.throw(error)
            else:
                waits_for = work.send(value)
        except StopIteration as ended:
            result: T = ended.value
            return result
