"""Training through the whole fleet: submitted by REST, run on the node's Docker engine, its files in S3."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests.container_jobs.conftest import names_of
from tests.container_jobs.held_engine import CREATE, REMOVE, START, HeldEngine
from tests.docker_daemon import IMAGE, DockerDaemon
from tests.e2e.fleet_process import FleetProcess
from tests.e2e.held_upload import RETRY, end_in_upload, kept
from tests.e2e.in_s3 import keys_in_s3
from tests.waiting import wait_until_now

# Each bears many containers, whose images are copied for each; the first an engine and a fleet besides.
pytestmark = pytest.mark.timeout(300)
PATIENCE = 150.0


@pytest.fixture(scope="module")
def held(daemon: DockerDaemon, place: Path) -> Iterator[HeldEngine]:
    """The way from the agent to its Docker engine."""
    with HeldEngine(place / "held.sock", daemon.socket) as way:
        thread = threading.Thread(target=way.serve_forever, args=(0.01,))
        thread.start()
        yield way
        way.drop()
        way.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def fleet(held: HeldEngine, place: Path) -> Iterator[FleetProcess]:
    (place / "models").mkdir()
    (place / "models" / "base").write_text("base\n")
    environment = {
        "FLEET_AGENT_DOCKER_HOST": held.url,
        "FLEET_ENGINES": "container",
        "FLEET_AGENT_MOUNT_ROOTS": str(place / "models"),
        "FLEET_AGENT_IMAGE_ROOTS": IMAGE.partition(":")[0],
        "FLEET_S3_PORT": "0",
        **RETRY,
    }
    with FleetProcess(place / "data", environment=environment) as fleet:
        yield fleet


@pytest.fixture
def api(fleet: FleetProcess, no_container_is_left: None) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api:
        yield api


def _submit(api: httpx.Client, script: str, job_type: str = "training", retries: int = 3, **payload: Any) -> str:
    body = {"image": IMAGE, "command": f"/bin/busybox sh -c '{script}'", "gpus": False, **payload}
    reply = api.post("/api/queue/jobs", json={"job_type": job_type, "payload": body, "max_retries": retries})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def _job(api: httpx.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = api.get(f"/api/queue/jobs/{job_id}").json()
    return found


def _ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job = _job(api, job_id)
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until_now(look, seconds=PATIENCE)


def _output(api: httpx.Client, job: dict[str, Any]) -> str:
    """What is in the one file of a job that has succeeded."""
    assert job["status"] == "succeeded", job
    [output] = job["result"]["outputs"]
    return api.get(output["url"]).text


def test_training_with_an_input_and_a_result(api: httpx.Client, fleet: FleetProcess, place: Path) -> None:
    """By its reference, and by where it is in S3; what comes of them lies in S3 too."""
    uploaded = api.post("/api/inputs", params={"filename": "data.txt"}, content=b"42\n").json()
    in_bucket = f"s3://fleet-workspace/inputs/{uploaded['reference'].removeprefix('input:')}"
    script = "echo FLEET_PROGRESS 0.5; cat /inputs/* /models/base >/outputs/model.txt"
    mounts = [f"{place}/models:/models:ro"]
    job = _ended(api, _submit(api, script, inputs=[uploaded["reference"], in_bucket], mounts=mounts))
    assert (job["status"], job["result"]["exit_code"], job["progress"]) == ("succeeded", 0, 100), job
    [output] = job["result"]["outputs"]
    assert output["content_type"] == "text/plain"
    assert _output(api, job) == "42\n42\nbase\n"
    [key] = keys_in_s3(api, [output])
    assert key.startswith("fleet-outputs/") and key.endswith(output["filename"])


def test_custom_names_its_engine(api: httpx.Client) -> None:
    job = _ended(api, _submit(api, "exit 3", "custom", retries=0, engine="container"))
    assert (job["status"], job["error"]["reason"], job["result"]["exit_code"]) == ("failed", "EXIT_NONZERO", 3)
    missing = api.post(
        "/api/queue/jobs",
        json={"job_type": "custom", "payload": {"engine": "container", "image": "x", "inputs": ["input:no-such"]}},
    ).json()
    assert missing["reason"] == "INPUT_NOT_FOUND"


def test_the_rules_of_deploy_hold_for_jobs(api: httpx.Client, place: Path) -> None:
    """What a deploy is refused for, a job fails for, at once and in the same words; the twin is the test above."""
    [node] = api.get("/api/nodes").json()["nodes"]
    for fields, reason in (
        ({"mounts": ["/etc:/x"]}, "MOUNT_FORBIDDEN"),
        ({"mounts": [f"{place}/models/..:/x"]}, "MOUNT_FORBIDDEN"),
        ({"image": "ghcr.io/somebody/else:1"}, "PRIVILEGE_FORBIDDEN"),
    ):
        deploy = {"node_id": node["node_id"], "name": "app", "image": IMAGE, **fields}
        said = api.post("/api/fleet/deploy", json=deploy)
        assert (said.status_code, said.json()["reason"]) == (403, reason)
        job = _ended(api, _submit(api, "true", **fields))
        assert (job["status"], job["attempt"], job["error"]["reason"]) == ("failed", 1, reason), job
        assert job["error"]["detail"] == said.json()["detail"]


# What it says depends on what an attempt before has kept; the other ends in a second attempt alone.
KEEPS = "if test -e /checkpoints/1; then echo again; else echo first; fi >/outputs/x; echo half >/checkpoints/1"
STAYS = f"test -e /checkpoints/1 && last=1; {KEEPS}; echo FLEET_PROGRESS 0.5; test $last || sleep 1000"
POINTS = {
    "before it is made": (CREATE, KEEPS, "first"),
    "before it is started": (START, KEEPS, "first"),
    "mid-run": (None, STAYS, "again"),
    "with its files collected": (REMOVE, KEEPS, "again"),
}


def _checkpoint(fleet: FleetProcess, job_id: str) -> Path:
    return fleet.folder / "agent" / "checkpoints" / job_id / "1"


@pytest.mark.parametrize("point", POINTS)
def test_a_slot_killed_at_each_point(
    api: httpx.Client, fleet: FleetProcess, held: HeldEngine, dockerd: docker.DockerClient, point: str
) -> None:
    """The job is tried again, from the checkpoint if there was one; nothing of either attempt stays at the node."""
    request, script, said = POINTS[point]
    agents = fleet.pids("fleet_agent")
    held.hold(request)
    job_id = _submit(api, script)
    if request is None:
        wait_until_now(_checkpoint(fleet, job_id).exists, seconds=PATIENCE)
    else:
        assert held.arrived.wait(PATIENCE)
    assert len(names_of(dockerd)) == (0 if request is CREATE else 1)
    os.kill(fleet.slot(), signal.SIGKILL)
    held.drop()
    job = _ended(api, job_id)
    assert _output(api, job) == f"{said}\n"
    [attempt] = job["attempts"]
    assert (attempt["error"]["reason"], "signal 9" in attempt["error"]["detail"]) == ("ENGINE_FAILED", True)
    assert set(agents) <= set(fleet.pids("fleet_agent"))
    wait_until_now(lambda: not kept(fleet), seconds=PATIENCE)
    assert not _checkpoint(fleet, job_id).exists()


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_ended_while_its_files_go_to_the_server(api: httpx.Client, fleet: FleetProcess, how: str) -> None:
    end_in_upload(fleet, api, lambda: _submit(api, KEEPS), "application/octet-stream", how)
    if how == "killed":
        assert _ended(api, _submit(api, "true"))["status"] == "succeeded"


@contextmanager
def _engine_lost(api: httpx.Client, held: HeldEngine, dockerd: docker.DockerClient, job_id: str) -> Iterator[None]:
    """The agent cannot reach its engine in the block, and the job has said so. The container stays as it is."""
    held.lose()
    try:
        [attempt] = wait_until_now(lambda: _job(api, job_id)["attempts"][:1], seconds=PATIENCE)
        assert attempt["error"]["reason"] == "DOCKER_UNAVAILABLE", attempt
        assert "the Docker engine" in attempt["error"]["detail"]
        assert names_of(dockerd) == [f"fleet-job-{job_id}"]
        yield
    finally:
        held.find()


@pytest.mark.parametrize(("when", "said"), [("while it starts", "first"), ("mid-run", "again")])
def test_the_docker_engine_is_lost(
    api: httpx.Client, fleet: FleetProcess, held: HeldEngine, dockerd: docker.DockerClient, when: str, said: str
) -> None:
    """The job is tried again until the engine is back, and goes on from its checkpoint."""
    agents = fleet.pids("fleet_agent")
    held.hold(START if when == "while it starts" else None)
    job_id = _submit(api, KEEPS if when == "while it starts" else STAYS, retries=10)
    if when == "while it starts":
        assert held.arrived.wait(PATIENCE)
    else:
        wait_until_now(lambda: _job(api, job_id)["progress"] == 50, seconds=PATIENCE)
    with _engine_lost(api, held, dockerd, job_id):
        held.drop()
    job = _ended(api, job_id)
    assert _output(api, job) == f"{said}\n"
    assert {attempt["error"]["reason"] for attempt in job["attempts"]} == {"DOCKER_UNAVAILABLE"}
    assert set(agents) <= set(fleet.pids("fleet_agent"))
    wait_until_now(lambda: not kept(fleet), seconds=PATIENCE)


def test_cancelled_while_the_docker_engine_is_away(
    api: httpx.Client, held: HeldEngine, dockerd: docker.DockerClient
) -> None:
    """Nobody can end its container then: the next job does."""
    job_id = _submit(api, STAYS, retries=10, stop_grace_seconds=0)
    wait_until_now(lambda: _job(api, job_id)["progress"] == 50, seconds=PATIENCE)
    with _engine_lost(api, held, dockerd, job_id):
        assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
    assert _ended(api, _submit(api, "true", retries=10))["status"] == "succeeded"
    assert not names_of(dockerd)


def test_a_cancelled_job_leaves_no_container(api: httpx.Client, dockerd: docker.DockerClient) -> None:
    job_id = _submit(api, "sleep 1000", stop_grace_seconds=0)
    wait_until_now(lambda: names_of(dockerd, all_=False), seconds=PATIENCE)
    assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
    wait_until_now(lambda: not names_of(dockerd), seconds=PATIENCE)
    wait_until_now(lambda: api.get("/api/nodes").json()["nodes"][0]["slots_free"], seconds=PATIENCE)
