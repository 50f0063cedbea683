"""The documented curl lines and the documented SDK example, as written but for the host.

WHERE says which test runs which line of tests/documented.py; those of containers, of the swarm and of ComfyUI are run
where such a fleet is.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import connect

from tests import documented
from tests.documented import API
from tests.e2e.fleet_process import FleetProcess, clean_environment

HERE = "e2e/test_documented_calls.py"
OUTPUTS = "e2e/test_output_calls.py::test_the_documented_life_of_an_output"
CONTAINERS = "containers/test_deploy.py::test_the_documented_lines_where_the_engine_has_gpus"
SWARM = "swarm/test_swarm.py::test_documented_lines"
COMFYUI = "comfy/test_contract.py::test_the_documented_lines"
WHERE = {
    "GENERATE": f"{HERE}::test_generate",
    "GENERATE_STATUS": f"{HERE}::test_generate",
    "CONNECT": f"{HERE}::test_connection",
    "VISION_GENERATE": f"{HERE}::test_vision",
    "VISION_JOB": f"{HERE}::test_vision",
    "QUEUE_JOB": f"{HERE}::test_queue",
    "COMFY_PROMPT": COMFYUI,
    "COMFY_QUEUE": COMFYUI,
    "COMFY_HISTORY": COMFYUI,
    "COMFY_OBJECT_INFO": COMFYUI,
    "NODES": f"{HERE}::test_nodes",
    "NODE": f"{HERE}::test_nodes",
    "VISION_NODES": f"{HERE}::test_nodes",
    "HEARTBEATS": f"{HERE}::test_nodes",
    "DEPLOY": CONTAINERS,
    "REMOVE": CONTAINERS,
    "EXEC": CONTAINERS,
    "LOGS": CONTAINERS,
    "SWARM_SERVICES": SWARM,
    "SWARM_SERVICE": SWARM,
    "SWARM_SCALE": SWARM,
    "GALLERY": f"{HERE}::test_gallery_and_outputs",
    "OUTPUT": f"{HERE}::test_gallery_and_outputs",
    "DELETE_OUTPUT": f"{HERE}::test_gallery_and_outputs",
    "MODELS": f"{HERE}::test_models",
    "LORAS": f"{HERE}::test_models",
    "LOADED": f"{HERE}::test_models",
    "OUTPUT_STATS": OUTPUTS,
    "LIST_S3": OUTPUTS,
    "LIST_LOCAL": OUTPUTS,
    "SYNC": OUTPUTS,
    "CLEANUP_DRY": OUTPUTS,
    "CLEANUP": OUTPUTS,
    "MOVE_ALL": OUTPUTS,
}
HEALTHY = {
    "status": "connected",
    "message": "Successfully connected to Fleet Commander",
    "version": "1.0.0",
    "capabilities": ["nodes", "containers", "images", "generation", "ssh", "metrics", "vision"],
}


def test_every_line_is_run_where_it_is_said() -> None:
    lines = {name for name, value in vars(documented).items() if str(value).startswith("curl ")}
    assert lines == set(WHERE)
    for name, where in WHERE.items():
        path, _, function = where.partition("::")
        tree = ast.parse((Path(__file__).parent.parent / path).read_text())
        (test,) = (one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name == function)
        assert f"documented.{name}" in {ast.unparse(one) for one in ast.walk(test) if isinstance(one, ast.Attribute)}


def reply(fleet: FleetProcess, line: str, folder: Path, **names: str) -> Any:
    return documented.reply(line, fleet.url, folder, None, **names)


def wait_for(fleet: FleetProcess, job_id: str, folder: Path) -> dict[str, Any]:
    """The job's last event."""
    lines = documented.run(f'curl "{API}/api/queue/jobs/{job_id}/events"', fleet.url, folder).splitlines()
    event = json.loads(lines[-1])
    assert event["type"] == "job_complete"
    job: dict[str, Any] = event["data"]
    return job


def test_generate(fleet: FleetProcess, tmp_path: Path) -> None:
    documented.run(documented.GENERATE, fleet.url, tmp_path)
    with Image.open(tmp_path / "image.png") as image:
        assert (image.format, image.size) == ("PNG", (1024, 1024))
        assert image.text["prompt"] == "a beautiful sunset over mountains"  # type: ignore[attr-defined]
    status = reply(fleet, documented.GENERATE_STATUS, tmp_path)
    assert status["status"] in ("ready", "busy")


def test_connection(fleet: FleetProcess, tmp_path: Path) -> None:
    assert reply(fleet, documented.CONNECT, tmp_path) == HEALTHY
    assert reply(fleet, f'curl "{API}/api/fleet/connect"', tmp_path) == HEALTHY
    assert reply(fleet, f'curl "{API}/health"', tmp_path) == {"status": "ok", "version": "1.0.0"}
    for path in ("/api/fleet/status", "/api/status"):
        assert reply(fleet, f'curl "{API}{path}"', tmp_path)["durability"] == "fsync"
    capabilities = reply(fleet, f'curl "{API}/api/fleet/capabilities"', tmp_path)
    assert capabilities["capabilities"] == HEALTHY["capabilities"]


def test_vision(fleet: FleetProcess, tmp_path: Path) -> None:
    receipt = reply(fleet, documented.VISION_GENERATE, tmp_path)
    assert receipt["status"] == "queued"
    assert receipt["target_model"] == "SDXL_4GB_FP8.safetensors"
    assert receipt["resolved_model"] == "sketch"
    job = reply(fleet, documented.VISION_JOB, tmp_path, job_id=receipt["job_id"])
    assert job["job_id"] == receipt["job_id"]
    assert wait_for(fleet, receipt["job_id"], tmp_path)["status"] == "succeeded"


