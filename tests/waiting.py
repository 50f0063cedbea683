"""Waiting for a condition, in place of sleeping for a guess."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, overload

import psutil

T = TypeVar("T")


def pause(begun: float, longest: float = 0.1) -> float:
    """Until a condition is looked at again: what has waited for long may wait a little longer, and leaves the machine
    to what it waits for. `begun` is of the monotonic clock."""
    return min(0.01 + (time.monotonic() - begun) / 20, longest)


@overload
async def wait_until(condition: Callable[[], Awaitable[T | None]], *, seconds: float = 50.0) -> T: ...
@overload
async def wait_until(condition: Callable[[], T | None], *, seconds: float = 50.0) -> T: ...
async def wait_until(condition: Callable[[], Any], *, seconds: float = 50.0) -> Any:
    """Returns the first true value of `condition`, plain or awaitable; AssertionError after that many seconds."""
    value: Any = None
    begun = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            while True:
                answer = condition()
                value = await answer if inspect.isawaitable(answer) else answer
                if value:
                    return value
                await asyncio.sleep(pause(begun))
    except TimeoutError:
        raise AssertionError(f"not so within {seconds:g} s: {condition}; the last value was {value!r}") from None


def wait_until_now(condition: Callable[[], T | None], *, seconds: float = 50.0) -> T:
    """The same for a test without a loop."""
    begun = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() < begun + seconds, f"not so within {seconds:g} s: {condition}; it was {value!r}"
        time.sleep(pause(begun))
    return value


def has_ended(pid: int) -> bool:
    """Whether the process is gone, or is nothing but what its parent has not asked for yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
