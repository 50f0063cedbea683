"""The order, the rates and the bounds of what an agent sends."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from fleet.v1 import node_pb2, types_pb2

from fleet_agent import outbox as module
from fleet_agent.outbox import CONTROL_LIMIT, Outbox, OutboxFullError


class Clock:
    """The outbox's clock, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def control(number: int) -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(heartbeat=node_pb2.AgentHeartbeat(sequence=number))


def tick(token: str, step: int = 0) -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(tick=node_pb2.JobTick(token=token, step=step))


def preview(token: str, step: int = 0) -> node_pb2.AgentMessage:
    return node_pb2.AgentMessage(preview=node_pb2.JobPreview(token=token, step=step))


async def taken(outbox: Outbox) -> list[node_pb2.AgentMessage]:
    """What is due now."""
    found: list[node_pb2.AgentMessage] = []
    while True:
        waiting = asyncio.ensure_future(outbox.next())
        for _ in range(3):
            await asyncio.sleep(0)
        if not waiting.done():
            waiting.cancel()
            return found
        found.append(waiting.result())
        outbox.written()


def told(messages: list[node_pb2.AgentMessage]) -> list[tuple[str, str, int]]:
    found = []
    for message in messages:
        kind = str(message.WhichOneof("message"))
        inner = getattr(message, kind)
        found.append((kind, getattr(inner, "token", ""), getattr(inner, "step", getattr(inner, "sequence", 0))))
    return found


async def test_control_goes_before_ticks_and_ticks_before_previews() -> None:
    outbox = Outbox()
    outbox.preview(preview("a"))
    outbox.tick(tick("a"))
    for number in range(3):
        outbox.control(control(number))
    kinds = [kind for kind, _, _ in told(await taken(outbox))]
    assert kinds == ["heartbeat", "heartbeat", "heartbeat", "tick", "preview"]


async def test_control_keeps_its_order() -> None:
    outbox = Outbox()
    for number in range(CONTROL_LIMIT):
        outbox.control(control(number))
    assert [message.heartbeat.sequence for message in await taken(outbox)] == list(range(CONTROL_LIMIT))


async def test_one_control_message_too_many_ends_the_session() -> None:
    outbox = Outbox()
    for number in range(CONTROL_LIMIT + 1):
        outbox.control(control(number))
    with pytest.raises(OutboxFullError, match="1,024"):
        await outbox.next()


async def test_only_the_latest_tick_and_preview_of_an_attempt_are_kept(clock: Clock) -> None:
    outbox = Outbox()
    for step in range(1000):
        outbox.tick(tick("a", step))
        outbox.preview(preview("a", step))
        outbox.tick(tick("b", -step))
    assert told(await taken(outbox)) == [("tick", "a", 999), ("tick", "b", -999), ("preview", "a", 999)]


async def test_ten_ticks_and_two_previews_a_second_and_attempt(clock: Clock) -> None:
    outbox = Outbox()
    count: Counter[tuple[str, str]] = Counter()
    for step in range(400):
        for token in ("a", "b"):
            outbox.tick(tick(token, step))
            outbox.preview(preview(token, step))
        count.update((kind, token) for kind, token, _ in told(await taken(outbox)))
        clock.now += 0.01
    # 4 s; the first ones go at once.
    for token in ("a", "b"):
        assert 35 <= count["tick", token] <= 40
        assert 7 <= count["preview", token] <= 8


async def test_what_waits_for_its_time_is_sent_without_another_push() -> None:
    outbox = Outbox()
    outbox.tick(tick("a", 1))
    assert (await outbox.next()).tick.step == 1
    outbox.tick(tick("a", 2))
    assert (await outbox.next()).tick.step == 2


async def test_a_waiting_reader_is_woken_by_each_kind() -> None:
    for push, message in (("control", control(1)), ("tick", tick("a")), ("preview", preview("a"))):
        outbox = Outbox()
        waiting = asyncio.ensure_future(outbox.next())
        await asyncio.sleep(0)
        getattr(outbox, push)(message)
        assert await waiting == message


async def test_control_overtakes_while_a_tick_waits_for_its_time() -> None:
    outbox = Outbox()
    outbox.tick(tick("a", 1))
    await outbox.next()
    outbox.tick(tick("a", 2))
    waiting = asyncio.ensure_future(outbox.next())
    await asyncio.sleep(0)
    outbox.control(control(7))
    assert (await waiting).heartbeat.sequence == 7


