"""Engines that ask a server on their node: their process killed, the server lost, the job cancelled at each point."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.fleet_process import FleetProcess
from tests.e2e.held_server import POINTS, WORDS, HeldServer
from tests.e2e.held_upload import RETRY, end_in_upload, kept
from tests.e2e.in_s3 import keys_in_s3
from tests.waiting import wait_until_now

Json = dict[str, Any]
JOBS: dict[str, tuple[str, Json]] = {
    "sdxl_trt": ("image_gen", {"prompt": "a sunset", "width": 128, "height": 128, "steps": 2}),
    "openai": ("llm_inference", {"messages": [{"role": "user", "content": "count"}], "max_tokens": 16}),
}


@pytest.fixture(scope="module")
def behind() -> Iterator[HeldServer]:
    """The server behind the engines."""
    with HeldServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.release()
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def fleet(behind: HeldServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    environment = {
        "FLEET_ENGINES": "sdxl_trt,openai",
        "FLEET_AGENT_SDXL_TRT_URLS": behind.url,
        "FLEET_AGENT_OPENAI_URL": behind.url,
        "FLEET_AGENT_OPTIONS": "openai_job_types=llm_inference",
        "FLEET_RETRY_BACKOFF_SECONDS": "0.1",
        "FLEET_S3_PORT": "0",
        **RETRY,
    }
    with FleetProcess(tmp_path_factory.mktemp("fleet") / "data", environment=environment) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def api(fleet: FleetProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api:
        wait_until_now(lambda: len(_node(api)["engines"]) == 2 or None)
        yield api


def _node(api: httpx.Client) -> Json:
    found: Json = api.get("/api/nodes").json()["nodes"][0]
    return found


def _submit(api: httpx.Client, engine: str) -> str:
    job_type, payload = JOBS[engine]
    reply = api.post("/api/queue/jobs", json={"job_type": job_type, "payload": payload, "max_retries": 3})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def _ended(api: httpx.Client, job_id: str) -> Json:
    def look() -> Json | None:
        job: Json = api.get(f"/api/queue/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until_now(look, seconds=100)


def _is_whole(api: httpx.Client, engine: str, job: Json) -> bool:
    """Whether the job has the one result that it should have."""
    assert job["status"] == "succeeded", job
    if engine == "openai":
        return bool(job["result"]["text"] == "".join(WORDS))
    [output] = job["result"]["outputs"]
    return bool(len(api.get(output["url"]).content) == output["size_bytes"])


@pytest.mark.parametrize("engine", JOBS)
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("how", ["killed", "server lost", "cancelled"])
def test_ended_at_each_point(
    api: httpx.Client, fleet: FleetProcess, behind: HeldServer, engine: str, point: str, how: str
) -> None:
    agents = fleet.pids("fleet_agent")
    behind.hold(point)
    job_id = _submit(api, engine)
    assert behind.arrived.wait(100)
    if how == "cancelled":
        assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
        # The engine lets go of the server, which goes on for nobody.
        wait_until_now(lambda: _node(api)["slots_free"])
        behind.release()
    elif how == "killed":
        os.kill(fleet.slot(), signal.SIGKILL)
        behind.release()
    else:
        behind.release(gone=True)
    job = _ended(api, job_id)
    if how == "cancelled":
        assert (job["status"], job["result"]["outputs"], job["result"]["text"]) == ("cancelled", [], None)
    else:
        assert _is_whole(api, engine, job)
        [attempt] = job["attempts"]
        assert attempt["error"]["reason"] == "ENGINE_FAILED"
        whose = "signal 9" if how == "killed" else "the model server" if engine == "openai" else "the SDXL-TRT worker"
        assert whose in attempt["error"]["detail"]
    # The agent lives, works on, and keeps nothing of it.
    assert set(agents) <= set(fleet.pids("fleet_agent"))
    assert _is_whole(api, engine, _ended(api, _submit(api, engine)))
    wait_until_now(lambda: not kept(fleet), seconds=100)


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_ended_while_its_picture_goes_to_the_server(api: httpx.Client, fleet: FleetProcess, how: str) -> None:
    """The engine is through with it. (A text goes with its end: there is no such moment.)"""
    end_in_upload(fleet, api, lambda: _submit(api, "sdxl_trt"), "image/png", how)
    job = _ended(api, _submit(api, "sdxl_trt"))
    assert _is_whole(api, "sdxl_trt", job)
    assert len(keys_in_s3(api, job["result"]["outputs"])) == 1
