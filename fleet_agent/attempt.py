"""One attempt of a job in a slot: the task for the child, and what its frames mean."""

from __future__ import annotations

import asyncio
import enum
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleet.v1 import node_pb2, types_pb2
from google.protobuf import json_format, struct_pb2
from google.protobuf.message import Message

from fleet_agent import frames
from fleet_agent.engines.base import ModelFile, ModelKind
from fleet_agent.inventory import Inventory, model_fields
from fleet_agent.lease import Lease
from fleet_agent.slot_process import SlotProcess


class Stop(enum.IntEnum):
    """Why a running attempt is being stopped; of two reasons the greater one stands."""

    TIMEOUT = 1
    RELEASED = 2
    DROPPED = 3
    CANCELLED = 4


class RefusedError(Exception):
    """The attempt cannot run here; `reason` is a word of JobRejected."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(slots=True)
class Attempt:
    """What runs in a slot now."""

    assign: node_pb2.Assign
    slot: SlotProcess
    engine: str
    task: frames.Message
    metadata: types_pb2.OutputMetadata
    started: bool = False
    step: int = 0
    steps: int = 0
    previews: bool = False
    stop: Stop | None = None
    lease: Lease | None = None
    """Of exclusive work alone."""
    preparing: asyncio.Task[None] | None = None
    """What has to be done before the engine may begin."""

    @property
    def token(self) -> str:
        return self.assign.token

    @property
    def progress(self) -> int:
        """Whole percent."""
        return 0 if self.steps <= 0 else max(0, min(100, self.step * 100 // self.steps))

    @property
    def files(self) -> list[tuple[ModelKind, str]]:
        """Kind and name of the model files that it works with."""
        model: tuple[ModelKind, str] = ("checkpoint", self.assign.model)
        loras: list[tuple[ModelKind, str]] = [("lora", use["file"]["name"]) for use in self.task["loras"]]
        return [model, *loras] if self.assign.model else loras

    @property
    def stop_seconds(self) -> float:
        """What its engine needs to stop as it was asked to, beyond what every engine may take."""
        return float(self.task["fields"].get("stop_grace_seconds", 30)) if self.engine == "container" else 0.0

    def held(self) -> node_pb2.HeldAttempt:
        """The attempt as a heartbeat names it."""
        held = node_pb2.HeldAttempt(job_id=self.assign.job_id, token=self.token, progress=self.progress)
        if self.steps:
            held.step, held.steps = self.step, self.steps
        return held


def plan(
    assign: node_pb2.Assign, slot: SlotProcess, inventory: Inventory, folder: Path, *, inline_bytes: int = 0
) -> Attempt:
    """Finds engine, model and LoRAs for an Assign. Raises RefusedError where one is missing.

    Outputs that have no more than `inline_bytes` together come with the end of the task and not in `folder`.
    """
    kind = assign.payload.WhichOneof("kind")
    if kind is None:
        raise RefusedError("CAPABILITY_MISSING", "the payload is of a kind that this agent does not know")
    payload: Message = getattr(assign.payload, kind)
    job_type = types_pb2.JobType.Name(assign.job_type).removeprefix("JOB_TYPE_").lower()
    model = _file(inventory, "checkpoint", assign.model, "MODEL_NOT_FOUND") if assign.model else None
    named = _named_engine(assign.payload)
    engine = inventory.engine_for(job_type, model) if named is None else inventory.engine_named(named, job_type)
    if engine is None:
        what = job_type if model is None else f"{job_type} with {assign.model}"
        how = "no engine" if named is None else f"no engine {named}"
        raise RefusedError("CAPABILITY_MISSING", f"{how} of this node runs {what}")
    # (A free payload has none: there these are names like any other.)
    free = isinstance(payload, struct_pb2.Struct)
    uses = [] if free else list(getattr(payload, "loras", ()))
    loras = [(_file(inventory, "lora", use.name, "LORA_NOT_FOUND"), use.weight) for use in uses]
    seed = 0 if free else int(getattr(payload, "seed", 0))
    task: frames.Message = {
        "token": assign.token,
        "job_id": assign.job_id,
        "job_type": job_type,
        "engine": engine,
        "model": model_fields(model),
        "loras": [{"file": model_fields(file), "weight": weight} for file, weight in loras],
        "fields": _fields(payload),
        # JSON numbers end at 2^53 for some readers; a seed goes to 2^64.
        "seed": str(seed),
        "output_folder": str(folder),
        "inline_bytes": inline_bytes,
        # Somebody may begin to look at any time; the agent sends what is looked at.
        "previews": True,
        "inputs": {},
        "lease_until": None,
    }
    metadata = _metadata(assign, payload, inventory, engine, model, loras)
    return Attempt(assign, slot, engine, task, metadata, previews=assign.previews)


def _named_engine(payload: types_pb2.Payload) -> str | None:
    """The engine that this payload is for; None where any will do that runs the type."""
    kind = payload.WhichOneof("kind")
    if kind == "workflow":
        return "comfyui"
    if kind == "custom" and "engine" in payload.custom.fields:
        return payload.custom.fields["engine"].string_value
    return None


def _file(inventory: Inventory, kind: ModelKind, name: str, reason: str) -> ModelFile:
    file = inventory.file(kind, name)
    if file is None:
        raise RefusedError(reason, f"this node has no {kind} {name}")
    return file


def _fields(payload: Message) -> dict[str, Any]:
    """The payload as plain values; LoRAs, model and seed travel beside it (but a text's seed, which it may lack)."""
    if isinstance(payload, struct_pb2.Struct):
        return {name: _plain(value) for name, value in payload.fields.items()}
    fields: dict[str, Any] = json_format.MessageToDict(payload, preserving_proto_field_name=True)
    beside = {"loras", "model"} if isinstance(payload, types_pb2.LlmPayload) else {"loras", "model", "seed"}
    for name in beside.intersection(payload.DESCRIPTOR.fields_by_name):
        fields.pop(name, None)
    return fields


def _plain(value: struct_pb2.Value) -> Any:
    """What json_format makes of it, at a fraction of its time: jobs of free payloads are the many and short ones."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {name: _plain(one) for name, one in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_plain(one) for one in value.list_value.values]
    return None if kind is None or kind == "null_value" else getattr(value, kind)


def _metadata(
    assign: node_pb2.Assign,
    payload: Any,
    inventory: Inventory,
    engine: str,
    model: ModelFile | None,
    loras: list[tuple[ModelFile, float]],
) -> types_pb2.OutputMetadata:
    """How the outputs of this attempt are made."""
    metadata = types_pb2.OutputMetadata(
        job_type=assign.job_type, engine=engine, engine_version=inventory.version_of(engine)
    )
    known = payload.DESCRIPTOR.fields_by_name
    for name in ("prompt", "negative_prompt", "steps", "guidance_scale", "scheduler"):
        # (The `prompt` of a graph is a message, and no text.)
        if name not in known or known[name].message_type is not None:
            continue
        if not known[name].has_presence or payload.HasField(name):
            setattr(metadata, name, getattr(payload, name))
    if assign.target_model or assign.model:
        metadata.model = assign.target_model or assign.model
        metadata.resolved_model = assign.model
    if model is not None and model.sha256:
        metadata.model_sha256 = model.sha256
    for file, weight in loras:
        metadata.loras.add(name=file.name, weight=weight, sha256=file.sha256)
    return metadata


def completion(attempt: Attempt, event: frames.Message, blob: bytes = b"") -> node_pb2.JobComplete:
    """The end that a `done` or `failed` frame means; receipts of outputs that are not in its blob not yet filled in."""
    if event["event"] != "done":
        complete = failure(attempt, event["reason"], event["detail"], event["retryable"])
        if "exit_code" in event:
            _say_result(complete, event)
        return complete
    complete = node_pb2.JobComplete(job_id=attempt.assign.job_id, token=attempt.token, metadata=attempt.metadata)
    at = 0
    for output in event["outputs"]:
        uploaded = complete.outputs.add(content_type=output["content_type"])
        for name in ("width", "height", "duration_seconds", "seed"):
            if output[name] is not None:
                setattr(uploaded, name, output[name])
        if output.get("engine_file") is not None:
            uploaded.engine_file.CopyFrom(types_pb2.EngineFile(**output["engine_file"]))
        if "inline" in output:
            uploaded.data = data = blob[at : at + output["inline"]]
            uploaded.receipt.size_bytes, uploaded.receipt.sha256 = len(data), hashlib.sha256(data).hexdigest()
            at += len(data)
    _say_result(complete, event)
    complete.load_seconds = event["load_seconds"]
    complete.run_seconds = event["run_seconds"]
    return complete


def _say_result(complete: node_pb2.JobComplete, event: frames.Message) -> None:
    """What an engine gave besides files."""
    for name in ("text", "finish_reason", "exit_code"):
        if event[name] is not None:
            setattr(complete, name, event[name])
    if event["usage"] is not None:
        complete.usage.CopyFrom(types_pb2.TokenUsage(**event["usage"]))
    complete.segments.extend(types_pb2.TranscriptSegment(**segment) for segment in event["segments"])
    if event["record_json"] is not None:
        complete.engine_record_json = event["record_json"]


_DETAIL = 2000
_CODES = {
    "OUT_OF_MEMORY": "RESOURCE_EXHAUSTED",
    "MODEL_NOT_FOUND": "NOT_FOUND",
    "LORA_NOT_FOUND": "NOT_FOUND",
    "INPUT_NOT_FOUND": "NOT_FOUND",
    "INVALID_FIELD": "INVALID_ARGUMENT",
    "DISK_FULL": "UNAVAILABLE",
    "TIMEOUT": "DEADLINE_EXCEEDED",
}


def failure(attempt: Attempt, reason: str, detail: str, retryable: bool) -> node_pb2.JobComplete:
    """The end of an attempt that failed."""
    error = types_pb2.JobError(detail=detail[:_DETAIL], code=_CODES.get(reason, "INTERNAL"), reason=reason)
    return node_pb2.JobComplete(
        job_id=attempt.assign.job_id, token=attempt.token, error=error, retryable=retryable, metadata=attempt.metadata
    )