async def test_an_attempt_that_has_ended_is_forgotten(clock: Clock) -> None:
    outbox = Outbox()
    outbox.tick(tick("a"))
    outbox.preview(preview("a"))
    outbox.tick(tick("b"))
    outbox.forget("a")
    outbox.forget("never there")
    assert [token for _, token, _ in told(await taken(outbox))] == ["b"]


async def test_a_preview_that_nobody_looks_at_any_more_is_withdrawn_and_its_rate_stays(clock: Clock) -> None:
    outbox = Outbox()
    outbox.preview(preview("a", 1))
    assert told(await taken(outbox)) == [("preview", "a", 1)]
    outbox.preview(preview("a", 2))
    outbox.withdraw_preview("a")
    outbox.withdraw_preview("never there")
    clock.now += 0.3
    outbox.preview(preview("a", 3))
    assert told(await taken(outbox)) == []
    clock.now += 0.3
    assert told(await taken(outbox)) == [("preview", "a", 3)]


async def test_drained_waits_for_the_message_that_is_being_written() -> None:
    outbox = Outbox()
    await outbox.drained()
    outbox.control(control(1))
    outbox.control(control(2))
    drained = asyncio.ensure_future(outbox.drained())
    for _ in range(2):
        await outbox.next()
        await asyncio.sleep(0)
        assert not drained.done()
        outbox.written()
    await drained


async def test_nothing_goes_after_the_last_message() -> None:
    """A write after the half-close ends a stream at once, and the server may not have read the goodbye yet."""
    outbox = Outbox()
    outbox.tick(tick("a"))
    outbox.control(control(1))
    outbox.last(control(2))
    outbox.control(control(3))
    outbox.tick(tick("b"))
    outbox.preview(preview("b"))
    outbox.finish("a")
    assert told(await taken(outbox)) == [("heartbeat", "", 1), ("heartbeat", "", 2)]
    await outbox.drained()


def about(kind: str, token: str, **more: Any) -> node_pb2.AgentMessage:
    message = node_pb2.AgentMessage()
    getattr(message, kind).SetInParent()
    getattr(message, kind).token = token
    if more:
        getattr(message, kind).MergeFrom(type(getattr(message, kind))(**more))
    return message


async def in_one(outbox: Outbox) -> list[tuple[str | None, str]]:
    """All that goes in the next batch."""
    whole = outbox.with_company(await outbox.next())
    outbox.written()
    messages = whole.batch.messages or [whole]
    kinds = [one.WhichOneof("message") for one in messages]
    return [(kind, getattr(one, str(kind)).token) for kind, one in zip(kinds, messages, strict=True)]


async def test_in_a_crowd_a_success_stands_for_its_beginning() -> None:
    outbox = Outbox()
    outbox.crowded = True
    for token in ("good", "bad", "given back"):
        outbox.control(about("accepted", token), soon=True)
        outbox.control(about("started", token), soon=True)
    outbox.control(about("complete", "good"))
    outbox.control(about("complete", "bad", error=types_pb2.JobError(reason="ENGINE_FAILED")))
    outbox.control(about("released", "given back"))
    assert await in_one(outbox) == [
        ("complete", "good"),
        ("accepted", "bad"),
        ("started", "bad"),
        ("complete", "bad"),
        ("accepted", "given back"),
        ("started", "given back"),
        ("released", "given back"),
    ]
    assert outbox.spared == 2


async def test_in_a_crowd_beginnings_are_told_after_a_while_or_ahead_of_progress() -> None:
    outbox = Outbox()
    outbox.crowded = True
    outbox.control(about("started", "long"), soon=True)
    assert not outbox._settled.is_set()
    assert await in_one(outbox) == [("started", "long")]
    await outbox.drained()
    outbox.control(about("started", "steps"), soon=True)
    outbox.tick(about("tick", "steps"))
    assert await in_one(outbox) == [("started", "steps")]
    assert await in_one(outbox) == [("tick", "steps")]
    outbox.control(about("started", "last"), soon=True)
    outbox.last(node_pb2.AgentMessage(goodbye=node_pb2.AgentGoodbye()))
    whole = outbox.with_company(await outbox.next())
    assert [one.WhichOneof("message") for one in whole.batch.messages] == ["started", "goodbye"]
