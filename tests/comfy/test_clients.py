"""Two public clients of ComfyUI, unchanged, against the gateway: each runs a workflow and gets its picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.house import House, progress

Json = Any

SIMPLIFIED = """
import sys
from comfy_api_simplified import ComfyApiWrapper, ComfyWorkflowWrapper

api = ComfyApiWrapper(sys.argv[1])
workflow = ComfyWorkflowWrapper(sys.argv[2])
workflow.set_node_param("Sampler", "seed", 77)
pictures = api.queue_and_wait_images(workflow, "Save")
assert len(pictures) == 1, pictures
sys.stdout.buffer.write(*pictures.values())
"""


@pytest.fixture
def workflow(tmp_path: Path) -> Path:
    graph = progress(seed=3)
    graph["1"]["_meta"], graph["2"]["_meta"] = {"title": "Sampler"}, {"title": "Save"}
    file = tmp_path / "workflow.json"
    file.write_text(json.dumps(graph))
    return file


def run(*command: str, home: Path) -> bytes:
    """What a program printed; its own files stay in the test's folder."""
    environment = {**os.environ, "HOME": str(home), "DO_NOT_TRACK": "1", "NO_COLOR": "1"}
    done = subprocess.run(command, capture_output=True, timeout=150, env=environment, cwd=home, check=False)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    return done.stdout


def test_comfy_api_simplified(house: House, workflow: Path, tmp_path: Path) -> None:
    # It takes every picture that comes over its socket for a result; ComfyUI sends no previews unless it is told to.
    house.nodes["n1"].script.previews = False
    house.post("/history", {"clear": True})
    made = run(sys.executable, "-c", SIMPLIFIED, house.url, str(workflow), home=tmp_path)
    assert made.startswith(b"\x89PNG")
    (entry,) = house.get("/history").values()
    assert entry["prompt"][2]["1"]["inputs"]["seed"] == 77


def test_comfy_cli(house: House, workflow: Path, tmp_path: Path) -> None:
    comfy = str(Path(sys.executable).parent / "comfy")
    where = ("--host", "127.0.0.1", "--port", str(house.port))
    flags = ("--skip-prompt", "--no-enable-telemetry")
    said = run(comfy, *flags, "run", "--workflow", str(workflow), *where, "--wait", "--timeout", "30", home=tmp_path)
    reply: Json = json.loads(said)
    assert (reply["ok"], reply["data"]["status"]) == (True, "completed")
    assert reply["data"]["executed_node_ids"] == ["1", "2"]
    (url,) = reply["data"]["outputs"]
    assert house.http.get(url).content.startswith(b"\x89PNG")
