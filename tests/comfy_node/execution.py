"""Runs graphs one after another and says so, frame by frame, in the recorded order."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.comfy_node import files
from tests.comfy_node.graph import Graph, is_link, order, signature

_SAMPLERS = ("KSampler", "FleetProgress")
Say = Callable[[str, dict[str, Any], str | None], None]
"""Frame type, data, and the client it is for (None: all)."""
SayPreview = Callable[[bytes, str, str, str | None], bool]


class InterruptedPromptError(Exception):
    """POST /interrupt."""


class NodeError(Exception):
    """A node of the graph raised this."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Failure:
    """What a class raises, at which of its steps."""

    message: str = "CUDA out of memory (made up)\n"
    kind: str = "RuntimeError"
    step: int = 1


@dataclass(order=True)
class Item:
    """A prompt in the queue; the lowest number goes first."""

    number: float
    prompt_id: str = field(compare=False)
    graph: Graph = field(compare=False)
    extra: dict[str, Any] = field(compare=False)
    outputs: list[str] = field(compare=False)

    def shown(self) -> list[Any]:
        return [self.number, self.prompt_id, self.graph, self.extra, self.outputs]

    @property
    def client_id(self) -> str | None:
        return self.extra.get("client_id")


@dataclass
class Run:
    """What the running prompt has done so far."""

    item: Item
    messages: list[list[Any]] = field(default_factory=list)
    states: dict[str, dict[str, Any]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    executed: list[str] = field(default_factory=list)
    node_id: str | None = None
    interrupted: bool = False


class Executor:
    """The queue and its one worker. All of it lives on the node's loop."""

    def __init__(self, script: Any, kept: files.Files, say: Say, say_preview: SayPreview) -> None:
        self._script = script
        self._files = kept
        self._say = say
        self._say_preview = say_preview
        self.pending: list[Item] = []
        self.running: Run | None = None
        self.history: dict[str, Any] = {}
        self._arrived = asyncio.Event()
        self._cache: dict[str, Any] = {}

    @property
    def remaining(self) -> int:
        return len(self.pending) + (self.running is not None)

    def put(self, item: Item) -> None:
        heapq.heappush(self.pending, item)
        self._arrived.set()
        self.say_status()

    def say_status(self) -> None:
        self._say("status", {"status": {"exec_info": {"queue_remaining": self.remaining}}}, None)

    def delete(self, prompt_ids: list[str] | None) -> None:
        """Forgets pending prompts, all of them where none is named."""
        for item in list(self.pending):
            if prompt_ids is None or item.prompt_id in prompt_ids:
                self.pending.remove(item)
                heapq.heapify(self.pending)
                self.say_status()

    def interrupt(self, prompt_id: str | None) -> None:
        run = self.running
        if run is not None and prompt_id in (None, run.item.prompt_id):
            run.interrupted = True
            self._script.wake()

    async def work(self) -> None:
        """For ever."""
        while True:
            while not self.pending or self._script.queue_held:
                self._arrived.clear()
                self._script.on_release(self._arrived)
                # A release by another thread may have come since the look.
                if not self.pending or self._script.queue_held:
                    await self._arrived.wait()
            run = self.running = Run(heapq.heappop(self.pending))
            self.say_status()
            await self._run(run)

    async def _run(self, run: Run) -> None:
        item = run.item
        status = "success"
        try:
            self._message(run, "execution_start", {})
            wanted = order(item.graph, item.outputs)
            signatures = {node_id: signature(item.graph, node_id, self._files.stamp) for node_id in wanted}
            cached = [node_id for node_id in wanted if signatures[node_id] in self._cache]
            self._message(run, "execution_cached", {"nodes": cached})
            for node_id in wanted:
                if node_id in cached:
                    self._repeat(run, node_id, self._cache[signatures[node_id]])
                else:
                    self._cache[signatures[node_id]] = await self._node(run, node_id)
            self._cache = {key: self._cache[key] for key in signatures.values()}
            self._message(run, "execution_success", {})
        except InterruptedPromptError:
            status = "error"
            self._message(run, "execution_interrupted", self._where(run), to_all=True)
        except NodeError as error:
            status = "error"
            self._message(run, "execution_error", {**self._where(run), **_raised(run, error)})
        self.history[item.prompt_id] = {
            "prompt": item.shown(),
            "outputs": run.outputs,
            "status": {"status_str": status, "completed": status == "success", "messages": run.messages},
            "meta": {
                node_id: {"node_id": node_id, "display_node": node_id, "parent_node": None, "real_node_id": node_id}
                for node_id in run.outputs
            },
        }
        self.running = None
        self.say_status()
        if item.client_id is not None:
            self._say("executing", {"node": None, "prompt_id": item.prompt_id}, item.client_id)

    def _where(self, run: Run) -> dict[str, Any]:
        node_id = run.node_id or ""
        kind = run.item.graph[node_id]["class_type"] if node_id else ""
        return {"node_id": node_id, "node_type": kind, "executed": list(run.executed)}

    def _message(self, run: Run, kind: str, data: dict[str, Any], *, to_all: bool = False) -> None:
        whole = {**data, "prompt_id": run.item.prompt_id, "timestamp": round(time.time() * 1000)}
        run.messages.append([kind, whole])
        if run.item.client_id is not None or to_all:
            self._say(kind, whole, run.item.client_id)

    def _state(self, run: Run, node_id: str, value: float, limit: float, state: str) -> None:
        prompt_id = run.item.prompt_id
        run.states[node_id] = {
            "value": value,
            "max": limit,
            "state": state,
            "node_id": node_id,
            "prompt_id": prompt_id,
            "display_node_id": node_id,
            "parent_node_id": None,
            "real_node_id": node_id,
        }
        data = {"prompt_id": prompt_id, "nodes": {key: dict(one) for key, one in run.states.items()}}
        self._say("progress_state", data, run.item.client_id)

    def _executed(self, run: Run, node_id: str, output: dict[str, Any]) -> None:
        run.outputs[node_id] = output
        data = {"node": node_id, "display_node": node_id, "output": output, "prompt_id": run.item.prompt_id}
        if run.item.client_id is not None:
            self._say("executed", data, run.item.client_id)

    def _repeat(self, run: Run, node_id: str, output: dict[str, Any] | None) -> None:
        """A node whose result is known."""
        if output is not None:
            self._executed(run, node_id, output)
            self._state(run, node_id, 1, 1, "finished")

    async def _node(self, run: Run, node_id: str) -> dict[str, Any] | None:
        """Executes a node; what it shows, if anything."""
        item, node = run.item, run.item.graph[node_id]
        run.node_id = node_id
        self._state(run, node_id, 0.0, 1.0, "running")
        if item.client_id is not None:
            data = {"node": node_id, "display_node": node_id, "prompt_id": item.prompt_id}
            self._say("executing", data, item.client_id)
        steps = int(node["inputs"].get("steps", 0)) if node["class_type"] in _SAMPLERS else 0
        failure = self._script.failure(node["class_type"])
        if not steps:
            await self._pause(run, 0)
            if failure is not None:
                raise NodeError(failure.kind, failure.message)
        for step in range(1, steps + 1):
            await self._pause(run, step)
            own = node["inputs"].get("fail_at") == step
            if own:
                raise NodeError("RuntimeError", f"CUDA out of memory (made up at step {step})\n")
            if failure is not None and failure.step == step:
                raise NodeError(failure.kind, failure.message)
            self._step(run, node_id, step, steps)
        output = self._show(item, node_id)
        if output is not None:
            self._executed(run, node_id, output)
        self._state(run, node_id, steps or 1.0, steps or 1.0, "finished")
        run.executed.append(node_id)
        return output

    async def _pause(self, run: Run, step: int) -> None:
        own = run.item.graph[run.node_id]["inputs"].get("step_ms") if run.node_id else None
        await self._script.before_step(step, (own or 0) / 1000, lambda: run.interrupted)
        if run.interrupted:
            raise InterruptedPromptError

    def _step(self, run: Run, node_id: str, step: int, steps: int) -> None:
        """Progress; the preview comes before it where its frame has metadata, else after, as recorded."""
        item = run.item
        self._state(run, node_id, step, steps, "running")
        image = self._script.preview(step)
        sent = image is not None and self._say_preview(image, node_id, item.prompt_id, item.client_id)
        data = {"value": step, "max": steps, "prompt_id": item.prompt_id, "node": node_id}
        self._say("progress", data, item.client_id)
        if image is not None and not sent:
            self._say_preview(image, "", item.prompt_id, item.client_id)

    def _show(self, item: Item, node_id: str) -> dict[str, Any] | None:
        node = item.graph[node_id]
        inputs, kind = node["inputs"], node["class_type"]
        if not self._script.known(kind)["output_node"]:
            return None
        width, height, count, seed = _shape(item.graph, node_id)
        prefix = str(inputs.get("filename_prefix", "ComfyUI_temp"))
        if kind == "VHS_VideoCombine":
            ending = str(inputs["format"]).partition("/")[2].removeprefix("h264-")
            data = files.animation(width, height, seed, min(count, 4), inputs["frame_rate"])
            saved = self._files.save("output", prefix, ending, data)
            return {"gifs": [{**saved, "format": inputs["format"], "frame_rate": inputs["frame_rate"]}]}
        if kind == "SaveAnimatedWEBP":
            data = files.animation(width, height, seed, min(count, 4), inputs["fps"])
            return {"images": [self._files.save("output", prefix, "webp", data)], "animated": [True]}
        where = "temp" if kind == "PreviewImage" else "output"
        pictures = [files.png(width, height, seed + n, item.graph, item.extra) for n in range(count)]
        return {"images": [self._files.save(where, prefix, "png", data) for data in pictures]}


def _raised(run: Run, error: NodeError) -> dict[str, Any]:
    node = run.item.graph[run.node_id or ""]
    return {
        "exception_message": str(error),
        "exception_type": error.kind,
        "traceback": ['  File "/opt/ComfyUI/execution.py", line 496, in execute\n'],
        "current_inputs": {name: [value] for name, value in node["inputs"].items() if not is_link(value)},
        "current_outputs": list(run.item.graph),
    }


def _shape(graph: Graph, node_id: str) -> tuple[int, int, int, int]:
    """Width, height, number and seed of the pictures that reach a node: the nearest that say so."""
    width = height = count = seed = None
    waiting = [node_id]
    while waiting:
        inputs = graph[waiting.pop(0)]["inputs"]
        width = inputs.get("width") if width is None else width
        height = inputs.get("height") if height is None else height
        count = inputs.get("batch_size", inputs.get("amount")) if count is None else count
        seed = inputs.get("seed") if seed is None else seed
        waiting += [value[0] for value in inputs.values() if is_link(value)]
    return width or 64, height or 64, count or 1, seed or 0
