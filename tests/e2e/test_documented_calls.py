"""The documented curl lines and the documented SDK example, as written but for the host."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from websockets.sync.client import connect

from tests.e2e.fleet_process import FleetProcess, clean_environment

DOCUMENTED = "http://192.168.1.214:8765"
HEALTHY = {
    "status": "connected",
    "message": "Successfully connected to Fleet Commander",
    "version": "1.0.0",
    "capabilities": ["nodes", "containers", "images", "generation", "ssh", "metrics", "vision"],
}

GENERATE = """
curl -X POST "http://192.168.1.214:8765/api/fleet/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "a beautiful sunset over mountains",
    "negative_prompt": "blurry, bad quality",
    "width": 1024,
    "height": 1024,
    "steps": 20,
    "guidance_scale": 7.5
  }' \\
  --output image.png
"""
CONNECT = """
curl -X POST "http://192.168.1.214:8765/api/fleet/connect" \\
  -H "Content-Type: application/json" \\
  -d '{"api_key": "fleet-commander-2024"}'
"""
VISION = """
curl -X POST "http://192.168.1.214:8765/api/vision/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "cyberpunk city at night",
    "model": "SDXL_4GB_FP8.safetensors",
    "width": 1024,
    "height": 1024,
    "steps": 20,
    "priority": 0
  }'
"""
QUEUE = """
curl -X POST "http://192.168.1.214:8765/api/queue/jobs" \\
  -H "Content-Type: application/json" \\
  -d '{
    "job_type": "image_gen",
    "priority": "high",
    "payload": {
      "prompt": "beautiful landscape",
      "width": 1024,
      "height": 1024
    },
    "target_cluster": "vision",
    "callback_url": "https://your-app.com/webhook",
    "max_retries": 3,
    "timeout_seconds": 3600
  }'
"""


@pytest.fixture(autouse=True)
def _curl() -> None:
    if shutil.which("curl") is None:
        assert "CI" not in os.environ, "curl is missing: CI installs it"
        pytest.skip("curl is not installed")


def run(fleet: FleetProcess, line: str, folder: Path) -> bytes:
    """What a documented line prints; it must succeed with status 200."""
    line = line.strip().replace(DOCUMENTED, fleet.url).replace("curl ", "curl -sS -w '%{stderr}%{http_code}' ", 1)
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=folder, capture_output=True, env=clean_environment(), timeout=50
    )
    assert done.stderr == b"200", (line, done.stderr, done.stdout[:2000])
    assert done.returncode == 0
    return done.stdout


def reply(fleet: FleetProcess, line: str, folder: Path) -> Any:
    return json.loads(run(fleet, line, folder))


def wait_for(fleet: FleetProcess, job_id: str, folder: Path) -> dict[str, Any]:
    """The job's last event."""
    lines = run(fleet, f'curl "{DOCUMENTED}/api/queue/jobs/{job_id}/events"', folder).splitlines()
    event = json.loads(lines[-1])
    assert event["type"] == "job_complete"
    job: dict[str, Any] = event["data"]
    return job


def test_generate(fleet: FleetProcess, tmp_path: Path) -> None:
    run(fleet, GENERATE, tmp_path)
    with Image.open(tmp_path / "image.png") as image:
        assert (image.format, image.size) == ("PNG", (1024, 1024))
        assert image.text["prompt"] == "a beautiful sunset over mountains"  # type: ignore[attr-defined]
    status = reply(fleet, f'curl "{DOCUMENTED}/api/fleet/generate/status"', tmp_path)
    assert status["status"] in ("ready", "busy")


def test_connection(fleet: FleetProcess, tmp_path: Path) -> None:
    assert reply(fleet, CONNECT, tmp_path) == HEALTHY
    assert reply(fleet, f'curl "{DOCUMENTED}/api/fleet/connect"', tmp_path) == HEALTHY
    assert reply(fleet, f'curl "{DOCUMENTED}/health"', tmp_path) == {"status": "ok", "version": "1.0.0"}
    for path in ("/api/fleet/status", "/api/status"):
        assert reply(fleet, f'curl "{DOCUMENTED}{path}"', tmp_path)["durability"] == "fsync"
    capabilities = reply(fleet, f'curl "{DOCUMENTED}/api/fleet/capabilities"', tmp_path)
    assert capabilities["capabilities"] == HEALTHY["capabilities"]


def test_vision(fleet: FleetProcess, tmp_path: Path) -> None:
    receipt = reply(fleet, VISION, tmp_path)
    assert receipt["status"] == "queued"
    assert receipt["target_model"] == "SDXL_4GB_FP8.safetensors"
    assert receipt["resolved_model"] == "sketch"
    job = reply(fleet, f'curl "{DOCUMENTED}/api/vision/jobs/{receipt["job_id"]}"', tmp_path)
    assert job["job_id"] == receipt["job_id"]
    assert wait_for(fleet, receipt["job_id"], tmp_path)["status"] == "succeeded"


