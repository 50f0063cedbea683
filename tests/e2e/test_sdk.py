"""The SDK against a real fleet, where `tests/fundamentals` does not look: edges, limits, both clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from fleet_client import ApiError, AsyncFleetCommander, FleetCommander, WaitTimeoutError

from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until, wait_until_now

QUICK: dict[str, Any] = {"width": 64, "height": 64, "steps": 1}
LONG: dict[str, Any] = {"width": 2048, "height": 2048, "steps": 150}


@pytest.fixture
def client(fleet: FleetProcess) -> Iterator[FleetCommander]:
    with FleetCommander(fleet.url) as client:
        yield client


@pytest.fixture
async def twin(fleet: FleetProcess) -> AsyncIterator[AsyncFleetCommander]:
    async with AsyncFleetCommander(fleet.url) as twin:
        yield twin


@pytest.mark.parametrize("seed", [0, 1 << 53, (1 << 53) + 1, (1 << 64) - 1])
def test_a_seed_is_exact_on_every_road(client: FleetCommander, seed: int) -> None:
    assert client.generate_image("p", seed=seed, **QUICK).info["seed"] == seed
    receipt = client.queue_job("p", seed=seed, **QUICK)
    job = {"job_type": "image_gen", "payload": {"prompt": "p", "seed": seed, **QUICK}}
    batch = client.submit_batch([job])[0]
    for one in (receipt, batch):
        output = client.wait(one["job_id"])["result"]["outputs"][0]
        assert int(output["seed"]) == seed
        assert int(client.get_job(one["job_id"])["payload"]["seed"]) == seed


def test_a_wait_ends_at_its_limit_and_the_job_goes_on(client: FleetCommander) -> None:
    job_id = client.submit_job({"job_type": "custom", "payload": {}})["job_id"]
    with pytest.raises(WaitTimeoutError, match=r"not ended within 0\.3 s"):
        client.wait(job_id, timeout_seconds=0.3)
    assert client.get_job(job_id)["status"] == "queued"
    client.cancel_job(job_id)


async def test_a_wait_ends_at_its_limit_with_asyncio_too(twin: AsyncFleetCommander) -> None:
    job_id = (await twin.submit_job({"job_type": "custom", "payload": {}}))["job_id"]
    with pytest.raises(WaitTimeoutError):
        await twin.wait(job_id, timeout_seconds=0.3)
    await twin.cancel_job(job_id)


async def test_many_at_once(twin: AsyncFleetCommander) -> None:
    receipts = await asyncio.gather(*(twin.queue_job(f"number {n}", **QUICK) for n in range(10)))
    jobs = await asyncio.gather(*(twin.wait(receipt["job_id"]) for receipt in receipts))
    assert [job["status"] for job in jobs] == ["succeeded"] * 10


async def test_who_leaves_a_stream_leaves_no_connection(twin: AsyncFleetCommander) -> None:
    receipt = await twin.queue_job("left", **LONG)
    events = twin.watch_job(receipt["job_id"], previews=True)
    async for event in events:
        assert event["type"] == "job_update"
        break
    await events.aclose()
    assert (await twin.cancel_job(receipt["job_id"]))["status"] == "cancelled"


async def test_a_caller_who_is_cancelled_cancels_the_picture(twin: AsyncFleetCommander) -> None:
    prompt = "nobody waits for this"
    task = asyncio.create_task(twin.generate_image(prompt, **LONG))

    async def running() -> str:
        jobs = (await twin.list_jobs(status=["running"]))["jobs"]
        return next((str(job["job_id"]) for job in jobs if job["payload"]["prompt"] == prompt), "")

    job_id = await wait_until(running)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    events = [event async for event in twin.watch_job(job_id)]
    assert events[-1]["data"]["status"] == "cancelled"


def test_pages(client: FleetCommander) -> None:
    jobs = [{"job_type": "custom", "payload": {}, "target_cluster": "pages"} for _ in range(5)]
    made = [receipt["job_id"] for receipt in client.submit_batch(jobs, request_id="pages-of-the-sdk")]
    seen: list[str] = []
    token: str | None = None
    while token != "":
        page = client.list_jobs(target_cluster="pages", limit=2, page_token=token or None)
        seen += [job["job_id"] for job in page["jobs"]]
        token = page["next_page_token"]
    assert sorted(seen) == sorted(made)
    for job_id in made:
        client.cancel_job(job_id)


@pytest.mark.parametrize(
    ("method", "arguments", "status", "reason"),
    [
        ("get_job", ("nothing",), 404, "JOB_NOT_FOUND"),
        ("get_job", ("../nodes",), 400, "INVALID_PATH"),
        ("get_node", ("nothing",), 404, "NODE_NOT_FOUND"),
        ("get_output", ("nothing.png",), 404, "OUTPUT_NOT_FOUND"),
        ("get_output_metadata", ("nothing.png",), 404, "OUTPUT_NOT_FOUND"),
        ("delete_output", ("nothing.png",), 404, "OUTPUT_NOT_FOUND"),
        ("queue_job", ("",), 400, "INVALID_FIELD"),
        ("queue_job", ("p", "urgent"), 400, "INVALID_FIELD"),
    ],
)
def test_refusals(client: FleetCommander, method: str, arguments: tuple[str, ...], status: int, reason: str) -> None:
    with pytest.raises(ApiError) as refused:
        getattr(client, method)(*arguments)
    assert (refused.value.status, refused.value.reason) == (status, reason)
    assert refused.value.request_id


def test_every_other_reading(client: FleetCommander) -> None:
    client.generate_image("p", **QUICK)
    assert client.connect()["status"] == "connected"
    assert "image_gen" in str(client.capabilities())
    wait_until_now(lambda: client.status()["status"] == "ok")
    assert client.list_nodes(status=["online"])["nodes"]
    wait_until_now(lambda: client.list_heartbeats()["heartbeats"])
    # Heartbeats say what is in memory.
    wait_until_now(
        lambda: "sketch" in {one["alias_of"] or one["name"] for one in client.list_loaded_models()["models"]}
    )
    assert client.list_loras()["loras"] == []
    assert client.queue_stats()["window_seconds"] > 0
