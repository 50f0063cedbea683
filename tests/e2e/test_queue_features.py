"""Dependencies, groups, pauses, the dead list and exclusive jobs, on a whole fleet through its REST doors."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until

SMALL: dict[str, Any] = {"prompt": "a red barn by a lake", "width": 128, "height": 128, "steps": 4, "seed": 11}
ENDED = ("succeeded", "failed", "cancelled")
Json = dict[str, Any]


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A fleet of its own: its pauses would stop the jobs of others."""
    with tempfile.TemporaryDirectory(prefix="fleet-") as folder:
        data = Path(folder) / "data"
        with FleetProcess(data, "--agent-slots", "2") as fleet, httpx.Client(base_url=fleet.url, timeout=60) as session:
            yield session


def soon(check: Callable[[], Any]) -> Any:
    """Waits for it, in a test that is no coroutine."""
    return asyncio.run(wait_until(check))


def submit(client: httpx.Client, **fields: Any) -> str:
    reply = client.post("/api/queue/jobs", json={"job_type": "image_gen", "payload": SMALL, **fields})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def get(client: httpx.Client, job_id: str) -> Json:
    job: Json = client.get(f"/api/queue/jobs/{job_id}").json()
    return job


def end_of(client: httpx.Client, job_id: str) -> Json:
    return soon(lambda: job if (job := get(client, job_id))["status"] in ENDED else None)  # type: ignore[no-any-return]


def pixels(client: httpx.Client, output: Json) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = client.get(output["url"])
    assert data.status_code == 200
    return np.asarray(Image.open(io.BytesIO(data.content)))


def test_generate_then_upscale(client: httpx.Client) -> None:
    parent = submit(client)
    reference = f"job:{parent}"
    bigger = {**SMALL, "width": 256, "height": 256, "init_image": reference, "strength": 0}
    child = submit(client, after=[parent], payload=bigger)
    done = end_of(client, child)
    assert done["status"] == "succeeded", done["error"]
    assert (done["after"], done["payload"]["init_image"]) == ([parent], reference)
    (first,) = get(client, parent)["result"]["outputs"]
    (second,) = done["result"]["outputs"]
    assert (second["width"], second["height"]) == (256, 256)
    small, large = pixels(client, first), pixels(client, second)
    scaled = np.asarray(Image.fromarray(small).resize((256, 256), Image.Resampling.LANCZOS))
    assert np.array_equal(large, scaled)
    # An output of the gallery serves as well, in the call that waits too.
    named = {**SMALL, "init_image": f"output:{first['filename']}", "strength": 0}
    direct = client.post("/api/fleet/generate", json=named)
    assert direct.status_code == 200
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(direct.content))), small)


def test_a_failed_parent_cancels_and_an_unknown_one_is_named(client: httpx.Client) -> None:
    parent = submit(client, payload={**SMALL, "scheduler": "nonesuch"}, max_retries=0)
    child = submit(client, after=[parent])
    assert end_of(client, parent)["error"]["reason"] == "INVALID_FIELD"
    assert end_of(client, child)["status"] == "cancelled"
    reply = client.post("/api/queue/jobs", json={"job_type": "image_gen", "payload": SMALL, "after": [parent, "no"]})
    assert (reply.status_code, reply.json()["reason"]) == (404, "JOB_NOT_FOUND")
    assert reply.json()["violations"][0]["field"] == "after[1]"


