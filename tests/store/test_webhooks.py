"""Callbacks in the store: one sender at a time, nothing forgotten, nothing left behind."""

from __future__ import annotations

import pytest

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobState
from fleet_server.domain.webhook import DeliveryState, Verdict
from fleet_server.store import HookRow, Idempotency, Store, ends_with_callback
from tests.store.making import START_MS, ManualClock, claim, error, new_job

LEASE_MS = 45_000
DONE = Verdict(DeliveryState.DELIVERED)
GIVEN_UP = Verdict(DeliveryState.FAILED)
AGAIN = Verdict(DeliveryState.PENDING, 5_000)
KEY = Idempotency("ada", "Queue/Redeliver", "once", "print")


async def ended(store: Store, job_id: str = "", *, callback: bool = True, fails: bool = False) -> str:
    """A job that has run to its end; its id."""
    job = new_job(job_id)
    await store.jobs.submit([job], callbacks=[job.job_id] if callback else [])
    await run(store, fails=fails)
    return job.job_id


async def run(store: Store, *, fails: bool = False) -> None:
    """Takes the next job through an attempt."""
    claimed = await claim(store)
    await store.jobs.started(claimed.job.job_id, claimed.token)
    if fails:
        await store.jobs.fail(
            claimed.job.job_id,
            claimed.token,
            error=error("ENGINE_FAILED"),
            attempt=b"",
            retryable=False,
            result=b"partial",
        )
    else:
        await store.jobs.complete(claimed.job.job_id, claimed.token, result=b"result")


async def taken(store: Store, token: str, *, sender: str = "one", limit: int = 10) -> list[HookRow]:
    claims = await store.webhooks.claim(sender, token, limit=limit, lease_ms=LEASE_MS)
    return list(claims.rows)


async def standing(store: Store, job_id: str, generation: int = 1) -> HookRow:
    return (await store.webhooks.get_many(job_id, [generation]))[0]


async def test_each_end_with_a_callback_is_due_at_once_to_one_sender_alone(store: Store) -> None:
    first = await ended(store)
    await ended(store, callback=False)
    assert (await standing(store, first)).due_ms == START_MS
    (row,) = await taken(store, "t1")
    assert (row.job_id, row.generation, row.tries, row.log, row.end) == (first, 1, 0, b"", None)
    assert await taken(store, "t2", sender="two") == []
    assert (await standing(store, first)).due_ms is None


async def test_a_claim_is_bounded_takes_the_longest_due_and_tells_the_next(store: Store, clock: ManualClock) -> None:
    ids = []
    for _ in range(3):
        ids.append(await ended(store))
        clock.tick(10)
    claims = await store.webhooks.claim("one", "t1", limit=2, lease_ms=LEASE_MS)
    assert [row.job_id for row in claims.rows] == ids[:2]
    assert claims.wait_ms == 0
    claims = await store.webhooks.claim("one", "t2", limit=2, lease_ms=LEASE_MS)
    assert [row.job_id for row in claims.rows] == ids[2:]
    assert claims.wait_ms == LEASE_MS
    assert (await store.webhooks.claim("one", "t3", limit=2, lease_ms=LEASE_MS)).rows == ()


async def test_the_same_token_gives_the_same_callbacks_while_they_are_held(store: Store) -> None:
    ids = [await ended(store) for _ in range(3)]
    rows = await taken(store, "t1")
    assert [row.job_id for row in rows] == ids
    assert await taken(store, "t1") == rows
    await store.webhooks.settle(rows[1], "t1", DONE, b"")
    assert [row.job_id for row in await taken(store, "t1")] == [ids[0], ids[2]]


async def test_a_dead_senders_callbacks_come_back_and_its_word_is_refused(store: Store, clock: ManualClock) -> None:
    job_id = await ended(store)
    (lost,) = await taken(store, "t1")
    clock.tick(LEASE_MS - 1)
    assert await taken(store, "t2", sender="two") == []
    clock.tick(1)
    (row,) = await taken(store, "t3", sender="two")
    assert row.job_id == job_id
    assert not await store.webhooks.settle(lost, "t1", DONE, b"late")
    assert (await standing(store, job_id)).state is DeliveryState.PENDING
    assert await store.webhooks.settle(row, "t3", DONE, b"log")


@pytest.mark.parametrize("verdict", [DONE, GIVEN_UP])
async def test_an_end_ends_it(store: Store, clock: ManualClock, verdict: Verdict) -> None:
    job_id = await ended(store)
    (row,) = await taken(store, "t1")
    clock.tick(100)
    assert await store.webhooks.settle(row, "t1", verdict, b"log")
    clock.tick(100)
    assert await store.webhooks.settle(row, "t1", verdict, b"log")
    row = await standing(store, job_id)
    assert (row.state, row.tries, row.log, row.due_ms) == (verdict.state, 1, b"log", None)
    assert row.ended_ms == START_MS + 100
    clock.tick(LEASE_MS)
    assert (await store.webhooks.claim("one", "t2", limit=9, lease_ms=LEASE_MS)).wait_ms is None


async def test_a_failed_try_is_due_again_after_its_wait(store: Store, clock: ManualClock) -> None:
    job_id = await ended(store)
    (row,) = await taken(store, "t1")
    assert await store.webhooks.settle(row, "t1", AGAIN, b"one")
    # The same word twice moves nothing.
    clock.tick(1_000)
    assert await store.webhooks.settle(row, "t1", AGAIN, b"one")
    assert (await standing(store, job_id)).due_ms == START_MS + 5_000
    assert await taken(store, "t2") == []
    clock.tick(4_000)
    (row,) = await taken(store, "t3")
    assert (row.tries, row.log) == (1, b"one")


