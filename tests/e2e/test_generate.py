"""POST /api/fleet/generate is a job like any other: listed while it runs, cancelled when its caller leaves."""

from __future__ import annotations

import contextlib
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.e2e.test_crashes import until

SLOW = {"prompt": "forest", "width": 2048, "height": 2048, "steps": 150}
QUICK = {"prompt": "sea", "width": 64, "height": 64, "steps": 2}


@pytest.fixture
def client(fleet: FleetProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60) as session:
        yield session


def running(client: httpx.Client) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = client.get("/api/queue/jobs", params={"status": "running"}).json()["jobs"]
    return [job for job in jobs if job["payload"]["prompt"] == SLOW["prompt"]]


def test_it_is_listed_while_it_runs_and_cancelled_when_its_caller_leaves(
    fleet: FleetProcess, client: httpx.Client
) -> None:
    leaver = httpx.Client(base_url=fleet.url, timeout=60)

    def call() -> None:
        with leaver.stream("POST", "/api/fleet/generate", json=SLOW):
            pass

    thread = threading.Thread(target=lambda: _quietly(call))
    thread.start()
    job = until(lambda: running(client), "the generation is listed")[0]
    assert (job["job_type"], job["priority"]) == ("image_gen", "high")
    status = client.get("/api/fleet/generate/status").json()
    assert job["job_id"] in [under_way["job_id"] for under_way in status["jobs"]]
    _hang_up(leaver)
    thread.join(50)
    ended = until(lambda: _ended(client, job["job_id"]), "the job has ended")
    assert (ended["status"], ended["error"], ended["result"]["outputs"]) == ("cancelled", None, [])
    # The slot is free again.
    assert client.post("/api/fleet/generate", json=QUICK).status_code == 200


def _quietly(call: Any) -> None:
    with contextlib.suppress(httpx.HTTPError, OSError):
        call()


def _hang_up(client: httpx.Client) -> None:
    """Cuts the client's connections, as a Ctrl-C of curl does."""
    pool = client._transport._pool  # type: ignore[attr-defined]
    for connection in pool.connections:
        stream = connection._connection._network_stream
        stream.get_extra_info("socket").shutdown(2)


def _ended(client: httpx.Client, job_id: str) -> dict[str, Any] | None:
    job: dict[str, Any] = client.get(f"/api/queue/jobs/{job_id}").json()
    return job if job["end_time"] else None


def test_the_same_request_id_gives_the_same_picture(client: httpx.Client) -> None:
    first, second = (
        client.post("/api/fleet/generate", json=QUICK, headers={"Idempotency-Key": "picture-1"}) for _ in range(2)
    )
    assert first.status_code == second.status_code == 200
    assert first.headers["x-job-id"] == second.headers["x-job-id"]
    assert first.content == second.content
    other = client.post("/api/fleet/generate", json={**QUICK, "steps": 3}, headers={"Idempotency-Key": "picture-1"})
    assert (other.status_code, other.json()["reason"]) == (409, "IDEMPOTENCY_KEY_REUSED")


@pytest.mark.parametrize(
    "change",
    [{"prompt": "city"}, {"steps": 3}, {"guidance_scale": 3.0}, {"negative_prompt": "red"}, {"seed": 8}],
    ids=lambda change: next(iter(change)),
)
def test_the_same_request_and_seed_give_the_same_pixels_and_each_field_changes_them(
    client: httpx.Client, change: dict[str, Any]
) -> None:
    base = {"prompt": "sea", "width": 128, "height": 128, "steps": 4, "seed": 7}

    def pixels(body: dict[str, Any]) -> bytes:
        import io

        from PIL import Image

        response = client.post("/api/fleet/generate", json=body)
        assert response.headers["x-seed"] == str(body["seed"])
        with Image.open(io.BytesIO(response.content)) as image:
            return image.tobytes()

    assert pixels(base) == pixels(base)
    assert pixels({**base, **change}) != pixels(base)


def test_without_a_node_it_is_503_and_a_queued_one_waits() -> None:
    with (
        tempfile.TemporaryDirectory(prefix="fleet-") as folder,
        FleetProcess(Path(folder) / "data", "--no-agent") as alone,
        httpx.Client(base_url=alone.url, timeout=60) as client,
    ):
        refused = client.post("/api/fleet/generate", json=QUICK)
        assert (refused.status_code, refused.json()["reason"]) == (503, "NO_NODE")
        assert int(refused.headers["retry-after"]) >= 1
        assert client.get("/api/fleet/generate/status").json()["status"] == "unavailable"
        receipt = client.post("/api/vision/generate", json=QUICK).json()
        assert (receipt["status"], receipt["wait_reason"]) == ("queued", "NO_NODE")
        until(lambda: client.get("/api/status").json()["status"] == "degraded", "without a node it is not well")
        assert client.get("/health").json() == {"status": "ok", "version": "1.0.0"}
