"""The ComfyUI engine against the replaying node: graphs, frames, progress, files, and what goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
    EngineResult,
    EngineSettings,
    InputFile,
    LoraUse,
    ModelFile,
    Task,
)
from fleet_agent.engines.comfyui.engine import ComfyUIEngine
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ANIMATEDIFF, STANDARD, VIDEO_HELPER, ComfyNode, Failure, sample

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


@pytest.fixture
def node() -> Iterator[ComfyNode]:
    with ComfyNode(checkpoints=("base.safetensors", "other.safetensors"), loras=("ink.safetensors",)) as node:
        yield node


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while _made:
        _made.pop().close()


_made: list[ComfyUIEngine] = []


def _engine(node: ComfyNode, folder: Path, **options: str) -> ComfyUIEngine:
    settings = EngineSettings(folder / "models", folder / "data", {"comfyui_url": node.url, **options})
    _made.append(ComfyUIEngine(settings))
    return _made[-1]


def _model(name: str = "base.safetensors", kind: Any = "checkpoint") -> ModelFile:
    return ModelFile(name, None, kind)


def _task(folder: Path, fields: Mapping[str, Any] = IMAGE, **more: Any) -> Task:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    given = {"job_type": "image_gen", "model": _model(), "loras": (), "seed": 2**64 - 1, **more}
    return Task(job_id=JOB, fields=dict(fields), output_folder=out, **given)


def _workflow(folder: Path, graph: Mapping[str, Any], *, watched: bool = True, **more: Any) -> Task:
    fields: dict[str, Any] = {"workflow_json": json.dumps(graph), **more.pop("fields", {})}
    if watched:
        fields["prompt"] = {"client_id": "somebody", "number": 1}
    return _task(folder, fields, model=None, **more)


def _progress_graph(**inputs: int) -> dict[str, Any]:
    [recorded] = sample("progress_history").values()
    graph: dict[str, Any] = recorded["prompt"][2]
    graph["1"]["inputs"].update(inputs)
    return graph


def _frames(recorder: Recorder) -> list[Any]:
    return [json.loads(frame)["type"] if isinstance(frame, str) else frame[:4] for frame in recorder.frames]


def _in_thread(work: Callable[[], EngineResult]) -> tuple[threading.Thread, list[Any]]:
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


def test_it_says_what_comfyui_has(node: ComfyNode, tmp_path: Path) -> None:
    info = _engine(node, tmp_path).info()
    assert (info.version, info.job_types) == ("0.3.64", ("image_gen",))
    assert info.builtin_models == ("base.safetensors", "other.safetensors")
    assert info.builtin_loras == ("ink.safetensors",)
    node.script.node_classes = {**STANDARD, **ANIMATEDIFF}
    assert _engine(node, tmp_path).info().job_types == ("image_gen", "video_gen")


def test_without_comfyui_it_says_so(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="FLEET_AGENT_COMFYUI_URL"):
        ComfyUIEngine(EngineSettings(tmp_path, tmp_path))
    node.stop()
    with pytest.raises(EngineError, match="does not answer") as raised:
        _engine(node, tmp_path).info()
    assert raised.value.retryable


def test_a_picture_from_text(node: ComfyNode, tmp_path: Path) -> None:
    recorder = Recorder()
    task = _task(tmp_path, loras=(LoraUse(_model("ink.safetensors", "lora"), 0.8),))
    result = _engine(node, tmp_path).run(task, recorder)
    [output] = result.outputs
    assert (output.content_type, output.width, output.height, output.seed) == ("image/png", 128, 64, 2**64 - 1)
    assert output.engine_file is not None
    assert output.engine_file.subfolder == "comfyui"
    assert output.engine_file.filename.startswith(JOB)
    with Image.open(output.path) as image:
        graph = json.loads(image.info["prompt"])
    sampler = next(one["inputs"] for one in graph.values() if one["class_type"] == "KSampler")
    assert (sampler["seed"], sampler["steps"], sampler["cfg"], sampler["denoise"]) == (2**64 - 1, 4, 7.5, 1.0)
    assert (sampler["sampler_name"], sampler["scheduler"]) == ("euler", "normal")
    lora = next(one["inputs"] for one in graph.values() if one["class_type"] == "LoraLoader")
    assert (lora["lora_name"], lora["strength_model"]) == ("ink.safetensors", 0.8)
    texts = [one["inputs"]["text"] for one in graph.values() if one["class_type"] == "CLIPTextEncode"]
    assert texts == ["beautiful landscape", "blurry, bad quality"]
    assert recorder.steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    # Pictures in the making, and no frames: nobody speaks ComfyUI's protocol here.
    assert [content_type for content_type, _ in recorder.previews] == ["image/jpeg"] * 4
    assert recorder.frames == []
    [call] = node.called("POST", "/prompt")
    assert call.body["prompt_id"] == JOB
    assert [one.name for one in _engine(node, tmp_path).loaded()] == []


@pytest.mark.parametrize(
    ("scheduler", "sampler", "schedule"),
    [("dpmpp_2m", "dpmpp_2m", "normal"), ("dpmpp_2m_karras", "dpmpp_2m", "karras"), ("DDIM", "ddim", "normal")],
)
def test_schedulers_by_their_usual_names(
    node: ComfyNode, tmp_path: Path, scheduler: str, sampler: str, schedule: str
) -> None:
    _engine(node, tmp_path).run(_task(tmp_path, {**IMAGE, "scheduler": scheduler}), Recorder())
    [call] = node.called("POST", "/prompt")
    inputs = next(one["inputs"] for one in call.body["prompt"].values() if one["class_type"] == "KSampler")
    assert (inputs["sampler_name"], inputs["scheduler"]) == (sampler, schedule)


def test_an_unknown_scheduler_lists_those_there_are(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"scheduler: must be one of euler, .*dpmpp_2m") as raised:
        _engine(node, tmp_path).run(_task(tmp_path, {**IMAGE, "scheduler": "no_such"}), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("INVALID_FIELD", False)


def test_a_picture_from_a_picture_and_a_mask(node: ComfyNode, tmp_path: Path) -> None:
    for name in ("init.png", "mask.png"):
        Image.new("RGB", (32, 32), (len(name), 0, 0)).save(tmp_path / name)
    inputs = {
        "input:1": (InputFile(tmp_path / "init.png", "image/png"),),
        "input:2": (InputFile(tmp_path / "mask.png", "image/png"),),
    }
    fields = {**IMAGE, "init_image": "input:1", "mask_image": "input:2", "strength": 0.5}
    _engine(node, tmp_path).run(_task(tmp_path, fields, inputs=inputs), Recorder())
    [call] = node.called("POST", "/prompt")
    kinds = [one["class_type"] for one in call.body["prompt"].values()]
    assert {"LoadImage", "LoadImageMask", "SetLatentNoiseMask", "VAEEncode"} <= set(kinds)
    sampler = next(one["inputs"] for one in call.body["prompt"].values() if one["class_type"] == "KSampler")
    assert sampler["denoise"] == 0.5
    # Brought before the prompt was.
    paths = [one.path for one in node.calls if one.method == "POST" and one.path in ("/upload/image", "/prompt")]
    assert paths == ["/upload/image", "/upload/image", "/prompt"]


@pytest.mark.parametrize("helper", [True, False])
def test_a_clip_by_animatediff(node: ComfyNode, tmp_path: Path, helper: bool) -> None:
    node.script.node_classes = {**STANDARD, **ANIMATEDIFF, **(VIDEO_HELPER if helper else {})}
    fields = {**IMAGE, "frames": 8, "fps": 4.0}
    result = _engine(node, tmp_path).run(_task(tmp_path, fields, job_type="video_gen"), Recorder())
    [output] = result.outputs
    assert output.engine_file is not None
    assert output.engine_file.subfolder == "animatediff"
    assert output.content_type == ("video/mp4" if helper else "image/webp")
    assert output.duration_seconds == (2.0 if helper else 1.0)
    [call] = node.called("POST", "/prompt")
    latent = next(one["inputs"] for one in call.body["prompt"].values() if one["class_type"] == "EmptyLatentImage")
    assert latent["batch_size"] == 8
    loader = next(
        one["inputs"] for one in call.body["prompt"].values() if one["class_type"] == "ADE_AnimateDiffLoaderGen1"
    )
    assert loader["model_name"] == "mm_sd_v15_v2.ckpt"


def test_a_workflow_passes_its_frames_on_in_their_order(node: ComfyNode, tmp_path: Path) -> None:
    recorder = Recorder()
    extra = json.dumps({"extra_pnginfo": {"workflow": {"note": "x"}}})
    task = _workflow(tmp_path, _progress_graph(step_ms=0), fields={"extra_data_json": extra})
    result = _engine(node, tmp_path).run(task, recorder)
    recorded = [frame.get("type", b"\0\0\0\4") for frame in sample("progress_meta_preview_ws")]
    assert _frames(recorder) == [kind for kind in recorded if kind not in ("status", "feature_flags")]
    assert recorder.steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.record_json is not None
    record = json.loads(result.record_json)
    assert record["status"]["status_str"] == "success"
    [file] = record["outputs"]["2"]["images"]
    assert result.outputs[0].engine_file is not None
    assert result.outputs[0].engine_file.filename == file["filename"]
    [call] = node.called("POST", "/prompt")
    assert call.body["extra_data"] == {"extra_pnginfo": {"workflow": {"note": "x"}}}


def test_a_comfyui_that_takes_no_ids_is_heard_under_ours(node: ComfyNode, tmp_path: Path) -> None:
    node.script.prompt_ids = "ignored"
    recorder = Recorder()
    result = _engine(node, tmp_path).run(_workflow(tmp_path, _progress_graph(step_ms=0)), recorder)
    assert result.outputs
    for frame in recorder.frames:
        text = frame if isinstance(frame, str) else frame[8:200].decode(errors="replace")
        assert JOB in text
    assert JOB in (result.record_json or "")


def test_a_graph_of_many_nodes_is_told_in_percent(node: ComfyNode, tmp_path: Path) -> None:
    graph = sample("chain_post_prompt")["request"]["json"]["prompt"]
    recorder = Recorder()
    _engine(node, tmp_path).run(_workflow(tmp_path, graph, watched=False), recorder)
    assert [step for step, _ in recorder.steps] == [0, 20, 40, 60, 80, 100]


def test_files_of_a_workflow_get_the_names_that_comfyui_gives(node: ComfyNode, tmp_path: Path) -> None:
    node.app.files.data["input", "sub", "in.png"] = b"another's"
    (tmp_path / "mine").write_bytes(b"mine")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "sub/in.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/in.png"}},
    }
    wanted = [{"reference": "input:1", "filename": "in.png", "subfolder": "sub", "type": "input"}]
    inputs = {"input:1": (InputFile(tmp_path / "mine", "image/png"),)}
    _engine(node, tmp_path).run(_workflow(tmp_path, graph, fields={"inputs": wanted}, inputs=inputs), Recorder())
    [call] = node.called("POST", "/prompt")
    assert call.body["prompt"]["1"]["inputs"]["image"] == "sub/in (1).png"
    assert node.app.files.data["input", "sub", "in (1).png"] == b"mine"


def test_a_graph_that_comfyui_refuses(node: ComfyNode, tmp_path: Path) -> None:
    engine = _engine(node, tmp_path)
    with pytest.raises(EngineError, match=r"blur_radius") as raised:
        engine.run(_workflow(tmp_path, sample("err_value_too_big")["request"]["json"]["prompt"]), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("INVALID_FIELD", False)
    with pytest.raises(EngineError, match=r"NoSuchNode") as raised:
        engine.run(_workflow(tmp_path, sample("err_unknown_node")["request"]["json"]["prompt"]), Recorder())
    assert raised.value.retryable
    with pytest.raises(EngineError, match=r"ckpt_name: 'gone.safetensors' not in") as raised:
        engine.run(_task(tmp_path, model=_model("gone.safetensors")), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("MODEL_NOT_FOUND", True)


def test_what_a_node_of_the_graph_raises_is_the_reason(node: ComfyNode, tmp_path: Path) -> None:
    node.script.failures["KSampler"] = [Failure("no such sigma\n", "ValueError", step=2)]
    with pytest.raises(EngineError, match=r"KSampler \(node \d+\): ValueError: no such sigma$") as raised:
        _engine(node, tmp_path).run(_task(tmp_path), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("ENGINE_FAILED", True)
    assert not node.called("POST", "/free")


def test_out_of_memory_frees_what_comfyui_holds(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"out of memory") as raised:
        _engine(node, tmp_path).run(_workflow(tmp_path, _progress_graph(step_ms=0, fail_at=3)), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("OUT_OF_MEMORY", False)
    assert raised.value.result is not None
    assert raised.value.result.record_json is not None
    assert json.loads(raised.value.result.record_json)["status"]["messages"][-1][0] == "execution_error"
    [call] = node.called("POST", "/free")
    assert call.body == {"unload_models": True, "free_memory": True}


def test_little_memory_is_freed_before_another_model_comes(node: ComfyNode, tmp_path: Path) -> None:
    engine = _engine(node, tmp_path)
    engine.run(_task(tmp_path), Recorder())
    node.script.vram_free = node.script.vram_total // 100
    engine.run(_task(tmp_path, {**IMAGE, "steps": 3}), Recorder())
    assert not node.called("POST", "/free")
    engine.run(_task(tmp_path, model=_model("other.safetensors")), Recorder())
    assert len(node.called("POST", "/free")) == 1
    engine.unload("other.safetensors")
    assert len(node.called("POST", "/free")) == 2


@pytest.mark.parametrize("hold_at", [1, 3], ids=["before the first step", "mid-run"])
def test_cancelled_it_interrupts_its_own_prompt_alone(node: ComfyNode, tmp_path: Path, hold_at: int) -> None:
    node.script.hold_at = hold_at
    recorder = Recorder(lambda done: node.script.held.is_set())
    with pytest.raises(Cancelled):
        _engine(node, tmp_path).run(_task(tmp_path), recorder)
    assert [call.body for call in node.called("POST", "/interrupt")] == [{"prompt_id": JOB}]
    assert node.app.executor.remaining == 0
    assert not list((tmp_path / "data" / "comfyui").glob("*"))


def test_cancelled_in_the_queue_it_interrupts_nobody(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 2
    httpx.post(f"{node.url}/prompt", json={"prompt": _progress_graph(), "prompt_id": "another's"})
    assert node.script.held.wait(20)
    recorder = Recorder(lambda done: len(node.app.executor.pending) == 1)
    with pytest.raises(Cancelled):
        _engine(node, tmp_path).run(_task(tmp_path), recorder)
    assert node.app.executor.remaining == 1
    assert not node.called("POST", "/interrupt")


def test_cancelled_while_its_files_come_it_leaves_none_running(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_paths = {"/view"}
    recorder = Recorder()
    thread, ended = _in_thread(lambda: _engine(node, tmp_path).run(_task(tmp_path), recorder))
    assert node.script.held.wait(20)
    recorder.cancel_when = lambda done: True
    node.script.release()
    thread.join(20)
    assert isinstance(ended[0], Cancelled)


def test_a_file_that_cannot_be_had_is_a_failure_to_try_again(node: ComfyNode, tmp_path: Path) -> None:
    node.script.refuse["/view"] = 500
    with pytest.raises(EngineError, match="has no output file") as raised:
        _engine(node, tmp_path).run(_task(tmp_path), Recorder())
    assert raised.value.retryable


def test_a_lost_socket_costs_nothing(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    recorder = Recorder()
    thread, ended = _in_thread(lambda: _engine(node, tmp_path).run(_workflow(tmp_path, _progress_graph()), recorder))
    assert node.script.held.wait(20)
    node.drop_sockets()
    recorder.wait_for(lambda: any(isinstance(f, str) and '"executing"' in f and JOB in f for f in recorder.frames[6:]))
    node.script.release()
    thread.join(20)
    assert isinstance(ended[0], EngineResult)
    assert len(node.called("POST", "/prompt")) == 1
    assert _frames(recorder)[-1] == "executing"


def test_an_end_that_nobody_heard_is_found_in_the_history(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    recorder = Recorder()
    engine = _engine(node, tmp_path)
    thread, ended = _in_thread(lambda: engine.run(_workflow(tmp_path, _progress_graph()), recorder))
    assert node.script.held.wait(20)
    # Its frames go to nobody.
    node.app.sockets.queues.clear()
    node.script.release()
    thread.join(20)
    assert isinstance(ended[0], EngineResult)


def test_a_comfyui_that_was_restarted_has_lost_the_prompt(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    thread, ended = _in_thread(lambda: _engine(node, tmp_path).run(_task(tmp_path), Recorder()))
    assert node.script.held.wait(20)
    node.stop()
    node.start()
    thread.join(20)
    assert isinstance(ended[0], EngineError)
    assert "lost the prompt" in ended[0].detail
    assert ended[0].retryable


_CRASH = """
import os, sys, threading
from pathlib import Path
from fleet_agent.engines.base import EngineSettings, ModelFile, Task
from fleet_agent.engines.comfyui.engine import ComfyUIEngine
from tests.agent.engines.helpers import Recorder
url, folder, held = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
class Dies(Recorder):
    def check(self):
        if held.exists():
            os._exit(9)
