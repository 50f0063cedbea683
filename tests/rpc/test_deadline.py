"""The one timer of a call, against what asyncio.timeout does."""

from __future__ import annotations

import asyncio

import pytest

from fleet_server.rpc.deadline import Deadline


async def test_work_in_time_ends_as_it_ends() -> None:
    with Deadline(60) as deadline:
        await asyncio.sleep(0)
    assert not deadline.expired
    with pytest.raises(ValueError, match="own"), Deadline(60) as deadline:
        raise ValueError("own")
    assert not deadline.expired


async def test_work_without_a_deadline_has_no_timer() -> None:
    with Deadline(None) as deadline:
        await asyncio.sleep(0)
    assert not deadline.expired


async def test_late_work_is_cancelled_and_the_task_goes_on() -> None:
    stopped = []
    with pytest.raises(TimeoutError), Deadline(0.01) as deadline:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(True)
            raise
    assert (deadline.expired, stopped) == (True, [True])
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def test_a_timeout_of_the_work_itself_is_no_expiry() -> None:
    with pytest.raises(TimeoutError), Deadline(60) as deadline:
        raise TimeoutError("the servicer's own")
    assert not deadline.expired


async def test_an_error_of_the_work_as_it_is_cancelled_stands() -> None:
    with pytest.raises(ValueError, match="while stopping"), Deadline(0.01) as deadline:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("while stopping") from None
    assert deadline.expired
    await asyncio.sleep(0)


@pytest.mark.parametrize("both", [False, True])
async def test_a_cancellation_from_outside_stays_one_even_where_both_meet(both: bool) -> None:
    deadline = Deadline(60)
    begun = asyncio.Event()

    async def work() -> None:
        with deadline:
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    if both:
        deadline._expire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert deadline.expired == both


async def test_deadlines_nest() -> None:
    with Deadline(60) as outer:
        with pytest.raises(TimeoutError), Deadline(0.01) as inner:
            await asyncio.Event().wait()
        await asyncio.sleep(0)
    assert (outer.expired, inner.expired) == (False, True)
    with pytest.raises(TimeoutError), Deadline(0.01) as outer, Deadline(60) as inner:
        await asyncio.Event().wait()
    assert (outer.expired, inner.expired) == (True, False)
