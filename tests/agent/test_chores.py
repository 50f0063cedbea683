"""A task that fails ends alone."""

from __future__ import annotations

import asyncio
import threading

from fleet_agent.chores import Chores
from fleet_agent.daemon import in_daemon


async def failing() -> None:
    raise ValueError("a bug")


async def test_a_failing_chore_does_not_end_the_others() -> None:
    finished = asyncio.Event()

    async def other() -> None:
        await asyncio.sleep(0)
        finished.set()

    async with asyncio.TaskGroup() as group:
        chores = Chores(group)
        bad = chores.spawn(failing(), "bad")
        await asyncio.wait({bad})
        chores.spawn(other(), "good")
    assert finished.is_set()


async def test_chores_are_cancelled_together() -> None:
    async with asyncio.TaskGroup() as group:
        chores = Chores(group)
        tasks = [chores.spawn(asyncio.sleep(600), f"sleep {number}") for number in range(3)]
        await asyncio.sleep(0)
        chores.cancel()
    assert all(task.cancelled() for task in tasks)


async def test_a_daemon_thread_gives_its_result_or_its_error() -> None:
    assert await in_daemon(lambda: 6 * 7, "sum") == 42
    future = in_daemon(lambda: 1 // 0, "bug")
    await asyncio.wait({future})
    assert isinstance(future.exception(), ZeroDivisionError)


def test_a_daemon_thread_that_ends_after_the_loop_is_quiet() -> None:
    gate = threading.Event()

    async def start() -> None:
        in_daemon(lambda: gate.wait(40), "late daemon")

    asyncio.run(start())
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "late daemon"]
    gate.set()
    thread.join(50)
    assert not thread.is_alive()
