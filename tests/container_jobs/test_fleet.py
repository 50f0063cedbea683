"""Training through the whole fleet: submitted by REST, run on the node's Docker engine, its files in the gallery."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import psutil
import pytest

from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FleetProcess
from tests.waiting import wait_until_now


@pytest.fixture(scope="module")
def fleet(daemon: DockerDaemon, place: Path) -> Iterator[FleetProcess]:
    environment = {"FLEET_AGENT_DOCKER_HOST": daemon.url, "FLEET_ENGINES": "container"}
    with FleetProcess(place / "data", environment=environment) as fleet:
        yield fleet


@pytest.fixture
def api(fleet: FleetProcess, no_container_is_left: None) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=30, trust_env=False) as api:
        yield api


def _submit(api: httpx.Client, script: str, job_type: str = "training", **payload: Any) -> str:
    body = {"image": IMAGE, "command": f"/bin/busybox sh -c '{script}'", "gpus": False, **payload}
    reply = api.post("/api/queue/jobs", json={"job_type": job_type, "payload": body})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def _job(api: httpx.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/api/queue/jobs/{job_id}").json()
    return found


def _ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job = _job(api, job_id)
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until_now(look, seconds=40)


def test_training_with_an_input_and_a_result(api: httpx.Client) -> None:
    uploaded = api.post("/api/inputs", params={"filename": "data.txt"}, content=b"42\n").json()
    script = "echo FLEET_PROGRESS 0.5; cat /inputs/data.txt >/outputs/model.txt"
    job = _ended(api, _submit(api, script, inputs=[uploaded["reference"]]))
    assert (job["status"], job["result"]["exit_code"], job["progress"]) == ("succeeded", 0, 100), job
    [output] = job["result"]["outputs"]
    assert output["content_type"] == "text/plain"
    assert api.get(output["url"]).text == "42\n"


def test_custom_names_its_engine(api: httpx.Client) -> None:
    job = _ended(api, _submit(api, "exit 3", "custom", engine="container"))
    assert (job["status"], job["error"]["reason"], job["result"]["exit_code"]) == ("failed", "EXIT_NONZERO", 3)
    missing = api.post(
        "/api/queue/jobs",
        json={"job_type": "custom", "payload": {"engine": "container", "image": "x", "inputs": ["input:no-such"]}},
    ).json()
    assert missing["reason"] == "INPUT_NOT_FOUND"


def test_a_killed_slot_goes_on_from_its_checkpoint(
    api: httpx.Client, fleet: FleetProcess, dockerd: docker.DockerClient
) -> None:
    script = (
        "if test -e /checkpoints/1; then cp /checkpoints/1 /outputs/; else echo half >/checkpoints/1; sleep 1000; fi"
    )
    job_id = _submit(api, script)
    kept = fleet.folder / "agent" / "checkpoints" / job_id / "1"
    wait_until_now(lambda: kept.exists() or None)
    children = psutil.Process(fleet.pid).children(recursive=True)
    [slot] = [one.pid for one in children if "fleet_agent.slot" in one.cmdline() and "--describe" not in one.cmdline()]
    os.kill(slot, signal.SIGKILL)
    job = _ended(api, job_id)
    assert job["status"] == "succeeded", job
    assert "signal 9" in job["attempts"][0]["error"]["detail"]
    assert api.get(job["result"]["outputs"][0]["url"]).text == "half\n"
    assert not kept.exists()


def test_a_cancelled_job_leaves_no_container(api: httpx.Client, dockerd: docker.DockerClient) -> None:
    job_id = _submit(api, "sleep 1000", stop_grace_seconds=0)
    wait_until_now(lambda: dockerd.containers.list() or None)
    assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
    wait_until_now(lambda: not dockerd.containers.list(all=True) or None)
    wait_until_now(lambda: api.get("/api/nodes").json()["nodes"][0]["slots_free"])
