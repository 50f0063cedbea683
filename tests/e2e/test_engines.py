"""Jobs of a fleet whose node has a ComfyUI: pictures, clips and graphs, and its slot's process killed at each point."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.comfy_node import ANIMATEDIFF, STANDARD, ComfyNode, sample
from tests.e2e.fleet_process import FleetProcess
from tests.e2e.held_upload import RETRY, end_in_upload, kept
from tests.e2e.in_s3 import keys_in_s3
from tests.waiting import wait_until_now


@pytest.fixture(scope="module")
def node() -> Iterator[ComfyNode]:
    classes = {**STANDARD, **ANIMATEDIFF}
    with ComfyNode(checkpoints=("base.safetensors",), node_classes=classes) as node:
        yield node


@pytest.fixture(scope="module")
def fleet(node: ComfyNode, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetProcess]:
    environment = {
        "FLEET_AGENT_COMFYUI_URL": node.url,
        "FLEET_ENGINES": "comfyui",
        "FLEET_S3_PORT": "0",
        **RETRY,
    }
    with FleetProcess(tmp_path_factory.mktemp("fleet") / "data", environment=environment) as fleet:
        yield fleet


@pytest.fixture
def api(fleet: FleetProcess, node: ComfyNode) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=fleet.url, timeout=60, trust_env=False) as api:
        yield api
    node.script.release()


def _submit(api: httpx.Client, payload: dict[str, Any], job_type: str = "image_gen", *, max_retries: int = 3) -> str:
    reply = api.post("/api/queue/jobs", json={"job_type": job_type, "payload": payload, "max_retries": max_retries})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["job_id"])


def _ended(api: httpx.Client, job_id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        job: dict[str, Any] = api.get(f"/api/queue/jobs/{job_id}").json()
        return job if job["status"] in ("succeeded", "failed", "cancelled") else None

    return wait_until_now(look, seconds=100)


def test_a_picture_straight_from_comfyui(api: httpx.Client) -> None:
    body = {"prompt": "a beautiful sunset", "width": 64, "height": 64, "steps": 3, "seed": 7}
    reply = api.post("/api/fleet/generate", json=body)
    assert (reply.status_code, reply.headers["x-seed"]) == (200, "7"), reply.text
    with Image.open(io.BytesIO(reply.content)) as image:
        assert image.size == (64, 64)
    [engine] = api.get("/api/nodes").json()["nodes"][0]["engines"]
    assert (engine["name"], engine["status"], engine["version"]) == ("comfyui", "ready", "0.3.64")
    [model] = api.get("/api/vision/models/available").json()["models"]
    assert (model["name"], model["job_types"]) == ("base.safetensors", ["image_gen", "video_gen"])


def test_a_clip_by_animatediff(api: httpx.Client) -> None:
    payload = {"prompt": "waves", "width": 64, "height": 64, "steps": 2, "frames": 4, "fps": 8}
    job = _ended(api, _submit(api, payload, "video_gen"))
    assert job["status"] == "succeeded", job
    [output] = job["result"]["outputs"]
    assert (output["content_type"], output["duration_seconds"]) == ("image/webp", 0.5)
    assert api.get(output["url"]).content[:4] == b"RIFF"
    assert keys_in_s3(api, [output]) == [f"fleet-outputs/animatediff/{output['filename']}"]


def test_a_graph_as_it_came(api: httpx.Client, node: ComfyNode) -> None:
    graph = sample("chain_post_prompt")["request"]["json"]["prompt"]
    job_id = _submit(api, {"workflow": graph})
    job = _ended(api, job_id)
    assert job["status"] == "succeeded", job
    assert job["payload"]["workflow"] == graph
    [output] = job["result"]["outputs"]
    assert (output["width"], output["height"]) == (512, 512)
    assert keys_in_s3(api, [output]) == [f"fleet-outputs/comfyui/{output['filename']}"]
    assert node.called("POST", "/prompt")[-1].body["prompt_id"] == job_id


def test_a_graph_that_fails_says_where(api: httpx.Client) -> None:
    [recorded] = sample("error_history").values()
    reply = api.post(
        "/api/queue/jobs",
        json={"job_type": "image_gen", "payload": {"workflow": recorded["prompt"][2]}, "max_retries": 0},
    )
    job = _ended(api, reply.json()["job_id"])
    assert (job["status"], job["error"]["reason"]) == ("failed", "OUT_OF_MEMORY")
    assert "FleetProgress (node 1)" in job["error"]["detail"]


@pytest.mark.parametrize("point", ["before the first step", "mid-run", "while its files come"])
@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_ended_at_each_point(api: httpx.Client, node: ComfyNode, fleet: FleetProcess, point: str, how: str) -> None:
    """A killed slot: the job is tried again and ComfyUI runs nothing of it. A cancelled job: neither does it."""
    if point == "while its files come":
        node.script.hold_paths = {"/view"}
    else:
        node.script.hold_at = 1 if point == "before the first step" else 2
    node.script.held.clear()
    before = len(node.called("POST", "/prompt"))
    payload = {"prompt": f"{point} {how}", "width": 64, "height": 64, "steps": 3}
    job_id = _submit(api, payload)
    wait_until_now(lambda: node.script.held.is_set() or None)
    if how == "killed":
        os.kill(fleet.slot(), signal.SIGKILL)
        # What was left running is ended before the next attempt asks for anything.
        if point != "while its files come":
            wait_until_now(lambda: len(node.called("POST", "/interrupt")) or None)
        node.script.release()
        job = _ended(api, job_id)
        assert job["status"] == "succeeded", job
        [attempt] = job["attempts"]
        assert attempt["error"]["reason"] == "ENGINE_FAILED"
        assert "signal 9" in attempt["error"]["detail"]
        assert len(node.called("POST", "/prompt")) == before + 2
    else:
        assert api.delete(f"/api/queue/jobs/{job_id}").json()["status"] == "cancelled"
        wait_until_now(lambda: api.get("/api/nodes").json()["nodes"][0]["slots_free"])
        node.script.release()
    wait_until_now(lambda: node.app.executor.remaining == 0)
    node.calls.clear()
    # The node works on, and keeps nothing of it.
    assert api.post("/api/fleet/generate", json={"prompt": "next", "width": 64, "height": 64, "steps": 1}).is_success
    wait_until_now(lambda: not kept(fleet), seconds=100)


@pytest.mark.parametrize("how", ["killed", "cancelled"])
def test_ended_while_its_picture_goes_to_the_server(
    api: httpx.Client, node: ComfyNode, fleet: FleetProcess, how: str
) -> None:
    """The engine is through with it: neither it nor ComfyUI is asked for anything again."""
    before = len(node.called("POST", "/prompt"))
    body = {"prompt": f"sent {how}", "width": 64, "height": 64, "steps": 1}
    end_in_upload(fleet, api, lambda: _submit(api, body), "image/png", how)
    assert len(node.called("POST", "/prompt")) == before + 1
    assert api.post("/api/fleet/generate", json={"prompt": "next", "width": 64, "height": 64, "steps": 1}).is_success


def test_a_comfyui_that_goes_and_comes_back(api: httpx.Client, node: ComfyNode) -> None:
    """Its jobs fail and are tried again until it is back."""
    node.stop()
    # Each wait is twice the one before: enough of them for a machine that is slow to start it again.
    job_id = _submit(api, {"prompt": "later", "width": 64, "height": 64, "steps": 1}, max_retries=10)
    wait_until_now(lambda: api.get(f"/api/queue/jobs/{job_id}").json()["attempts"])
    node.start()
    job = _ended(api, job_id)
    assert job["status"] == "succeeded", job
    assert "does not answer" in job["attempts"][0]["error"]["detail"]
