"""Engines for the replaying node, and tasks for them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleet_agent.engines.base import (
    EngineResult,
    EngineSettings,
    ModelFile,
    Task,
)
from fleet_agent.engines.comfyui.engine import ComfyUIEngine
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ComfyNode, sample

JOB = "0198f2c4-7a1e-7c3b-9d52-3f0e8a6b1c2d"
IMAGE: Mapping[str, Any] = {
    "prompt": "beautiful landscape",
    "negative_prompt": "blurry, bad quality",
    "width": 128,
    "height": 64,
    "steps": 4,
    "guidance_scale": 7.5,
    "strength": 0.75,
}

made: list[ComfyUIEngine] = []
"""What the test that runs has made; closed after it."""


def make_engine(node: ComfyNode, folder: Path, **options: str) -> ComfyUIEngine:
    settings = EngineSettings(folder / "models", folder / "data", {"comfyui_url": node.url, **options})
    made.append(ComfyUIEngine(settings))
    return made[-1]


def model_file(name: str = "base.safetensors", kind: Any = "checkpoint") -> ModelFile:
    return ModelFile(name, None, kind)


def image_task(folder: Path, fields: Mapping[str, Any] = IMAGE, **more: Any) -> Task:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    given = {"job_type": "image_gen", "model": model_file(), "loras": (), "seed": 2**64 - 1, **more}
    return Task(job_id=JOB, fields=dict(fields), output_folder=out, **given)


def workflow_task(folder: Path, graph: Mapping[str, Any], *, watched: bool = True, **more: Any) -> Task:
    fields: dict[str, Any] = {"workflow_json": json.dumps(graph), **more.pop("fields", {})}
    if watched:
        fields["prompt"] = {"client_id": "somebody", "number": 1}
    return image_task(folder, fields, model=None, **more)


def progress_graph(**inputs: int) -> dict[str, Any]:
    [recorded] = sample("progress_history").values()
    graph: dict[str, Any] = recorded["prompt"][2]
    graph["1"]["inputs"].update(inputs)
    return graph


def frame_kinds(recorder: Recorder) -> list[Any]:
    return [json.loads(frame)["type"] if isinstance(frame, str) else frame[:4] for frame in recorder.frames]


def in_thread(work: Callable[[], EngineResult]) -> tuple[threading.Thread, list[Any]]:
    """Runs it beside the test; what it returned or raised."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(work())
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, ended