def test_queue(fleet: FleetProcess, tmp_path: Path) -> None:
    job_id = reply(fleet, QUEUE, tmp_path)["job_id"]
    assert reply(fleet, f'curl "{DOCUMENTED}/api/queue/jobs/{job_id}"', tmp_path)["priority"] == "high"
    assert wait_for(fleet, job_id, tmp_path)["status"] == "succeeded"
    listed = reply(fleet, f'curl "{DOCUMENTED}/api/queue/jobs"', tmp_path)["jobs"]
    assert job_id in [job["job_id"] for job in listed]
    assert reply(fleet, f'curl "{DOCUMENTED}/api/queue/stats"', tmp_path)["jobs"]["succeeded"] >= 1
    batch = {"jobs": [{"job_type": "custom", "payload": {"n": n}} for n in range(3)]}
    line = f'curl -X POST "{DOCUMENTED}/api/queue/jobs/batch" -H "Content-Type: application/json" -d '
    receipts = reply(fleet, line + f"'{json.dumps(batch)}'", tmp_path)["jobs"]
    assert [receipt["wait_reason"] for receipt in receipts] == ["NO_NODE"] * 3
    for receipt in receipts:
        line = f'curl -X DELETE "{DOCUMENTED}/api/queue/jobs/{receipt["job_id"]}"'
        assert reply(fleet, line, tmp_path)["status"] == "cancelled"


def test_retry(fleet: FleetProcess, tmp_path: Path) -> None:
    # A job whose run is longer than it may be, without retries, fails.
    slow = {
        "job_type": "image_gen",
        "payload": {"prompt": "slow", "width": 2048, "height": 2048, "steps": 150},
        "timeout_seconds": 1,
        "max_retries": 0,
    }
    line = f'curl -X POST "{DOCUMENTED}/api/queue/jobs" -H "Content-Type: application/json" -d '
    job_id = reply(fleet, line + f"'{json.dumps(slow)}'", tmp_path)["job_id"]
    failed = wait_for(fleet, job_id, tmp_path)
    assert (failed["status"], failed["error"]["reason"]) == ("failed", "TIMEOUT")
    again = reply(fleet, f'curl -X POST "{DOCUMENTED}/api/queue/jobs/{job_id}/retry"', tmp_path)
    assert (again["job_id"], again["status"], again["generation"]) == (job_id, "queued", 2)
    assert wait_for(fleet, job_id, tmp_path)["generation"] == 2


def test_nodes(fleet: FleetProcess, tmp_path: Path) -> None:
    nodes = reply(fleet, f'curl "{DOCUMENTED}/api/nodes"', tmp_path)["nodes"]
    assert [node["status"] for node in nodes] == ["online"]
    node_id = nodes[0]["node_id"]
    assert reply(fleet, f'curl "{DOCUMENTED}/api/nodes/{node_id}"', tmp_path)["node_id"] == node_id
    vision = reply(fleet, f'curl "{DOCUMENTED}/api/vision/nodes"', tmp_path)["nodes"]
    assert [node["node_id"] for node in vision] == [node_id]
    beats = reply(fleet, f'curl "{DOCUMENTED}/api/nodes/heartbeats"', tmp_path)["heartbeats"]
    assert beats[0]["node_id"] == node_id
    assert beats[0]["host"]["cpu_count"] >= 1


def test_gallery_and_outputs(fleet: FleetProcess, tmp_path: Path) -> None:
    run(fleet, GENERATE, tmp_path)
    images = reply(fleet, f'curl "{DOCUMENTED}/api/vision/gallery?limit=100"', tmp_path)["images"]
    filename = images[0]["filename"]
    assert images[0]["metadata"]["prompt"]
    run(fleet, f'curl "{DOCUMENTED}/api/vision/outputs/{filename}" --output copy.png', tmp_path)
    assert (tmp_path / "copy.png").stat().st_size == images[0]["size_bytes"]
    removed = reply(fleet, f'curl -X DELETE "{DOCUMENTED}/api/vision/outputs/{filename}"', tmp_path)
    assert removed["filename"] == filename
    left = reply(fleet, f'curl "{DOCUMENTED}/api/vision/gallery?limit=100"', tmp_path)["images"]
    assert filename not in [image["filename"] for image in left]


def test_models(fleet: FleetProcess, tmp_path: Path) -> None:
    models = reply(fleet, f'curl "{DOCUMENTED}/api/vision/models/available"', tmp_path)["models"]
    aliases = {model["name"]: model["alias_of"] for model in models}
    assert aliases["sketch"] is None
    assert aliases["SDXL_4GB_FP8.safetensors"] == "sketch"
    assert "loras" in reply(fleet, f'curl "{DOCUMENTED}/api/vision/loras"', tmp_path)
    assert "models" in reply(fleet, f'curl "{DOCUMENTED}/api/vision/models/loaded"', tmp_path)


def test_websocket_events(fleet: FleetProcess, tmp_path: Path) -> None:
    with connect(f"ws://localhost:{fleet.port}/ws") as socket:
        job_id = reply(fleet, VISION, tmp_path)["job_id"]
        seen: dict[str, Any] = {}
        while "job_complete" not in seen:
            event = json.loads(socket.recv(timeout=30))
            if event["data"].get("job_id") == job_id:
                seen[event["type"]] = event["data"]
    assert {"job_update", "job_progress", "job_complete"} <= set(seen)
    assert 0 < seen["job_progress"]["progress"] <= 100
    assert len(seen["job_complete"]["result"]["outputs"]) == 1


def test_sdk_example(fleet: FleetProcess, tmp_path: Path) -> None:
    example = (Path(__file__).parent / "sdk_example.py.txt").read_text()
    script = tmp_path / "example.py"
    script.write_text(example.replace(f'BASE_URL = "{DOCUMENTED}"', f'BASE_URL = "{fleet.url}"'))
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    assert "'status': 'connected'" in done.stdout
    assert "Job ID: " in done.stdout
    with Image.open(tmp_path / "output.png") as image:
        assert image.size == (1024, 1024)
