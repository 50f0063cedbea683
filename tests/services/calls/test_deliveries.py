"""The log of callbacks and asking for one again, as callers see them, over the real doors."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from fleet.v1 import queue_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.domain.webhook import Answer, RetryPlan, judge
from fleet_server.services.webhook_log import KEPT_TRIES, with_try
from fleet_server.services.webhooks import Webhooks
from tests.services.calls.desk import asked
from tests.services.calls.test_doors import Doors, doors

__all__ = ["doors"]

URL = "https://your-app.com/webhook?token=secret"


async def tried(at: Doors, answer: Answer) -> None:
    """One try of each callback that is due, as a sender would make it."""
    claims = await at.desk.store.webhooks.claim("one", answer.detail, limit=10, lease_ms=60_000)
    for row in claims.rows:
        log = with_try(row.log, answer, 1_763_805_603_000 + row.tries, 0.12)
        verdict = judge(answer, row.tries + 1, RetryPlan(waits_ms=(5_000, 0)), 0.0)
        assert await at.desk.store.webhooks.settle(row, answer.detail, verdict, log)


async def ended(at: Doors, **fields: Any) -> str:
    """A job that failed; its id."""
    if at.desk.nodes.node("agx0") is None:
        await at.desk.add_node()
    job_id = await at.desk.submit(callback_url=URL, **fields)
    await at.desk.fail(await at.desk.start())
    return job_id


async def listed(at: Doors, job_id: str, **query: Any) -> Any:
    reply = await at.web.get(f"/api/queue/jobs/{job_id}/deliveries", params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_a_delivery_is_shown_as_the_contract_says(doors: Doors) -> None:
    job_id = await ended(doors)
    job = (await doors.web.get(f"/api/queue/jobs/{job_id}")).json()
    await tried(doors, Answer(503, "503 Service Unavailable"))
    reply = await listed(doors, job_id)
    (delivery,) = reply["deliveries"]
    assert reply["next_page_token"] == ""
    next_time = delivery.pop("next_attempt_time")
    assert delivery == {
        "delivery_id": delivery["delivery_id"],
        "job_id": job_id,
        "generation": 1,
        "webhook_id": f"{job_id}.1",
        "url": "https://your-app.com/webhook",
        "status": "pending",
        "attempts": [
            {
                "time": "2025-11-22T10:00:03Z",
                "status_code": 503,
                "duration_seconds": 0.12,
                "detail": "503 Service Unavailable",
            }
        ],
        "create_time": job["end_time"],
        "end_time": None,
    }
    assert next_time > delivery["create_time"]
    assert (await doors.web.get(f"/api/vision/jobs/{job_id}/deliveries")).json()["deliveries"][0] == {
        **delivery,
        "next_attempt_time": next_time,
    }


async def test_before_its_end_and_without_callback_a_job_has_none(doors: Doors) -> None:
    await doors.desk.add_node()
    silent = await doors.desk.submit()
    await doors.desk.run_next()
    waiting = await doors.desk.submit(callback_url=URL)
    assert (await listed(doors, silent))["deliveries"] == []
    assert (await listed(doors, waiting))["deliveries"] == []


async def test_it_is_pending_before_anybody_tried_and_ends_when_delivered(doors: Doors) -> None:
    job_id = await ended(doors)
    (fresh,) = (await listed(doors, job_id))["deliveries"]
    assert (fresh["status"], fresh["attempts"]) == ("pending", [])
    assert fresh["next_attempt_time"] == fresh["create_time"]
    await tried(doors, Answer(200, "200 OK"))
    (done,) = (await listed(doors, job_id))["deliveries"]
    assert (done["status"], done["next_attempt_time"]) == ("delivered", None)
    assert datetime.fromisoformat(done["end_time"]) >= datetime.fromisoformat(done["create_time"])
    assert done["delivery_id"] == fresh["delivery_id"]


async def test_each_end_has_its_own_newest_first_and_in_pages(doors: Doors) -> None:
    job_id = await ended(doors)
    for _ in range(4):
        assert (await doors.web.post(f"/api/queue/jobs/{job_id}/retry")).status_code == 200
        await doors.desk.fail(await doors.desk.start())
    everything = (await listed(doors, job_id))["deliveries"]
    assert [one["generation"] for one in everything] == [5, 4, 3, 2, 1]
    assert len({one["delivery_id"] for one in everything}) == 5
    paged, token = [], ""
    for wanted in (2, 2, 1):
        page = await listed(doors, job_id, limit=2, page_token=token)
        assert len(page["deliveries"]) == wanted
        paged += page["deliveries"]
        token = page["next_page_token"]
    assert token == ""
    assert paged == everything
    other = await ended(doors)
    first = await listed(doors, job_id, limit=2)
    bad = await doors.web.get(
        f"/api/queue/jobs/{other}/deliveries", params={"page_token": first["next_page_token"], "limit": 2}
    )
    assert bad.json()["reason"] == "INVALID_PAGE_TOKEN"


async def test_a_redelivery_is_pending_at_once_with_the_same_ids(doors: Doors) -> None:
    job_id = await ended(doors)
    await tried(doors, Answer(410, "410 Gone"))
    (failed,) = (await listed(doors, job_id))["deliveries"]
    assert failed["status"] == "failed"
    rung = doors.desk.bell.rung
    reply = await doors.web.post(f"/api/vision/jobs/{job_id}/deliveries/{failed['delivery_id']}/redeliver")
    assert reply.status_code == 200
    again = reply.json()
    assert (again["status"], again["end_time"]) == ("pending", None)
    assert (again["webhook_id"], again["delivery_id"]) == (failed["webhook_id"], failed["delivery_id"])
    assert again["attempts"] == failed["attempts"]
    assert doors.desk.bell.rung == rung + 1
    await tried(doors, Answer(200, "200 OK"))
    (done,) = (await listed(doors, job_id))["deliveries"]
    assert [attempt["status_code"] for attempt in done["attempts"]] == [410, 200]


async def test_a_redelivery_with_a_key_happens_once(doors: Doors) -> None:
    first, second = await ended(doors), await ended(doors)
    await tried(doors, Answer(200, "200 OK"))
    paths = []
    for job_id in (first, second):
        (delivery,) = (await listed(doors, job_id))["deliveries"]
        paths.append(f"/api/queue/jobs/{job_id}/deliveries/{delivery['delivery_id']}/redeliver")
    assert (await doors.web.post(paths[0], params={"request_id": "once"})).json()["status"] == "pending"
    await tried(doors, Answer(204, "204 No Content"))
    repeated = await doors.web.post(paths[0], headers={"Idempotency-Key": "once"})
    assert (repeated.status_code, repeated.json()["status"]) == (200, "delivered")
    reused = await doors.web.post(paths[1], params={"request_id": "once"})
    assert (reused.status_code, reused.json()["reason"]) == (409, "IDEMPOTENCY_KEY_REUSED")


async def test_what_is_not_there_is_not_found(doors: Doors) -> None:
    job_id, other = await ended(doors), await ended(doors)
    (theirs,) = (await listed(doors, other))["deliveries"]
    missing = await doors.web.get("/api/queue/jobs/none/deliveries")
    assert (missing.status_code, missing.json()["reason"]) == (404, "JOB_NOT_FOUND")
    # Of another job, of no job, of an end that has not come, and the right one a millisecond off.
    (own,) = (await listed(doors, job_id))["deliveries"]
    following = own["delivery_id"][:-1] + "2"
    off = f"{int(own['delivery_id'][:8], 16) ^ 1:08x}" + own["delivery_id"][8:]
    for wrong in (theirs["delivery_id"], "none", following, off):
        reply = await doors.web.post(f"/api/queue/jobs/{job_id}/deliveries/{wrong}/redeliver")
        assert (reply.status_code, reply.json()["reason"]) == (404, "DELIVERY_NOT_FOUND"), wrong
    reply = await doors.web.post(f"/api/queue/jobs/none/deliveries/{theirs['delivery_id']}/redeliver")
    assert reply.json()["reason"] == "JOB_NOT_FOUND"


async def test_grpc_shows_the_same(doors: Doors) -> None:
    from fleet.v1 import queue_pb2

    job_id = await ended(doors)
    reply = await doors.queue.ListDeliveries(queue_pb2.ListDeliveriesRequest(job_id=job_id))
    (delivery,) = (await listed(doors, job_id))["deliveries"]
    assert reply.deliveries[0].delivery_id == delivery["delivery_id"]
    again = await doors.queue.Redeliver(queue_pb2.RedeliverRequest(job_id=job_id, delivery_id=delivery["delivery_id"]))
    assert again.delivery.webhook_id == f"{job_id}.1"


@pytest.mark.parametrize("count", [KEPT_TRIES, KEPT_TRIES + 7])
async def test_the_log_keeps_the_newest_tries(count: int) -> None:
    from fleet.v1 import types_pb2

    log = b""
    for number in range(count):
        log = with_try(log, Answer(500, str(number)), number, 0.0)
    kept = [attempt.detail for attempt in types_pb2.Delivery.FromString(log).attempts]
    assert kept == [str(number) for number in range(count)][-KEPT_TRIES:]


async def test_a_key_sends_callbacks_of_its_own_jobs_and_of_nobodys_again(doors: Doors) -> None:
    at = doors.desk
    await at.add_node()
    request = asked(queue_pb2.CreateJobRequest, job_type="image_gen", payload={"prompt": "a sea"}, callback_url=URL)
    job_id = (await at.queue.create(request, owner="ann", key=None)).job_id
    await at.fail(await at.start())
    (delivery,) = (await listed(doors, job_id))["deliveries"]
    again = queue_pb2.RedeliverRequest(job_id=job_id, delivery_id=delivery["delivery_id"])
    webhooks = Webhooks(at.store.jobs, at.store.webhooks, at.bell.wake)
    with pytest.raises(FleetError, match="another key's") as refusal:
        await webhooks.redeliver(again, owner="bob", key=None, only="bob")
    assert refusal.value.reason == "SCOPE_MISSING"
    for only in ("ann", None):
        sent = await webhooks.redeliver(again, owner="ann", key=None, only=only)
        assert sent.delivery_id == delivery["delivery_id"]
