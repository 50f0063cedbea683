"""Replies kept under their key: one effect, the first reply again, refusals forgotten."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.store import Idempotency, Store
from fleet_server.store.replies import ReplyStore
from tests.store.making import ManualClock
from tests.waiting import wait_until

ONCE = Idempotency("ann", "Queue/RedriveJobs", "k1", "print")


def counting() -> tuple[Callable[[str], Awaitable[bytes]], list[str]]:
    """Work that answers with how often it was begun, and the operations that it was begun with."""
    begun: list[str] = []
    numbers = itertools.count(1)

    async def work(operation: str) -> bytes:
        begun.append(operation)
        return b"%d" % next(numbers)

    return work, begun


async def test_the_same_call_gives_the_first_reply(store: Store) -> None:
    work, begun = counting()
    assert [await store.replies.once(ONCE, work) for _ in range(3)] == [b"1", b"1", b"1"]
    assert len(begun) == 1
    for other in (
        Idempotency("bob", ONCE.method, ONCE.key, ONCE.fingerprint),
        Idempotency(ONCE.owner, "Queue/Redeliver", ONCE.key, ONCE.fingerprint),
        Idempotency(ONCE.owner, ONCE.method, "k2", ONCE.fingerprint),
    ):
        assert await store.replies.once(other, work) != b"1"


async def test_other_content_is_refused(store: Store) -> None:
    work, _ = counting()
    await store.replies.once(ONCE, work)
    with pytest.raises(FleetError) as caught:
        await store.replies.once(Idempotency(ONCE.owner, ONCE.method, ONCE.key, "other"), work)
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_second_call_waits_for_the_first(store: Store) -> None:
    go = asyncio.Event()
    work, begun = counting()

    async def slow(operation: str) -> bytes:
        await go.wait()
        return await work(operation)

    first, second = (asyncio.create_task(store.replies.once(ONCE, slow)) for _ in range(2))
    done, _ = await asyncio.wait({first, second}, timeout=0.3)
    assert not done
    go.set()
    assert (await first, await second) == (b"1", b"1")
    assert len(begun) == 1


async def test_a_refusal_is_not_remembered(store: Store) -> None:
    work, _ = counting()

    async def refused(operation: str) -> bytes:
        raise FleetError("JOB_NOT_FOUND", "no")

    with pytest.raises(FleetError, match="no"):
        await store.replies.once(ONCE, refused)
    assert await store.replies.once(Idempotency(ONCE.owner, ONCE.method, ONCE.key, "other"), work) == b"1"


async def test_where_the_outcome_is_unknown_the_same_operation_goes_on(store: Store) -> None:
    work, begun = counting()
    operations: list[str] = []

    async def away(operation: str) -> bytes:
        operations.append(operation)
        raise FleetError("STORE_UNAVAILABLE", "away")

    with pytest.raises(FleetError, match="away"):
        await store.replies.once(ONCE, away)
    assert await store.replies.once(ONCE, work) == b"1"
    assert begun == operations


async def test_who_began_and_never_ended_is_followed_by_the_next(store: Store, clock: ManualClock) -> None:
    brief = ReplyStore(store.replies._room, claim_ms=50, poll_seconds=0.01)
    work, begun = counting()
    operations: list[str] = []

    async def forever(operation: str) -> bytes:
        operations.append(operation)
        return await asyncio.Future()

    hanging = asyncio.create_task(brief.once(ONCE, forever))
    try:
        await wait_until(lambda: operations)
        clock.tick(51)
        assert await brief.once(ONCE, work) == b"1"
        assert begun == operations
    finally:
        hanging.cancel()
        await asyncio.wait([hanging])
    assert await brief.once(ONCE, work) == b"1"
