"""Jobs that failed for good: listed by what they were and why, and run again in bulk, once each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.dead import DeadSettings
from fleet_server.store import Store
from tests.services.calls.desk import ALIAS, Desk, asked, desk_on

VIDEO: dict[str, Any] = {"job_type": "video_gen", "payload": {"prompt": "waves"}}


async def failed(desk: Desk, reason: str = "ENGINE_FAILED", *, owner: str = "", **fields: Any) -> str:
    """A job that ended so."""
    request = asked(
        queue_pb2.CreateJobRequest, **{"job_type": "image_gen", "payload": {"prompt": "a"}, "max_retries": 0, **fields}
    )
    job_id = (await desk.queue.create(request, owner=owner, key=None)).job_id
    claim = await desk.start()
    assert claim.job.job_id == job_id
    await desk.fail(claim, reason)
    return job_id


async def page(desk: Desk, **fields: Any) -> tuple[list[str], str]:
    jobs, token = await desk.dead.page(asked(queue_pb2.ListDeadRequest, **fields))
    return [job.job_id for job in jobs], token


async def redrive(
    desk: Desk, *, key: str | None = None, only: str | None = None, owner: str = "", **fields: Any
) -> queue_pb2.RedriveJobsResponse:
    request = asked(queue_pb2.RedriveJobsRequest, **fields)
    return await desk.dead.redrive(request, owner=owner, key=key, only=only)


def told(reply: queue_pb2.RedriveJobsResponse) -> tuple[int, int, list[tuple[str, str]]]:
    return reply.redriven, reply.remaining, [(one.job_id, one.reason) for one in reply.failures]


@pytest.fixture
async def nodes(desk: Desk) -> None:
    await desk.add_node(job_types=[types_pb2.JOB_TYPE_IMAGE_GEN, types_pb2.JOB_TYPE_VIDEO_GEN])


@pytest.mark.usefixtures("nodes")
async def test_the_newest_end_comes_first_and_filters_combine(desk: Desk) -> None:
    broken = await failed(desk)
    memory = await failed(desk, "OUT_OF_MEMORY")
    video = await failed(desk, "OUT_OF_MEMORY", **VIDEO)
    other = await failed(desk, target_cluster="vision", payload={"prompt": "x", "model": "sketch"})
    await desk.submit()
    await desk.run_next()
    assert await page(desk) == ([other, video, memory, broken], "")
    assert (await page(desk, reason="OUT_OF_MEMORY"))[0] == [video, memory]
    assert (await page(desk, job_type="video_gen"))[0] == [video]
    assert (await page(desk, job_type="video_gen", reason="TIMEOUT"))[0] == []
    assert (await page(desk, target_cluster="llm"))[0] == []
    # A model is found by the name that was asked for and by what runs it.
    assert (await page(desk, target_model=ALIAS))[0] == [memory, broken]
    assert (await page(desk, target_model="sketch"))[0] == [other, memory, broken]
    jobs, _ = await desk.dead.page(asked(queue_pb2.ListDeadRequest, reason="OUT_OF_MEMORY", limit=1))
    assert jobs[0].error.reason == "OUT_OF_MEMORY" and jobs[0].HasField("payload")


@pytest.mark.usefixtures("nodes")
async def test_pages_meet_and_a_token_belongs_to_its_filters(desk: Desk) -> None:
    ids = [await failed(desk) for _ in range(5)]
    seen: list[str] = []
    token = ""
    while True:
        found, token = await page(desk, limit=2, page_token=token)
        seen += found
        if not token:
            break
        with pytest.raises(FleetError) as caught:
            await page(desk, limit=2, page_token=token, reason="TIMEOUT")
        assert caught.value.reason == "INVALID_PAGE_TOKEN"
    assert seen == ids[::-1]


async def test_a_page_looks_at_a_bounded_number_of_jobs(store: Store, tmp_path: Any) -> None:
    async with desk_on(store, tmp_path, dead=DeadSettings(examined=2, chunk=1)) as desk:
        await desk.add_node()
        wanted = await failed(desk, "TIMEOUT")
        for _ in range(4):
            await failed(desk)
        looked: list[list[str]] = []
        token = ""
        while not looked or token:
            found, token = await page(desk, reason="TIMEOUT", page_token=token)
            looked.append(found)
        assert [wanted] in looked and len(looked) > 1


@pytest.mark.usefixtures("nodes")
async def test_jobs_are_run_again_by_their_ids(desk: Desk) -> None:
    first, second = await failed(desk), await failed(desk)
    ended = await desk.submit()
    await desk.run_next()
    rung = desk.bell.rung
    reply = await redrive(desk, job_ids=[first, "nobody", ended, first])
    assert told(reply) == (1, 0, [("nobody", "JOB_NOT_FOUND"), (ended, "JOB_NOT_FAILED")])
    assert desk.bell.rung > rung
    job = await desk.queue.get(first)
    assert (job.status, job.generation, job.attempt) == (types_pb2.JOB_STATUS_QUEUED, 2, 0)
    assert (await page(desk))[0] == [second]
    assert told(await redrive(desk, job_ids=[second, first], limit=1)) == (1, 1, [])


@pytest.mark.usefixtures("nodes")
async def test_jobs_are_run_again_by_filters_the_newest_first_up_to_the_limit(desk: Desk) -> None:
    ids = [await failed(desk, "OUT_OF_MEMORY") for _ in range(5)]
    other = await failed(desk)
    assert told(await redrive(desk, reason="OUT_OF_MEMORY", limit=3)) == (3, 2, [])
    assert set((await page(desk))[0]) == {other, *ids[:2]}
    assert told(await redrive(desk, target_model=ALIAS)) == (3, 0, [])
    assert told(await redrive(desk, job_type="image_gen")) == (0, 0, [])


async def test_ids_or_filters_are_needed(desk: Desk) -> None:
    with pytest.raises(FleetError, match=r"^job_ids: ") as caught:
        await redrive(desk, limit=5)
    assert caught.value.reason == "INVALID_FIELD"


@pytest.mark.usefixtures("nodes")
@pytest.mark.parametrize(
    "filters", [{"reason": "OUT_OF_MEMORY"}, {"target_cluster": "vision", "reason": "OUT_OF_MEMORY"},
                {"job_type": "image_gen", "target_model": ALIAS, "reason": "OUT_OF_MEMORY"}],
)  # fmt: skip
async def test_of_the_jobs_named_those_that_fit(desk: Desk, filters: dict[str, Any]) -> None:
    wanted, other = await failed(desk, "OUT_OF_MEMORY"), await failed(desk)
    unnamed = await failed(desk, "OUT_OF_MEMORY")
    reply = await redrive(desk, job_ids=[wanted, other, "nobody"], **filters)
    assert told(reply) == (1, 0, [("nobody", "JOB_NOT_FOUND")])
    assert set((await page(desk))[0]) == {other, unnamed}
    for nothing in ({"job_type": "video_gen"}, {"target_cluster": "llm"}, {"target_model": "none"}):
        assert told(await redrive(desk, job_ids=[other], **nothing)) == (0, 0, [])


@pytest.mark.usefixtures("nodes")
async def test_the_same_request_id_redrives_once(desk: Desk) -> None:
    for _ in range(3):
        await failed(desk)
    fields: dict[str, Any] = {"reason": "ENGINE_FAILED", "limit": 1, "request_id": "r1"}
    replies = await asyncio.gather(*(redrive(desk, key="r1", **fields) for _ in range(4)))
    assert [told(reply) for reply in replies] == [(1, 2, [])] * 4
    assert len((await page(desk))[0]) == 2
    with pytest.raises(FleetError) as caught:
        await redrive(desk, key="r1", reason="ENGINE_FAILED", limit=2)
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
    # Another caller's key is another key; without one each call counts.
    assert told(await redrive(desk, key="r1", owner="bob", reason="ENGINE_FAILED", limit=1)) == (1, 1, [])
    assert told(await redrive(desk, reason="ENGINE_FAILED")) == (1, 0, [])


@pytest.mark.usefixtures("nodes")
async def test_an_ordinary_key_runs_again_its_own_jobs_alone(desk: Desk) -> None:
    anns, bobs, nobodys = await failed(desk, owner="ann"), await failed(desk, owner="bob"), await failed(desk)
    assert told(await redrive(desk, only="bob", job_ids=[anns])) == (0, 0, [(anns, "SCOPE_MISSING")])
    # Before there were keys jobs were everybody's.
    assert told(await redrive(desk, only="bob", reason="ENGINE_FAILED")) == (2, 0, [])
    assert (await page(desk))[0] == [anns]
    assert (await desk.record(bobs)).generation == (await desk.record(nobodys)).generation == 2
    with pytest.raises(FleetError) as caught:
        await desk.queue.retry(asked(queue_pb2.RetryJobRequest, job_id=anns), owner="bob", key=None, only="bob")
    assert caught.value.reason == "SCOPE_MISSING"
    with pytest.raises(FleetError) as caught:
        await desk.queue.cancel(anns, only="bob")
    assert caught.value.reason == "SCOPE_MISSING"
    await desk.queue.retry(asked(queue_pb2.RetryJobRequest, job_id=anns), owner="ann", key=None, only="ann")
    assert (await desk.queue.cancel(anns, only="ann")).status == types_pb2.JOB_STATUS_CANCELLED