def test_queue(fleet: FleetProcess, tmp_path: Path) -> None:
    job_id = reply(fleet, documented.QUEUE_JOB, tmp_path)["job_id"]
    assert reply(fleet, f'curl "{API}/api/queue/jobs/{job_id}"', tmp_path)["priority"] == "high"
    assert wait_for(fleet, job_id, tmp_path)["status"] == "succeeded"
    listed = reply(fleet, f'curl "{API}/api/queue/jobs"', tmp_path)["jobs"]
    assert job_id in [job["job_id"] for job in listed]
    assert reply(fleet, f'curl "{API}/api/queue/stats"', tmp_path)["jobs"]["succeeded"] >= 1
    batch = {"jobs": [{"job_type": "custom", "payload": {"n": n}} for n in range(3)]}
    line = f'curl -X POST "{API}/api/queue/jobs/batch" -H "Content-Type: application/json" -d '
    receipts = reply(fleet, line + f"'{json.dumps(batch)}'", tmp_path)["jobs"]
    assert [receipt["wait_reason"] for receipt in receipts] == ["NO_NODE"] * 3
    for receipt in receipts:
        line = f'curl -X DELETE "{API}/api/queue/jobs/{receipt["job_id"]}"'
        assert reply(fleet, line, tmp_path)["status"] == "cancelled"


def test_retry(fleet: FleetProcess, tmp_path: Path) -> None:
    # A job whose run is longer than it may be, without retries, fails.
    slow = {
        "job_type": "image_gen",
        "payload": {"prompt": "slow", "width": 2048, "height": 2048, "steps": 150},
        "timeout_seconds": 1,
        "max_retries": 0,
    }
    line = f'curl -X POST "{API}/api/queue/jobs" -H "Content-Type: application/json" -d '
    job_id = reply(fleet, line + f"'{json.dumps(slow)}'", tmp_path)["job_id"]
    failed = wait_for(fleet, job_id, tmp_path)
    assert (failed["status"], failed["error"]["reason"]) == ("failed", "TIMEOUT")
    again = reply(fleet, f'curl -X POST "{API}/api/queue/jobs/{job_id}/retry"', tmp_path)
    # Queued, and by the time of this answer perhaps at work again.
    assert (again["job_id"], again["generation"]) == (job_id, 2)
    assert wait_for(fleet, job_id, tmp_path)["generation"] == 2


def test_nodes(fleet: FleetProcess, tmp_path: Path) -> None:
    nodes = reply(fleet, documented.NODES, tmp_path)["nodes"]
    assert [node["status"] for node in nodes] == ["online"]
    node_id = nodes[0]["node_id"]
    assert reply(fleet, documented.NODE, tmp_path, node_id=node_id)["node_id"] == node_id
    vision = reply(fleet, documented.VISION_NODES, tmp_path)["nodes"]
    assert [node["node_id"] for node in vision] == [node_id]
    beats = reply(fleet, documented.HEARTBEATS, tmp_path)["heartbeats"]
    assert beats[0]["node_id"] == node_id
    assert beats[0]["host"]["cpu_count"] >= 1


def test_gallery_and_outputs(fleet: FleetProcess, tmp_path: Path) -> None:
    documented.run(documented.GENERATE, fleet.url, tmp_path)
    images = reply(fleet, documented.GALLERY, tmp_path)["images"]
    filename = images[0]["filename"]
    assert images[0]["metadata"]["prompt"]
    documented.run(documented.OUTPUT, fleet.url, tmp_path, filename=filename)
    assert (tmp_path / "image.png").stat().st_size == images[0]["size_bytes"]
    removed = reply(fleet, documented.DELETE_OUTPUT, tmp_path, filename=filename)
    assert removed["filename"] == filename
    left = reply(fleet, documented.GALLERY, tmp_path)["images"]
    assert filename not in [image["filename"] for image in left]


def test_models(fleet: FleetProcess, tmp_path: Path) -> None:
    models = reply(fleet, documented.MODELS, tmp_path)["models"]
    aliases = {model["name"]: model["alias_of"] for model in models}
    assert aliases["sketch"] is None
    assert aliases["SDXL_4GB_FP8.safetensors"] == "sketch"
    assert "loras" in reply(fleet, documented.LORAS, tmp_path)
    assert "models" in reply(fleet, documented.LOADED, tmp_path)


def test_websocket_events(fleet: FleetProcess, tmp_path: Path) -> None:
    with connect(f"ws://localhost:{fleet.port}/ws", open_timeout=60) as socket:
        job_id = reply(fleet, documented.VISION_GENERATE, tmp_path)["job_id"]
        seen: dict[str, Any] = {}
        while "job_complete" not in seen:
            event = json.loads(socket.recv(timeout=60))
            if event["data"].get("job_id") == job_id:
                seen[event["type"]] = event["data"]
    assert {"job_update", "job_progress", "job_complete"} <= set(seen)
    assert 0 < seen["job_progress"]["progress"] <= 100
    assert len(seen["job_complete"]["result"]["outputs"]) == 1


def test_sdk_example(fleet: FleetProcess, tmp_path: Path) -> None:
    example = (Path(__file__).parent / "sdk_example.py.txt").read_text()
    script = tmp_path / "example.py"
    script.write_text(example.replace(f'BASE_URL = "{API}"', f'BASE_URL = "{fleet.url}"'))
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=clean_environment(),
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    assert "'status': 'connected'" in done.stdout
    assert "Job ID: " in done.stdout
    with Image.open(tmp_path / "output.png") as image:
        assert image.size == (1024, 1024)
