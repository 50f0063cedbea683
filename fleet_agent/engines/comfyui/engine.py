"""The engine: jobs as prompts of the node's ComfyUI, with our own graphs or the caller's."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fleet_agent.engines.base import (
    EngineError,
    EngineInfo,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reason,
    Reporter,
    Task,
)
from fleet_agent.engines.comfyui import templates
from fleet_agent.engines.comfyui.brought import Brought
from fleet_agent.engines.comfyui.client import ComfyClient
from fleet_agent.engines.comfyui.outputs import bring, files_of
from fleet_agent.engines.comfyui.watch import Watch, cancel_upstream
from fleet_agent.engines.leftovers import Leftovers

NAME = "comfyui"
_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory", re.IGNORECASE)
_ENDINGS = {"image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp"}
_FREE_BELOW = 0.05
_MODELS = frozenset({"ckpt_name", "unet_name"})
_WEIGHTS = re.compile(r".+\.(?:safetensors|sft|ckpt|pt|pth|bin|gguf)", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What is sent to ComfyUI for a task, and how its files are read."""

    graph: dict[str, Any]
    extra: Mapping[str, Any]
    brought: Brought
    targets: tuple[str, ...] = ()
    watched: bool = False
    """Somebody follows it by ComfyUI's own protocol."""
    seed: int | None = None
    seconds: float | None = None