def test_a_group_is_several_pictures_of_one_request(client: httpx.Client) -> None:
    receipt = client.post("/api/vision/generate", json={**SMALL, "n": 3}).json()
    assert receipt["queue_position"] is None
    with client.stream("GET", f"/api/queue/jobs/{receipt['job_id']}/events") as stream:
        events = [line for line in stream.iter_lines() if line]
    assert '"job_complete"' in events[-1] and f'"job_id":"{receipt["job_id"]}"' in events[-1].replace(" ", "")
    group = get(client, receipt["job_id"])
    assert (group["status"], group["progress"]) == ("succeeded", 100)
    assert [output["seed"] for output in group["result"]["outputs"]] == [11, 12, 13]
    assert len({output["filename"] for output in group["result"]["outputs"]}) == 3
    images = client.get("/api/queue/jobs", params={"group_job_id": group["job_id"]}).json()["jobs"]
    assert [image["job_id"] for image in images[::-1]] == group["child_job_ids"]
    assert {image["group_job_id"] for image in images} == {group["job_id"]}
    plain = [job["job_id"] for job in client.get("/api/queue/jobs").json()["jobs"]]
    assert group["job_id"] in plain and not set(group["child_job_ids"]) & set(plain)
    # Each picture is what its seed makes alone.
    alone = end_of(client, submit(client, payload={**SMALL, "seed": 12}))["result"]["outputs"][0]
    assert np.array_equal(pixels(client, alone), pixels(client, group["result"]["outputs"][1]))


def test_a_pause_holds_back_and_a_resume_lets_go(client: httpx.Client) -> None:
    paused = client.post("/api/queue/pause", json={"job_type": "image_gen"}).json()
    assert [(pause["target_cluster"], pause["job_type"], pause["priority"]) for pause in paused["pauses"]] == [
        (None, "image_gen", None)
    ]
    job_id = submit(client)
    assert get(client, job_id)["wait_reason"] == "PAUSED"
    stats = client.get("/api/queue/stats").json()
    assert [lane["paused"] for lane in stats["lanes"]] == [True] and stats["pauses"] == paused["pauses"]
    wrong = client.post("/api/queue/resume", json={"priority": "low"})
    assert (wrong.status_code, wrong.json()["reason"]) == (404, "PAUSE_NOT_FOUND")
    assert get(client, job_id)["status"] == "queued"
    assert client.post("/api/queue/resume", json={"job_type": "image_gen"}).json() == {"pauses": []}
    assert end_of(client, job_id)["status"] == "succeeded"


def test_dead_jobs_are_listed_and_run_again(client: httpx.Client) -> None:
    bad = [submit(client, payload={**SMALL, "scheduler": "none"}, max_retries=0) for _ in range(2)]
    for job_id in bad:
        end_of(client, job_id)
    listed = client.get("/api/queue/dead", params={"reason": "INVALID_FIELD"}).json()
    assert set(bad) <= {job["job_id"] for job in listed["jobs"]}
    body = {"job_ids": [*bad, "nobody"], "request_id": "again"}
    first, second = (client.post("/api/queue/dead/redrive", json=body).json() for _ in range(2))
    assert first == second
    assert (first["redriven"], first["remaining"]) == (2, 0)
    assert [(one["job_id"], one["reason"]) for one in first["failures"]] == [("nobody", "JOB_NOT_FOUND")]
    assert [end_of(client, job_id)["generation"] for job_id in bad] == [2, 2]


def test_an_exclusive_job_runs_like_any_other(client: httpx.Client) -> None:
    job = end_of(client, submit(client, exclusive=True))
    assert (job["status"], job["exclusive"]) == ("succeeded", True)


def test_what_never_starts_ends_by_its_ttl(client: httpx.Client) -> None:
    receipt = client.post(
        "/api/queue/jobs", json={"job_type": "transcription", "payload": {"audio": "job:x"}, "after": ["x"]}
    )
    assert receipt.status_code == 404
    chat: Json = {"job_type": "llm_inference", "payload": {"prompt": "hi"}}
    job_id = submit(client, **chat)
    waiting = get(client, job_id)
    assert (waiting["wait_reason"], waiting["queue_position"]) == ("NO_NODE", None)
    client.delete(f"/api/queue/jobs/{job_id}")
    ended = end_of(client, submit(client, **chat, queue_ttl_seconds=1))
    assert (ended["status"], ended["error"]["reason"]) == ("failed", "QUEUE_TTL_EXPIRED")
