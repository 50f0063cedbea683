"""The ComfyUI engine's own graphs: pictures and clips from the fields of a job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fleet_agent.engines.base import (
    EngineError,
    EngineSettings,
    InputFile,
    LoraUse,
)
from fleet_agent.engines.comfyui.engine import ComfyUIEngine
from tests.agent.engines.comfyui.making import (
    IMAGE,
    JOB,
    image_task,
    make_engine,
    model_file,
)
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ANIMATEDIFF, STANDARD, VIDEO_HELPER, ComfyNode


def test_it_says_what_comfyui_has(node: ComfyNode, tmp_path: Path) -> None:
    info = make_engine(node, tmp_path).info()
    assert (info.version, info.job_types) == ("0.3.64", ("image_gen",))
    assert info.builtin_models == ("base.safetensors", "other.safetensors")
    assert info.builtin_loras == ("ink.safetensors",)
    node.script.node_classes = {**STANDARD, **ANIMATEDIFF}
    assert make_engine(node, tmp_path).info().job_types == ("image_gen", "video_gen")


def test_without_comfyui_it_says_so(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="FLEET_AGENT_COMFYUI_URL"):
        ComfyUIEngine(EngineSettings(tmp_path, tmp_path))
    node.stop()
    with pytest.raises(EngineError, match="does not answer") as raised:
        make_engine(node, tmp_path).info()
    assert raised.value.retryable


def test_a_picture_from_text(node: ComfyNode, tmp_path: Path) -> None:
    recorder = Recorder()
    task = image_task(tmp_path, loras=(LoraUse(model_file("ink.safetensors", "lora"), 0.8),))
    engine = make_engine(node, tmp_path)
    result = engine.run(task, recorder)
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
    assert make_engine(node, tmp_path).loaded() == []
    assert [(one.name, one.loras) for one in engine.loaded()] == [("base.safetensors", ("ink.safetensors",))]
    engine.unload("base.safetensors")
    assert engine.loaded() == [] and node.called("POST", "/free")


@pytest.mark.parametrize(
    ("scheduler", "sampler", "schedule"),
    [("dpmpp_2m", "dpmpp_2m", "normal"), ("dpmpp_2m_karras", "dpmpp_2m", "karras"), ("DDIM", "ddim", "normal")],
)
def test_schedulers_by_their_usual_names(
    node: ComfyNode, tmp_path: Path, scheduler: str, sampler: str, schedule: str
) -> None:
    make_engine(node, tmp_path).run(image_task(tmp_path, {**IMAGE, "scheduler": scheduler}), Recorder())
    [call] = node.called("POST", "/prompt")
    inputs = next(one["inputs"] for one in call.body["prompt"].values() if one["class_type"] == "KSampler")
    assert (inputs["sampler_name"], inputs["scheduler"]) == (sampler, schedule)


def test_an_unknown_scheduler_lists_those_there_are(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"scheduler: must be one of euler, .*dpmpp_2m") as raised:
        make_engine(node, tmp_path).run(image_task(tmp_path, {**IMAGE, "scheduler": "no_such"}), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("INVALID_FIELD", False)


def test_a_picture_from_a_picture_and_a_mask(node: ComfyNode, tmp_path: Path) -> None:
    for name in ("init.png", "mask.png"):
        Image.new("RGB", (32, 32), (len(name), 0, 0)).save(tmp_path / name)
    inputs = {
        "input:1": (InputFile(tmp_path / "init.png", "image/png"),),
        "input:2": (InputFile(tmp_path / "mask.png", "image/png"),),
    }
    fields = {**IMAGE, "init_image": "input:1", "mask_image": "input:2", "strength": 0.5}
    make_engine(node, tmp_path).run(image_task(tmp_path, fields, inputs=inputs), Recorder())
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
    result = make_engine(node, tmp_path).run(image_task(tmp_path, fields, job_type="video_gen"), Recorder())
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