class ComfyUIEngine:
    """Option `comfyui_url` says where ComfyUI is; `comfyui_motion_model` which motion module makes clips, the first
    that is there when left out; `comfyui_free_below` the share of free memory (0.05) below which it is told to free
    some before another model comes."""

    def __init__(self, settings: EngineSettings) -> None:
        url = settings.options.get("comfyui_url", "")
        if not url.startswith(("http://", "https://")):
            raise EngineError("ENGINE_FAILED", "set FLEET_AGENT_COMFYUI_URL, such as http://127.0.0.1:8188")
        self._client = ComfyClient(url)
        self._client_id = f"fleet-{uuid.uuid4().hex}"
        self._motion = settings.options.get("comfyui_motion_model")
        self._free_below = float(settings.options.get("comfyui_free_below", _FREE_BELOW))
        self._leftovers = Leftovers(settings.data_folder / "comfyui")
        self._models: tuple[str, ...] = ()
        self._shown: tuple[LoadedModel, ...] = ()

    def close(self) -> None:
        """Closes its connections."""
        self._client.close()

    def info(self) -> EngineInfo:
        system = self._client.system().get("system", {})
        self._leftovers.end(lambda prompt_id: cancel_upstream(self._client, prompt_id))
        clips = all(self._client.node_class(name) for name in (templates.MOTION_LOADER, templates.MOTION_CONTEXT))
        return EngineInfo(
            NAME,
            str(system.get("comfyui_version", "")),
            ("image_gen", "video_gen") if clips else ("image_gen",),
            detail=f"at {self._client.url}" + ("" if clips else "; no video_gen: AnimateDiff-Evolved is not installed"),
            builtin_models=tuple(self._client.values("CheckpointLoaderSimple", "ckpt_name")),
            builtin_loras=tuple(self._client.values("LoraLoader", "lora_name")),
            refresh_seconds=30,
        )

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """ComfyUI loads what a graph needs when it runs it."""
        name = "" if model is None else model.name
        return LoadedModel(name, 0, 0.0, tuple(use.file.name for use in loras))

    def unload(self, model: str) -> None:
        if any(shown.name == model for shown in self._shown):
            self._client.free()
            self._shown, self._models = (), ()

    def loaded(self) -> list[LoadedModel]:
        return list(self._shown)

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        self._leftovers.end(lambda prompt_id: cancel_upstream(self._client, prompt_id))
        prompt = self._workflow(task) if "workflow_json" in task.fields else self._template(task)
        self._make_room(prompt.graph)
        entry, prompt_id = self._followed(task, prompt, report)
        self._raise_failure(entry, prompt, _record(entry, prompt, prompt_id, task.job_id))
        self._shown = _in_memory(prompt.graph) or self._shown
        files = files_of(entry, temporary=prompt.watched)
        outputs = bring(
            self._client, files, task.output_folder, report, seed=prompt.seed, duration_seconds=prompt.seconds
        )
        return EngineResult(tuple(outputs), record_json=_record(entry, prompt, prompt_id, task.job_id))

    def _followed(self, task: Task, prompt: _Prompt, report: Reporter) -> tuple[dict[str, Any], str]:
        """The history's entry of the prompt, and ComfyUI's id for it. Whatever ends this early ends it there too."""
        sent = task.job_id

        def submit() -> str:
            nonlocal sent
            # An earlier attempt of this job may have been here: neither its run nor its record is ours.
            self._client.cancel(sent)
            self._client.forget(sent)
            self._leftovers.note(sent)
            body: dict[str, Any] = {
                "prompt": prompt.graph,
                "client_id": self._client_id,
                "prompt_id": sent,
                "extra_data": dict(prompt.extra),
            }
            if prompt.targets:
                body["partial_execution_targets"] = list(prompt.targets)
            # An older one takes no id of ours, and gives its own.
            sent = self._client.submit(body)
            self._leftovers.note(sent)
            return sent

        watch = Watch(
            self._client,
            self._client_id,
            report,
            graph=prompt.graph,
            job_id=task.job_id,
            pass_on=prompt.watched,
            plain=prompt.brought.plain,
        )
        try:
            return watch.run(submit), sent
        except BaseException:
            cancel_upstream(self._client, sent)
            raise
        finally:
            self._leftovers.done()

    def _raise_failure(self, entry: Mapping[str, Any], prompt: _Prompt, record: str) -> None:
        status = entry.get("status") or {}
        if status.get("status_str", "success") == "success":
            return
        messages = status.get("messages") or [["", {}]]
        kind, data = messages[-1]
        # Who speaks ComfyUI's protocol has been told that it failed.
        again, result = not prompt.watched, EngineResult(record_json=record)
        if kind != "execution_error":
            raise EngineError("ENGINE_FAILED", "the prompt was interrupted at its node", again, result=result)
        why = f"{data.get('exception_type')}: {str(data.get('exception_message')).strip()}"
        detail = prompt.brought.plain(f"{data.get('node_type')} (node {data.get('node_id')}): {why}")
        reason = Reason.ENGINE_FAILED
        if _OUT_OF_MEMORY.search(why):
            reason = Reason.OUT_OF_MEMORY
            self._client.free()
            self._shown, self._models = (), ()
        raise EngineError(reason, detail[:1500], again, result=result)

    def _make_room(self, graph: Mapping[str, Any]) -> None:
        """Frees memory where little is left and other models are wanted than last."""
        models = tuple(
            sorted(
                str(value)
                for node in graph.values()
                if "Loader" in str(node.get("class_type"))
                for value in node.get("inputs", {}).values()
                if isinstance(value, str)
            )
        )
        if models != self._models:
            memory = self._client.memory()
            if memory is not None and memory.free < memory.total * self._free_below:
                self._client.free()
                self._shown = ()
        self._models = models

    def _template(self, task: Task) -> _Prompt:
        """One of our own graphs."""
        if task.model is None:
            named = self._client.values("CheckpointLoaderSimple", "ckpt_name")
            if not named:
                raise EngineError("MODEL_NOT_FOUND", "ComfyUI has no checkpoint", retryable=True)
        checkpoint = named[0] if task.model is None else task.model.name
        video = task.job_type == "video_gen"
        brought = Brought(self._client)
        still = templates.Still(
            checkpoint=checkpoint,
            fields=task.fields,
            seed=task.seed,
            loras=task.loras,
            # The folders of our outputs; a name of the job's own, since ComfyUI counts by name.
            prefix=f"{'animatediff' if video else 'comfyui'}/{task.job_id}",
            init=self._uploaded(task, "init_image", brought),
            mask=self._uploaded(task, "mask_image", brought),
        )
        names = {field: self._client.values("KSampler", field) for field in ("sampler_name", "scheduler")}
        sampling = templates.Sampling(names["sampler_name"], names["scheduler"])
        if not video:
            return _Prompt(templates.image_graph(still, sampling), {}, brought, seed=task.seed)
        frames, fps = int(str(task.fields["frames"])), float(str(task.fields["fps"]))
        combine = self._client.node_class(templates.VIDEO_COMBINE) is not None
        motion = templates.Motion(self._motion_module(), frames, fps, combine)
        graph = templates.clip_graph(still, sampling, motion)
        return _Prompt(graph, {}, brought, seed=task.seed, seconds=frames / fps)

    def _motion_module(self) -> str:
        there = self._client.values(templates.MOTION_LOADER, "model_name")
        if self._motion is None and there:
            return there[0]
        if self._motion not in there:
            wanted = self._motion or "any motion module for AnimateDiff"
            raise EngineError("MODEL_NOT_FOUND", f"ComfyUI does not have {wanted}", retryable=True)
        return self._motion

    def _uploaded(self, task: Task, field: str, brought: Brought) -> str | None:
        """The name that the picture of this field has in ComfyUI."""
        reference = task.fields.get(field)
        if reference is None:
            return None
        files = task.inputs.get(str(reference))
        if not files:
            raise EngineError("INPUT_NOT_FOUND", f"{field}: {reference} was not brought to the node")
        name = f"{field}{_ENDINGS.get(files[0].content_type, '.png')}"
        return brought.put(str(reference), name, "", "input", files[0])

    def _workflow(self, task: Task) -> _Prompt:
        """The caller's graph, its files brought to ComfyUI first."""
        fields: Mapping[str, Any] = task.fields
        try:
            graph = json.loads(fields["workflow_json"])
            extra = json.loads(fields.get("extra_data_json") or "{}")
        except ValueError as error:
            raise EngineError("INVALID_FIELD", f"workflow: must be JSON ({error})") from error
        if not isinstance(graph, dict) or not isinstance(extra, dict):
            raise EngineError("INVALID_FIELD", "workflow: must be a graph in ComfyUI's API format")
        brought = Brought(self._client)
        for one in fields.get("inputs", ()):
            files = task.inputs.get(one["reference"])
            if not files:
                raise EngineError("INPUT_NOT_FOUND", f"workflow: {one['reference']} was not brought to the node")
            brought.put_for(graph, one, files[0])
        brought.check(graph)
        said: Mapping[str, Any] = fields.get("prompt") or {}
        return _Prompt(graph, extra, brought, tuple(said.get("targets", ())), watched="prompt" in fields)


def _in_memory(graph: Mapping[str, Any]) -> tuple[LoadedModel, ...]:
    """The models that a graph leaves in memory, each with the graph's LoRAs; placement prefers nodes that have them."""
    models: set[str] = set()
    loras: set[str] = set()
    for node in graph.values():
        for field, value in node.get("inputs", {}).items():
            if isinstance(value, str) and _WEIGHTS.fullmatch(value):
                if field in _MODELS:
                    models.add(value)
                elif "lora" in field.lower():
                    loras.add(value)
    return tuple(LoadedModel(name, 0, 0.0, tuple(sorted(loras))) for name in sorted(models))


def _record(entry: Mapping[str, Any], prompt: _Prompt, prompt_id: str, job_id: str) -> str:
    """What is kept of a history's entry, its prompt and its files named as we do."""
    text = prompt.brought.plain(json.dumps({name: entry.get(name) for name in ("outputs", "status", "meta")}))
    return text if prompt_id == job_id else text.replace(prompt_id, job_id)
