"""Graphs of callers: their frames, progress and files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from fleet_agent.engines.base import (
    EngineError,
    EngineResult,
    InputFile,
)
from fleet_agent.engines.comfyui import watch
from tests.agent.engines.comfyui.making import (
    JOB,
    frame_kinds,
    in_thread,
    make_engine,
    progress_graph,
    workflow_task,
)
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ComfyNode, sample
from tests.waiting import wait_until_now


def test_a_workflow_passes_its_frames_on_in_their_order(node: ComfyNode, tmp_path: Path) -> None:
    recorder = Recorder()
    extra = json.dumps({"extra_pnginfo": {"workflow": {"note": "x"}}})
    task = workflow_task(tmp_path, progress_graph(step_ms=0), fields={"extra_data_json": extra})
    result = make_engine(node, tmp_path).run(task, recorder)
    recorded = [frame.get("type", b"\0\0\0\4") for frame in sample("progress_meta_preview_ws")]
    assert frame_kinds(recorder) == [kind for kind in recorded if kind not in ("status", "feature_flags")]
    assert recorder.steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
    assert result.record_json is not None
    record = json.loads(result.record_json)
    assert record["status"]["status_str"] == "success"
    [file] = record["outputs"]["2"]["images"]
    assert result.outputs[0].engine_file is not None
    assert result.outputs[0].engine_file.filename == file["filename"]
    [call] = node.called("POST", "/prompt")
    assert call.body["extra_data"] == {"extra_pnginfo": {"workflow": {"note": "x"}}}


def test_what_is_said_later_than_the_history_has_it_is_passed_on(
    node: ComfyNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_REST_SECONDS", 50.0)
    history = "/history/{prompt_id}"
    node.script.frames_held, node.script.hold_paths = True, {history}
    recorder = Recorder()
    task = workflow_task(tmp_path, progress_graph(step_ms=0))
    thread, _ = in_thread(lambda: make_engine(node, tmp_path).run(task, recorder))
    wait_until_now(lambda: node.called("GET", history) and JOB in node.app.executor.history)
    node.script.release()
    thread.join(50)
    assert not thread.is_alive()
    recorded = [frame.get("type", b"\0\0\0\4") for frame in sample("progress_meta_preview_ws")]
    assert frame_kinds(recorder) == [kind for kind in recorded if kind not in ("status", "feature_flags")]


def test_a_comfyui_that_takes_no_ids_is_heard_under_ours(node: ComfyNode, tmp_path: Path) -> None:
    node.script.prompt_ids = "ignored"
    recorder = Recorder()
    result = make_engine(node, tmp_path).run(workflow_task(tmp_path, progress_graph(step_ms=0)), recorder)
    assert result.outputs
    for frame in recorder.frames:
        text = frame if isinstance(frame, str) else frame[8:200].decode(errors="replace")
        assert JOB in text
    assert JOB in (result.record_json or "")


def test_a_graph_of_many_nodes_is_told_in_percent(node: ComfyNode, tmp_path: Path) -> None:
    graph = sample("chain_post_prompt")["request"]["json"]["prompt"]
    recorder = Recorder()
    make_engine(node, tmp_path).run(workflow_task(tmp_path, graph, watched=False), recorder)
    assert [step for step, _ in recorder.steps] == [0, 20, 40, 60, 80, 100]


def test_files_of_a_workflow_have_names_of_their_own_and_its_inputs_say_them(node: ComfyNode, tmp_path: Path) -> None:
    node.app.files.data["input", "sub", "in.png"] = b"another's"
    (tmp_path / "mine").write_bytes(b"mine")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "sub/in.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/in.png"}},
    }
    wanted = [{"reference": "input:1", "filename": "in.png", "subfolder": "sub", "type": "input"}]
    inputs = {"input:1": (InputFile(tmp_path / "mine", "image/png"),)}
    make_engine(node, tmp_path).run(
        workflow_task(tmp_path, graph, fields={"inputs": wanted}, inputs=inputs), Recorder()
    )
    [call] = node.called("POST", "/prompt")
    sent = call.body["prompt"]["1"]["inputs"]["image"]
    assert re.fullmatch(r"sub/fleet-[0-9a-f]{32}-in\.png", sent), "a name that nobody can guess"
    assert node.app.files.data["input", "sub", sent.removeprefix("sub/")] == b"mine"
    assert node.app.files.data["input", "sub", "in.png"] == b"another's"
    assert call.body["prompt"]["2"]["inputs"]["filename_prefix"] == "sub/in.png", "that names no file"


def test_a_name_that_is_as_long_as_names_may_be_keeps_its_ending(node: ComfyNode, tmp_path: Path) -> None:
    name = f"{'ä' * 120}.png"
    (tmp_path / "mine").write_bytes(b"mine")
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}},
    }
    wanted = [{"reference": "input:1", "filename": name, "subfolder": "", "type": "input"}]
    inputs = {"input:1": (InputFile(tmp_path / "mine", "image/png"),)}
    make_engine(node, tmp_path).run(
        workflow_task(tmp_path, graph, fields={"inputs": wanted}, inputs=inputs), Recorder()
    )
    sent = node.called("POST", "/prompt")[-1].body["prompt"]["1"]["inputs"]["image"]
    assert len(sent.encode()) <= 255 and sent.endswith("ä.png") and node.app.files.data["input", "", sent] == b"mine"


def test_what_others_have_made_is_no_input(node: ComfyNode, tmp_path: Path) -> None:
    node.app.files.data["output", "", "made.png"] = b"another's"
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "made.png [output]"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "made [output]"}},
    }
    with pytest.raises(
        EngineError, match=r"node 1: image: no prompt of yours has made 'made.png \[output\]'"
    ) as refused:
        make_engine(node, tmp_path).run(workflow_task(tmp_path, graph), Recorder())
    assert refused.value.reason == "INVALID_FIELD" and not refused.value.retryable
    assert not node.called("POST", "/prompt")


def test_frames_of_other_prompts_are_nobodys_here(node: ComfyNode, tmp_path: Path) -> None:
    """A prompt without a client tells everybody of its progress."""
    node.script.hold_at = 2
    httpx.post(f"{node.url}/prompt", json={"prompt": progress_graph(step_ms=0), "prompt_id": "another's"}, timeout=50)
    assert node.script.held.wait(50)
    recorder = Recorder()
    engine = make_engine(node, tmp_path)
    thread, ended = in_thread(lambda: engine.run(workflow_task(tmp_path, progress_graph(step_ms=0, seed=9)), recorder))
    recorder.wait_for(lambda: len(node.app.executor.pending) == 1)
    node.script.release()
    thread.join(50)
    assert isinstance(ended[0], EngineResult)
    assert all(JOB in frame for frame in recorder.frames if isinstance(frame, str))
    assert recorder.steps == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]
