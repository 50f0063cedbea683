"""From the end of a job to its receiver: each end told, signed, tried again, and never two senders at once."""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.webhook import DeliveryState, RetryPlan
from fleet_server.domain.webhook_signature import Secret, SecretBook, parse_endpoints
from fleet_server.services.callbacks import CallbackRules
from fleet_server.services.webhook_hosts import HostLimits
from fleet_server.store import HookClaims, HookRow, open_store
from tests.ports import free_port
from tests.waiting import wait_until
from tests.webhooks.patience import Patience
from tests.webhooks.receiver import How, Received, Writer, die, hang, receiving, reply
from tests.webhooks.test_post import Fixed
from tests.webhooks.works import SECRET, Works, now_ms

HOUR_MS = 3_600_000


async def state(works: Works, job_id: str, wanted: DeliveryState, generation: int = 1) -> None:
    """Returns once the callback stands so."""

    async def so() -> bool:
        return (await works.row(job_id, generation)).state is wanted

    await wait_until(so)


async def test_an_end_is_told_once_with_a_good_signature(works: Works) -> None:
    async with receiving() as receiver, works.sending():
        result = types_pb2.JobResult(outputs=[types_pb2.Output(filename="a.png", job_id="x")])
        (job_id,) = await works.ended(f"{receiver.url}?token=secret", result=result)
        await state(works, job_id, DeliveryState.DELIVERED)
    (request,) = receiver.received
    told = request.verified(SECRET.text)
    assert request.webhook_id == f"{job_id}.1"
    assert request.headers["content-type"] == "application/json"
    assert told["type"] == "job.complete"
    job = told["data"]
    assert told["timestamp"] == job["end_time"]
    assert (job["job_id"], job["status"], job["generation"]) == (job_id, "succeeded", 1)
    assert (job["payload"], job["callback_url"]) == (None, receiver.url)
    assert [output["filename"] for output in job["result"]["outputs"]] == ["a.png"]
    (attempt,) = await works.tries(job_id)
    assert (attempt.status_code, attempt.detail) == (200, "200 OK")


async def test_every_kind_of_end_is_told(works: Works) -> None:
    async with receiving() as receiver, works.sending():
        (failed,) = await works.ended(receiver.url, reason="ENGINE_FAILED")
        (cancelled,) = await works.submit(receiver.url)
        await works.store.jobs.cancel(cancelled)
        await state(works, failed, DeliveryState.DELIVERED)
        await state(works, cancelled, DeliveryState.DELIVERED)
    told = {request.webhook_id: request.verified(SECRET.text)["data"] for request in receiver.received}
    assert told[f"{failed}.1"]["error"]["reason"] == "ENGINE_FAILED"
    assert told[f"{cancelled}.1"]["status"] == "cancelled"


async def test_a_job_without_callback_tells_nobody(works: Works) -> None:
    async with receiving() as receiver, works.sending():
        silent = works.job(receiver.url)
        await works.store.jobs.submit([silent])
        await works.end()
        (loud,) = await works.ended(receiver.url)
        await state(works, loud, DeliveryState.DELIVERED)
    assert receiver.ids == [f"{loud}.1"]


