"""The one timer of a call, against what asyncio.timeout does."""

from __future__ import annotations

import asyncio
from unittest.mock import MagicMock

import pytest

from fleet_server.rpc.deadline import Deadline, ExpiredError, within


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


async def test_work_that_never_waits_has_no_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once() -> str:
        return "done"

    async def waits() -> str:
        await asyncio.sleep(0)
        return "done"

    call_later = MagicMock()
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", call_later)
    assert await within(60, at_once()) == "done"
    call_later.assert_not_called()
    assert await within(60, waits()) == "done"
    assert [call.args[0] for call in call_later.call_args_list] == [60]


async def test_work_within_its_time_goes_on_as_if_it_was_awaited() -> None:
    async def work() -> list[object]:
        seen: list[object] = [asyncio.current_task()]
        async with asyncio.timeout(60):
            seen.append(await asyncio.sleep(0, "slept"))
        try:
            await refused
        except KeyError as error:
            seen.append(error)
        seen.append(await asyncio.to_thread(lambda: 7))
        return seen

    refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    error = KeyError("no")
    refused.set_exception(error)
    assert await within(60, work()) == [asyncio.current_task(), "slept", error, 7]


@pytest.mark.parametrize("waits", [False, True])
async def test_an_error_of_the_work_is_the_callers(waits: bool) -> None:
    async def work() -> None:
        if waits:
            await asyncio.sleep(0)
        raise ValueError("own")

    with pytest.raises(ValueError, match="own"):
        await within(60, work())


async def test_work_that_waits_too_long_is_stopped_and_its_own_timeouts_are_no_expiry() -> None:
    async def late() -> None:
        await asyncio.Event().wait()

    async def own() -> None:
        await asyncio.sleep(0)
        raise TimeoutError("own")

    with pytest.raises(ExpiredError):
        await within(0.01, late())
    with pytest.raises(TimeoutError, match="own") as caught:
        await within(60, own())
    assert not isinstance(caught.value, ExpiredError)


async def test_a_cancellation_reaches_the_work() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = asyncio.create_task(within(60, work()))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_a_cancellation_reaches_work_that_only_gives_way() -> None:
    async def work() -> str:
        for _ in range(100):
            await asyncio.sleep(0)
        return "was not cancelled"

    task = asyncio.create_task(within(60, work()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
