"""Cancelled runs, lost sockets, and a ComfyUI or an engine that falls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
    EngineResult,
)
from tests.agent.engines.comfyui.making import (
    JOB,
    frame_kinds,
    image_task,
    in_thread,
    make_engine,
    progress_graph,
    workflow_task,
)
from tests.agent.engines.helpers import Recorder
from tests.comfy_node import ComfyNode


@pytest.mark.parametrize("hold_at", [1, 3], ids=["before the first step", "mid-run"])
def test_cancelled_it_interrupts_its_own_prompt_alone(node: ComfyNode, tmp_path: Path, hold_at: int) -> None:
    node.script.hold_at = hold_at
    recorder = Recorder(lambda done: node.script.held.is_set())
    with pytest.raises(Cancelled):
        make_engine(node, tmp_path).run(image_task(tmp_path), recorder)
    assert [call.body for call in node.called("POST", "/interrupt")] == [{"prompt_id": JOB}]
    assert node.app.executor.remaining == 0
    assert not list((tmp_path / "data" / "comfyui").glob("*"))


def test_cancelled_in_the_queue_it_interrupts_nobody(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 2
    httpx.post(f"{node.url}/prompt", json={"prompt": progress_graph(), "prompt_id": "another's"}, timeout=50)
    assert node.script.held.wait(50)
    recorder = Recorder(lambda done: len(node.app.executor.pending) == 1)
    with pytest.raises(Cancelled):
        make_engine(node, tmp_path).run(image_task(tmp_path), recorder)
    assert node.app.executor.remaining == 1
    assert not node.called("POST", "/interrupt")


def test_cancelled_while_its_files_come_it_leaves_none_running(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_paths = {"/view"}
    recorder = Recorder()
    thread, ended = in_thread(lambda: make_engine(node, tmp_path).run(image_task(tmp_path), recorder))
    assert node.script.held.wait(50)
    recorder.cancel_when = lambda done: True
    node.script.release()
    thread.join(50)
    assert isinstance(ended[0], Cancelled)


def test_a_lost_socket_costs_nothing(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    recorder = Recorder()
    thread, ended = in_thread(
        lambda: make_engine(node, tmp_path).run(workflow_task(tmp_path, progress_graph()), recorder)
    )
    assert node.script.held.wait(50)
    node.drop_sockets()
    recorder.wait_for(lambda: any(isinstance(f, str) and '"executing"' in f and JOB in f for f in recorder.frames[6:]))
    node.script.release()
    thread.join(50)
    assert isinstance(ended[0], EngineResult)
    assert len(node.called("POST", "/prompt")) == 1
    assert frame_kinds(recorder)[-1] == "executing"


def test_an_end_that_nobody_heard_is_found_in_the_history(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    recorder = Recorder()
    engine = make_engine(node, tmp_path)
    thread, ended = in_thread(lambda: engine.run(workflow_task(tmp_path, progress_graph()), recorder))
    assert node.script.held.wait(50)
    # Its frames go to nobody.
    node.app.sockets.queues.clear()
    node.script.release()
    thread.join(50)
    assert isinstance(ended[0], EngineResult)


def test_a_comfyui_that_was_restarted_has_lost_the_prompt(node: ComfyNode, tmp_path: Path) -> None:
    node.script.hold_at = 3
    thread, ended = in_thread(lambda: make_engine(node, tmp_path).run(image_task(tmp_path), Recorder()))
    assert node.script.held.wait(50)
    node.stop()
    node.start()
    thread.join(50)
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
        assert node.script.held.wait(50)
        held.touch()
        assert process.wait(50) == 9
    assert node.app.executor.remaining == 1
    node.script.hold_at = None
    make_engine(node, tmp_path).run(image_task(tmp_path), Recorder())
    assert [call.body for call in node.called("POST", "/interrupt")] == [{"prompt_id": "left-behind"}]
    assert list(node.app.executor.history) == ["left-behind", JOB]