@pytest.mark.parametrize("bad", [reply(500), reply(404), reply(302, Location="http://127.0.0.1:1/"), die, hang])
async def test_each_kind_of_failure_is_tried_again_with_the_same_id_and_body(
    works: Works, bad: How, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = Patience(monkeypatch)
    async with receiving() as receiver, works.sending():
        receiver.answers = [patience.hang if bad is hang else bad] * 2
        (job_id,) = await works.ended(receiver.url)
        await state(works, job_id, DeliveryState.DELIVERED)
    assert receiver.ids == [f"{job_id}.1"] * 3
    assert len({request.body for request in receiver.received}) == 1
    for request in receiver.received:
        request.verified(SECRET.text)
    assert len(await works.tries(job_id)) == 3


async def test_after_the_last_wait_it_is_given_up(works: Works) -> None:
    async with receiving() as receiver, works.sending(plan=RetryPlan((5, 5))):
        receiver.otherwise = reply(500)
        (job_id,) = await works.ended(receiver.url)
        await state(works, job_id, DeliveryState.FAILED)
    assert len(receiver.received) == 3
    assert [attempt.status_code for attempt in await works.tries(job_id)] == [500] * 3


async def test_gone_is_the_end(works: Works) -> None:
    async with receiving() as receiver, works.sending():
        receiver.otherwise = reply(410)
        (job_id,) = await works.ended(receiver.url)
        await state(works, job_id, DeliveryState.FAILED)
    assert len(receiver.received) == 1


async def test_retry_after_is_waited_for(works: Works) -> None:
    async with receiving() as receiver, works.sending():
        receiver.answers = [reply(429, Retry_After="3600"), reply(503, Retry_After="1")]
        (job_id,) = await works.ended(receiver.url)

        async def put_off() -> int | None:
            return (await works.row(job_id)).due_ms if (await works.row(job_id)).tries else None

        due = await wait_until(put_off)
        (attempt,) = await works.tries(job_id)
        assert due - attempt.time.ToMilliseconds() >= HOUR_MS
    assert len(receiver.received) == 1


async def test_a_retried_job_tells_both_of_its_ends(works: Works) -> None:
    """The first end is still told as it was, though the job has gone on since."""
    async with receiving() as receiver:
        (job_id,) = await works.ended(receiver.url, reason="ENGINE_FAILED")
        await works.store.jobs.retry(job_id)
        async with works.sending():
            await state(works, job_id, DeliveryState.DELIVERED, 1)
            await works.end()
            await state(works, job_id, DeliveryState.DELIVERED, 2)
    first, second = (request.verified(SECRET.text)["data"] for request in receiver.received)
    assert receiver.ids == [f"{job_id}.1", f"{job_id}.2"]
    assert (first["status"], first["generation"], first["error"]["reason"]) == ("failed", 1, "ENGINE_FAILED")
    assert (second["status"], second["generation"], second["error"]) == ("succeeded", 2, None)


async def test_each_receiver_gets_its_own_secret(works: Works) -> None:
    old, new = Secret(b"o" * 24), Secret(b"n" * 24)
    async with receiving() as receiver:
        base = f"http://127.0.0.1:{receiver.port}"
        book = SecretBook((SECRET,), parse_endpoints(f"{base}/own {new.text} {old.text}\n"))
        async with works.sending(book=book):
            ids = await works.ended(f"{base}/own/hook", f"{base}/owner")
            for job_id in ids:
                await state(works, job_id, DeliveryState.DELIVERED)
    by_path = {request.line.split()[1]: request for request in receiver.received}
    by_path["/own/hook"].verified(old.text)
    by_path["/own/hook"].verified(new.text)
    by_path["/owner"].verified(SECRET.text)


async def test_a_forbidden_receiver_sees_nothing_and_is_told_of(works: Works) -> None:
    rules = CallbackRules(allowed=(ipaddress.ip_network("127.0.0.2/32"),))
    async with receiving() as forbidden, works.sending(rules=rules, plan=RetryPlan((5,)), names=Fixed(["127.0.0.1"])):
        (job_id,) = await works.ended(f"http://hooks.example:{forbidden.port}/")
        await state(works, job_id, DeliveryState.FAILED)
    assert forbidden.connections == 0
    assert all("not called" in attempt.detail for attempt in await works.tries(job_id))


async def test_what_a_dead_server_left_is_sent_by_the_next(works: Works) -> None:
    """Committed, and nobody there to send it."""
    async with receiving() as receiver:
        (job_id,) = await works.ended(receiver.url)
        async with works.sending():
            await state(works, job_id, DeliveryState.DELIVERED)
    assert receiver.ids == [f"{job_id}.1"]


async def test_what_a_sender_died_with_is_sent_again(works: Works) -> None:
    """Killed while the receiver had the request: sent again once the claim is over, with the same id."""
    async with receiving() as receiver:
        receiver.answers = [hang]
        (job_id,) = await works.ended(receiver.url)
        async with works.sending(seconds=1.0, lease_seconds=2.0):
            await wait_until(lambda: receiver.received)
        async with works.sending():
            await state(works, job_id, DeliveryState.DELIVERED)
    assert receiver.ids == [f"{job_id}.1"] * 2


async def test_a_sender_that_is_shut_down_finishes_what_it_sends_and_gives_back_the_rest(works: Works) -> None:
    async with receiving() as receiver:
        go = asyncio.Event()

        async def slow(request: object, writer: asyncio.StreamWriter) -> None:
            await go.wait()
            await reply(200)(request, writer)  # type: ignore[arg-type]

        receiver.otherwise = slow
        ids = await works.ended(*[receiver.url] * 3)
        async with works.sending(limits=HostLimits(per_host=1), lease_seconds=3_600.0) as (sender,):
            await wait_until(lambda: receiver.received)
            closing = asyncio.create_task(sender.shut_down(600.0))
            await wait_until(lambda: sender.closing)
            go.set()
            await closing
        assert len(receiver.received) == 1
        async with works.sending():
            for job_id in ids:
                await state(works, job_id, DeliveryState.DELIVERED)
    assert sorted(receiver.ids) == sorted(f"{job_id}.1" for job_id in ids)


async def test_a_claim_under_way_when_a_sender_is_shut_down_is_given_back(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim, here, go = works.store.webhooks.claim, asyncio.Event(), asyncio.Event()

    async def held(*args: Any, **options: Any) -> HookClaims:
        claims = await claim(*args, **options)
        here.set()
        await go.wait()
        return claims

    async with receiving() as receiver:
        (job_id,) = await works.ended(receiver.url)
        monkeypatch.setattr(works.store.webhooks, "claim", held)
        async with works.sending(lease_seconds=3_600.0) as (sender,):
            await here.wait()
            closing = asyncio.create_task(sender.shut_down(600.0))
            await wait_until(lambda: sender.closing)
            go.set()
            await closing
        assert not receiver.received
        monkeypatch.undo()
        async with works.sending():
            await state(works, job_id, DeliveryState.DELIVERED)


async def test_an_end_wakes_the_sender(works: Works) -> None:
    """No poll comes in the time of this test, nor does another try: events alone bring it."""
    async with receiving() as receiver, works.sending(poll_seconds=3_600.0):
        for _ in range(3):
            (job_id,) = await works.ended(receiver.url)
            await state(works, job_id, DeliveryState.DELIVERED)
    assert len(receiver.ids) == 3


async def test_what_waited_too_long_is_claimed_anew_before_it_is_sent(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its claim would end in the middle of the request, and another sender would send it at the same time."""
    given_back: set[str] = set()
    defer, go = works.store.webhooks.defer, asyncio.Event()

    async def noted(rows: Sequence[tuple[HookRow, int]], token: str) -> None:
        given_back.update(row.webhook_id for row, _ in rows)
        await defer(rows, token)

    async def slow(request: Received, writer: Writer) -> None:
        await go.wait()
        await reply(200)(request, writer)

    async with receiving() as receiver:
        receiver.otherwise = slow
        ids = await works.ended(*[receiver.url] * 3)
        async with works.sending(limits=HostLimits(per_host=1, defer_seconds=0.5)) as (sender,):
            await wait_until(lambda: receiver.received)
            (receivers,) = sender._hosts._hosts.values()
            await wait_until(lambda: len(receivers.waiting) == 2)
            waited = [replace(due, until=0.0) for due in receivers.waiting]
            receivers.waiting.clear()
            receivers.waiting.extend(waited)
            monkeypatch.setattr(works.store.webhooks, "defer", noted)
            go.set()
            for job_id in ids:
                await state(works, job_id, DeliveryState.DELIVERED)
    assert given_back >= {due.row.webhook_id for due in waited}
    assert sorted(receiver.ids) == sorted(f"{job_id}.1" for job_id in ids)


@pytest.mark.timeout(180)
async def test_two_senders_never_send_the_same(works: Works) -> None:
    async with receiving() as receiver, open_store(works.url, namespace=works.namespace) as other:
        ids = await works.ended(*[receiver.url] * 80)
        async with works.sending(works.sender(), works.sender(other)):
            await works.ended(*[receiver.url] * 40)
            await wait_until(lambda: len(set(receiver.ids)) == 120, seconds=170)
            for job_id in ids:
                await state(works, job_id, DeliveryState.DELIVERED)
    assert len(receiver.ids) == 120


@pytest.mark.timeout(180)
async def test_dead_receivers_hold_up_neither_jobs_nor_others_callbacks(works: Works) -> None:
    """Three that never answer and one that is not there, fifty callbacks each, all due before those of the one who
    does answer."""
    port = free_port()
    async with (
        receiving() as healthy,
        receiving("127.0.0.1", port) as dead,
        works.sending(seconds=600.0, lease_seconds=3_600.0),
    ):
        dead.otherwise = hang
        silent = [f"http://127.0.0.{number}:{port}/" for number in (1, 2, 3, 4)] * 50
        async with receiving("127.0.0.2", port) as two, receiving("127.0.0.3", port) as three:
            two.otherwise = three.otherwise = hang
            await works.ended(*silent)
            await wait_until(lambda: (dead.open, two.open, three.open) == (8, 8, 8))
            ids = await works.ended(*[healthy.url] * 50)
            for job_id in ids:
                await state(works, job_id, DeliveryState.DELIVERED)
            # All of that while every dead receiver still kept its first callers waiting, and no more than may be.
            assert (dead.open, two.open, three.open) == (8, 8, 8)
            assert (dead.connections, two.connections, three.connections) == (8, 8, 8)


async def test_a_fault_of_ours_uses_tries_up_and_stops_nobody(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    async with receiving() as receiver, works.sending(plan=RetryPlan((5,))):
        monkeypatch.setattr("fleet_server.services.webhook_sender.callback_body", lambda *_: 1 / 0)
        (broken,) = await works.ended(receiver.url)
        await state(works, broken, DeliveryState.FAILED)
        assert "a fault of the server" in (await works.tries(broken))[0].detail
        monkeypatch.undo()
        (after,) = await works.ended(receiver.url)
        await state(works, after, DeliveryState.DELIVERED)
    assert receiver.ids == [f"{after}.1"]


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("settle", FleetError("STORE_UNAVAILABLE", "away")),
        ("claim", FleetError("STORE_UNAVAILABLE", "away")),
        ("claim", ValueError("a fault of ours")),
        ("defer", FleetError("STORE_UNAVAILABLE", "away")),
    ],
)
async def test_a_step_that_fails_is_made_good_later(
    works: Works, monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    failures, ahead_ms = [error] * 3, [0]
    async with (
        receiving() as receiver,
        open_store(works.url, namespace=works.namespace, clock=lambda: now_ms() + ahead_ms[0]) as own,
    ):
        real = getattr(own.webhooks, step)

        async def failing(*rest: object, **more: object) -> object:
            if failures:
                if step == "settle":
                    # The claim that it leaves behind is over.
                    ahead_ms[0] += 100_000
                raise failures.pop()
            return await real(*rest, **more)

        monkeypatch.setattr(own.webhooks, step, failing)
        async with works.sending(works.sender(own)):
            (job_id,) = await works.ended(receiver.url)
            await state(works, job_id, DeliveryState.DELIVERED)
    assert len(failures) < 3
    # What was sent but not written is sent again, once for each time.
    assert receiver.ids == [f"{job_id}.1"] * (4 if step == "settle" else 1)


async def test_a_store_that_is_away_for_a_while_stops_nobody(works: Works) -> None:
    """The sender outlives errors of the store."""
    async with receiving() as receiver, open_store(works.url, namespace=works.namespace) as own:
        sender = works.sender(own)
        async with works.sending(sender):
            killed = 0
            for _ in range(3):
                killed += works.cut_connections()
                (job_id,) = await works.ended(receiver.url)
                await state(works, job_id, DeliveryState.DELIVERED)
            assert killed
    for request in receiver.received:
        assert orjson.loads(request.body)
