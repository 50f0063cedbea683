"""The curl lines of the REST reference, each as written there, in its order; `run` runs one against a server.

They are kept by hand and never made from what is served: it is what they are checked against. Which test runs which
line, tests/e2e/test_documented_calls.py knows.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.fleet_process import clean_environment

HOST = "http://192.168.1.214"
API = f"{HOST}:8765"
COMFY = f"{HOST}:8188"
SECONDS = 150

GENERATE = """curl -X POST "http://192.168.1.214:8765/api/fleet/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "a beautiful sunset over mountains",
    "negative_prompt": "blurry, bad quality",
    "width": 1024,
    "height": 1024,
    "steps": 20,
    "guidance_scale": 7.5
  }' \\
  --output image.png"""
GENERATE_STATUS = 'curl "http://192.168.1.214:8765/api/fleet/generate/status"'
CONNECT = """curl -X POST "http://192.168.1.214:8765/api/fleet/connect" \\
  -H "Content-Type: application/json" \\
  -d '{"api_key": "fleet-commander-2024"}'"""
VISION_GENERATE = """curl -X POST "http://192.168.1.214:8765/api/vision/generate" \\
  -H "Content-Type: application/json" \\
  -d '{
    "prompt": "cyberpunk city at night",
    "model": "SDXL_4GB_FP8.safetensors",
    "width": 1024,
    "height": 1024,
    "steps": 20,
    "priority": 0
  }'"""
VISION_JOB = 'curl "http://192.168.1.214:8765/api/vision/jobs/{job_id}"'
QUEUE_JOB = """curl -X POST "http://192.168.1.214:8765/api/queue/jobs" \\
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
  }'"""
COMFY_PROMPT = """curl -X POST "http://192.168.1.214:8188/prompt" \\
  -H "Content-Type: application/json" \\
  -d '{"prompt": {...workflow_json...}}'"""
COMFY_QUEUE = 'curl "http://192.168.1.214:8188/queue"'
COMFY_HISTORY = 'curl "http://192.168.1.214:8188/history"'
COMFY_OBJECT_INFO = 'curl "http://192.168.1.214:8188/object_info"'
NODES = 'curl "http://192.168.1.214:8765/api/nodes"'
NODE = 'curl "http://192.168.1.214:8765/api/nodes/{node_id}"'
VISION_NODES = 'curl "http://192.168.1.214:8765/api/vision/nodes"'
HEARTBEATS = 'curl "http://192.168.1.214:8765/api/nodes/heartbeats"'
DEPLOY = """curl -X POST "http://192.168.1.214:8765/api/fleet/deploy" \\
  -H "Content-Type: application/json" \\
  -d '{
    "node_id": "agx0",
    "image": "192.168.1.214:5000/myapp:latest",
    "name": "myapp",
    "port": 8080,
    "host_port": 8080,
    "gpus": true,
    "mounts": ["/mnt/s3-models:/models"]
  }'"""
REMOVE = 'curl -X DELETE "http://192.168.1.214:8765/api/fleet/deploy/{node_id}/{container_name}"'
EXEC = """curl -X POST "http://192.168.1.214:8765/api/fleet/exec/{node_id}" \\
  -H "Content-Type: application/json" \\
  -d '{"command": "nvidia-smi"}'"""
LOGS = 'curl "http://192.168.1.214:8765/api/fleet/logs/{node_id}/{container_name}?tail=100"'
SWARM_SERVICES = 'curl "http://192.168.1.214:8765/api/swarm/services"'
SWARM_SERVICE = 'curl "http://192.168.1.214:8765/api/swarm/services/{service_id}"'
SWARM_SCALE = 'curl -X POST "http://192.168.1.214:8765/api/swarm/services/{service_id}/scale?replicas=4"'
GALLERY = 'curl "http://192.168.1.214:8765/api/vision/gallery?limit=100"'
OUTPUT = 'curl "http://192.168.1.214:8765/api/vision/outputs/{filename}" --output image.png'
DELETE_OUTPUT = 'curl -X DELETE "http://192.168.1.214:8765/api/vision/outputs/{filename}"'
MODELS = 'curl "http://192.168.1.214:8765/api/vision/models/available"'
LORAS = 'curl "http://192.168.1.214:8765/api/vision/loras"'
LOADED = 'curl "http://192.168.1.214:8765/api/vision/models/loaded"'
OUTPUT_STATS = 'curl "http://192.168.1.214:8765/api/outputs/stats"'
LIST_S3 = 'curl "http://192.168.1.214:8765/api/outputs/list?source=s3&limit=100"'
LIST_LOCAL = 'curl "http://192.168.1.214:8765/api/outputs/list?source=local"'
SYNC = 'curl -X POST "http://192.168.1.214:8765/api/outputs/sync"'
CLEANUP_DRY = 'curl -X POST "http://192.168.1.214:8765/api/outputs/cleanup?max_age_hours=24&dry_run=true"'
CLEANUP = 'curl -X POST "http://192.168.1.214:8765/api/outputs/cleanup?max_age_hours=24"'
MOVE_ALL = 'curl -X POST "http://192.168.1.214:8765/api/outputs/move-all-to-s3"'


def run(line: str, url: str, folder: Path, replaced: Mapping[str, str] | None = None, **names: str) -> bytes:
    """What a line prints, run in `folder`; it must end with status 200.

    As written but for its host, which becomes `url`, the variables in braces, and what is `replaced`.
    """
    if shutil.which("curl") is None:
        assert "CI" not in os.environ, "curl is missing: CI installs it"
        pytest.skip("curl is not installed")
    address = COMFY if COMFY in line else API
    told = {address: url, **{f"{{{name}}}": value for name, value in names.items()}, **(replaced or {})}
    for written, meant in told.items():
        assert written in line, f"{written} is not in {line}"
        line = line.replace(written, meant)
    line = line.replace("curl ", "curl -sS -w '%{stderr}%{http_code}' ", 1)
    done = subprocess.run(
        ["bash", "-c", line], check=False, cwd=folder, capture_output=True, env=clean_environment(), timeout=SECONDS
    )
    assert done.stderr == b"200", (line, done.stderr, done.stdout[:2000])
    assert done.returncode == 0
    return done.stdout


def reply(line: str, url: str, folder: Path, replaced: Mapping[str, str] | None = None, **names: str) -> Any:
    """The JSON that a line prints."""
    return json.loads(run(line, url, folder, replaced, **names))
