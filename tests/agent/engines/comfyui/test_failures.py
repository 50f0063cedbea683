"""What ComfyUI refuses or fails at, and memory that runs out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fleet_agent.engines.base import (
    EngineError,
)
from tests.agent.engines.comfyui.making import (
    IMAGE,
    image_task,
    make_engine,
    model_file,
    progress_graph,
    workflow_task,
)
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ComfyNode, Failure, sample


def test_a_graph_that_comfyui_refuses(node: ComfyNode, tmp_path: Path) -> None:
    engine = make_engine(node, tmp_path)
    with pytest.raises(EngineError, match=r"blur_radius") as raised:
        engine.run(workflow_task(tmp_path, sample("err_value_too_big")["request"]["json"]["prompt"]), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("INVALID_FIELD", False)
    with pytest.raises(EngineError, match=r"NoSuchNode") as raised:
        engine.run(workflow_task(tmp_path, sample("err_unknown_node")["request"]["json"]["prompt"]), Recorder())
    assert raised.value.retryable
    with pytest.raises(EngineError, match=r"ckpt_name: 'gone.safetensors' not in") as raised:
        engine.run(image_task(tmp_path, model=model_file("gone.safetensors")), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("MODEL_NOT_FOUND", True)


def test_what_a_node_of_the_graph_raises_is_the_reason(node: ComfyNode, tmp_path: Path) -> None:
    node.script.failures["KSampler"] = [Failure("no such sigma\n", "ValueError", step=2)]
    with pytest.raises(EngineError, match=r"KSampler \(node \d+\): ValueError: no such sigma$") as raised:
        make_engine(node, tmp_path).run(image_task(tmp_path), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("ENGINE_FAILED", True)
    assert not node.called("POST", "/free")


def test_out_of_memory_frees_what_comfyui_holds(node: ComfyNode, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"out of memory") as raised:
        make_engine(node, tmp_path).run(workflow_task(tmp_path, progress_graph(step_ms=0, fail_at=3)), Recorder())
    assert (raised.value.reason, raised.value.retryable) == ("OUT_OF_MEMORY", False)
    assert raised.value.result is not None
    assert raised.value.result.record_json is not None
    assert json.loads(raised.value.result.record_json)["status"]["messages"][-1][0] == "execution_error"
    [call] = node.called("POST", "/free")
    assert call.body == {"unload_models": True, "free_memory": True}


def test_little_memory_is_freed_before_another_model_comes(node: ComfyNode, tmp_path: Path) -> None:
    engine = make_engine(node, tmp_path)
    engine.run(image_task(tmp_path), Recorder())
    node.script.vram_free = node.script.vram_total // 100
    engine.run(image_task(tmp_path, {**IMAGE, "steps": 3}), Recorder())
    assert not node.called("POST", "/free")
    engine.run(image_task(tmp_path, model=model_file("other.safetensors")), Recorder())
    assert len(node.called("POST", "/free")) == 1
    engine.unload("other.safetensors")
    assert len(node.called("POST", "/free")) == 2


def test_a_file_that_cannot_be_had_is_a_failure_to_try_again(node: ComfyNode, tmp_path: Path) -> None:
    node.script.refuse["/view"] = 500
    with pytest.raises(EngineError, match="has no output file") as raised:
        make_engine(node, tmp_path).run(image_task(tmp_path), Recorder())
    assert raised.value.retryable
