"""Tasks of the agent that end together."""

from __future__ import annotations

import asyncio
import inspect

from fleet_agent.chores import Chores


async def test_what_is_cancelled_before_it_begins_leaves_nothing_behind() -> None:
    begun: list[bool] = []

    async def work() -> None:
        begun.append(True)

    never, done = work(), work()
    async with asyncio.TaskGroup() as group:
        chores = Chores(group)
        chores.spawn(never, "never")
        chores.cancel()
        chores.spawn(done, "done")
    assert begun == [True]
    assert inspect.getcoroutinestate(never) == inspect.getcoroutinestate(done) == inspect.CORO_CLOSED