async def test_what_is_given_back_is_untried(store: Store, clock: ManualClock) -> None:
    ids = [await ended(store) for _ in range(2)]
    rows = await taken(store, "t1")
    await store.webhooks.defer([(rows[0], 0), (rows[1], 700)], "t1")
    (row,) = await taken(store, "t2")
    assert (row.job_id, row.tries) == (ids[0], 0)
    # Said again it must not take the row from its new holder.
    await store.webhooks.defer([(rows[0], 0)], "t1")
    assert await taken(store, "t3", sender="two") == []
    clock.tick(700)
    assert [row.job_id for row in await taken(store, "t4", sender="two")] == [ids[1]]


async def test_a_retried_job_still_owes_the_callback_of_its_first_end(store: Store, clock: ManualClock) -> None:
    job_id = await ended(store, fails=True)
    clock.tick(1_000)
    await store.jobs.retry(job_id)
    clock.tick(1_000)
    (first,) = await taken(store, "t1")
    assert first.generation == 1
    assert first.end is not None
    assert (first.end.state, first.end.generation, first.end.result) == (JobState.FAILED, 1, b"partial")
    assert (first.end.ended_ms, first.end.error) == (START_MS, error("ENGINE_FAILED"))
    await run(store)
    (second,) = await taken(store, "t2")
    assert (second.generation, second.end) == (2, None)
    record = await store.jobs.get(job_id)
    assert record is not None and record.result == b"result"


async def test_the_callbacks_go_with_their_job(store: Store, clock: ManualClock) -> None:
    gone = await ended(store, fails=True)
    await store.jobs.retry(gone)
    await run(store)
    rows = await taken(store, "t1")
    clock.tick(10_000)
    kept = await ended(store)
    assert await store.jobs.purge(keep_ms=5_000) == 1
    assert not await store.webhooks.settle(rows[0], "t1", AGAIN, b"")
    assert [row.log for row in await store.webhooks.get_many(gone, [1, 2])] == [b"", b""]
    clock.tick(LEASE_MS)
    assert [row.job_id for row in await taken(store, "t2")] == [kept]
    with pytest.raises(FleetError) as caught:
        await store.webhooks.redeliver(gone, 1)
    assert caught.value.reason == "JOB_NOT_FOUND"


async def test_a_redelivery_is_due_at_once_with_a_new_round(store: Store, clock: ManualClock) -> None:
    job_id = await ended(store)
    for token in ("t1", "t2"):
        (row,) = await taken(store, token)
        await store.webhooks.settle(row, token, AGAIN, token.encode())
        clock.tick(5_000)
    (row,) = await taken(store, "t3")
    await store.webhooks.settle(row, "t3", GIVEN_UP, b"t3")
    row = await store.webhooks.redeliver(job_id, 1)
    assert (row.state, row.tries, row.log, row.ended_ms) == (DeliveryState.PENDING, 0, b"t3", None)
    assert row.due_ms == clock.now
    (row,) = await taken(store, "t4")
    assert row.tries == 0


async def test_a_redelivery_does_not_wait_for_the_schedule(store: Store) -> None:
    job_id = await ended(store)
    (row,) = await taken(store, "t1")
    await store.webhooks.settle(row, "t1", Verdict(DeliveryState.PENDING, 86_400_000), b"")
    await store.webhooks.redeliver(job_id, 1)
    assert len(await taken(store, "t2")) == 1


@pytest.mark.parametrize("verdict", [GIVEN_UP, AGAIN, DONE])
async def test_a_redelivery_of_one_under_way_begins_anew_if_it_fails(store: Store, verdict: Verdict) -> None:
    job_id = await ended(store)
    (row,) = await taken(store, "t1")
    asked = await store.webhooks.redeliver(job_id, 1)
    assert (asked.state, asked.due_ms) == (DeliveryState.PENDING, None)
    assert await taken(store, "t2", sender="two") == []
    await store.webhooks.settle(row, "t1", verdict, b"")
    again = await taken(store, "t3")
    if verdict is DONE:
        assert again == []
        assert (await standing(store, job_id)).state is DeliveryState.DELIVERED
    else:
        assert [(row.job_id, row.tries) for row in again] == [(job_id, 0)]
        assert (await standing(store, job_id)).ended_ms is None


async def test_a_keyed_redelivery_happens_once(store: Store) -> None:
    job_id = await ended(store)
    for token in ("t1", "t2"):
        row = await store.webhooks.redeliver(job_id, 1, idempotency=KEY)
        assert row.state is (DeliveryState.PENDING if token == "t1" else DeliveryState.DELIVERED)
        rows = await taken(store, token)
        assert len(rows) == (1 if token == "t1" else 0)
        for row in rows:
            await store.webhooks.settle(row, token, DONE, b"")
    with pytest.raises(FleetError) as caught:
        await store.webhooks.redeliver(
            job_id, 1, idempotency=Idempotency(KEY.owner, KEY.method, KEY.key, "another print")
        )
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_events_tell_which_ends_have_a_callback(store: Store) -> None:
    await ended(store)
    await ended(store, callback=False)
    events, _ = await store.events.read("0")
    assert [ends_with_callback(event.raw) for event in events if event.type == "job_complete"] == [True, False]