engine = ComfyUIEngine(EngineSettings(folder / "models", folder / "data", {"comfyui_url": url}))
fields = {"prompt": "x", "width": 64, "height": 64, "steps": 4, "guidance_scale": 7.5}
model = ModelFile("base.safetensors", None, "checkpoint")
engine.run(Task(sys.argv[4], "image_gen", model, (), fields, 1, folder), Dies())
"""


def test_what_a_fallen_process_left_running_is_ended_by_the_next(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 2
    held = tmp_path / "held"
    words = [sys.executable, "-c", _CRASH, node.url, str(tmp_path), str(held), "left-behind"]
    with subprocess.Popen(words, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}) as process:
        assert node.script.held.wait(20)
        held.touch()
        assert process.wait(20) == 9
    assert node.app.executor.remaining == 1
    node.script.hold_at = None
    _engine(node, tmp_path).run(_task(tmp_path), Recorder())
    assert [call.body for call in node.called("POST", "/interrupt")] == [{"prompt_id": "left-behind"}]
    assert list(node.app.executor.history) == ["left-behind", JOB]


def test_frames_of_other_prompts_are_nobodys_here(node: ComfyNode, tmp_path: Path) -> None:
    """A prompt without a client tells everybody of its progress."""
    node.script.hold_at = 2
    httpx.post(f"{node.url}/prompt", json={"prompt": _progress_graph(step_ms=0), "prompt_id": "another's"})
    assert node.script.held.wait(20)
    recorder = Recorder()
    engine = _engine(node, tmp_path)
    thread, ended = _in_thread(lambda: engine.run(_workflow(tmp_path, _progress_graph(step_ms=0, seed=9)), recorder))
    recorder.wait_for(lambda: len(node.app.executor.pending) == 1)
    node.script.release()
    thread.join(20)
    assert isinstance(ended[0], EngineResult)
    assert all(JOB in frame for frame in recorder.frames if isinstance(frame, str))
    assert recorder.steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
