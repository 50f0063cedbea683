"""Jobs as ComfyUI's clients see them: items of the queue, entries of the history, rows of /api/jobs."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from fleet.v1 import types_pb2

from fleet_server.domain.job import JobRecord, JobState
from fleet_server.protojson import loads_exact

Json = Any
_SECRETS = ("auth_token_comfy_org", "api_key_comfy_org")
_TAGGED = re.compile(r"(?P<stem>.*?)_?(?P<tag>[0-9a-f]{32})(?P<ending>\.[^.]*)?", re.DOTALL)
_STATUS = {
    JobState.QUEUED: "pending",
    JobState.RUNNING: "in_progress",
    JobState.SUCCEEDED: "completed",
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}
_MEDIA = ("images", "gifs", "video", "videos", "audio")
_KEPT = ("output", "temp")

JOB_STATUSES = tuple(_STATUS.values())


class Prompt:
    """A job that carries a graph, read from its record."""

    def __init__(self, record: JobRecord) -> None:
        spec = types_pb2.JobSpec.FromString(record.spec)
        self.record = record
        self.workflow = spec.payload.workflow
        self.said = self.workflow.prompt

    @property
    def prompt_id(self) -> str:
        return self.record.job_id

    @property
    def graph(self) -> Json:
        return loads_exact(self.workflow.workflow_json)

    @property
    def number(self) -> int | float:
        """Its place in ComfyUI's queue, whole numbers as such."""
        number: float = self.said.number
        return int(number) if number.is_integer() else number

    def extra_data(self, *, secrets: bool = False) -> dict[str, Json]:
        """ComfyUI's extra_data; without what only the node may know."""
        text = self.workflow.extra_data_json
        extra: dict[str, Json] = loads_exact(text) if text else {}
        if not secrets:
            extra = {name: value for name, value in extra.items() if name not in _SECRETS}
        if self.said.client_id:
            extra["client_id"] = self.said.client_id
        extra["create_time"] = self.create_time_ms
        return extra

    @property
    def create_time_ms(self) -> int:
        """When it was submitted, as ComfyUI's clients are told."""
        told: int = self.said.create_time_ms
        return told or self.record.created_ms

    def item(self) -> list[Json]:
        """As in /queue and in the history."""
        return [self.number, self.prompt_id, self.graph, self.extra_data(), list(self.said.output_node_ids)]


def is_prompt(record: JobRecord) -> bool:
    """Whether the job carries a graph."""
    spec = types_pb2.JobSpec.FromString(record.spec)
    kind = spec.payload.WhichOneof("kind")
    return kind == "workflow"


def engine_result(record: JobRecord) -> types_pb2.EngineResult:
    """What the engine added to the job's result."""
    return types_pb2.EngineResult.FromString(record.result)


def history_entry(prompt: Prompt, note: bytes | None = None) -> dict[str, Json]:
    """The prompt's entry in /history; `note` is what was kept when it was stopped."""
    record = prompt.record
    text = engine_result(record).record_json or (note.decode() if note else "")
    made: dict[str, Json] = {}
    if text:
        try:
            made = loads_exact(text)
        except ValueError:
            made = {}
    status = made.get("status")
    if not isinstance(status, dict) or (status.get("status_str") == "success") != (record.state is JobState.SUCCEEDED):
        status = _status(record)
    return {
        "prompt": prompt.item(),
        "outputs": tagged_outputs(made.get("outputs") or {}, prompt.prompt_id),
        "status": status,
        "meta": made.get("meta") or {},
    }


def end_message(record: JobRecord) -> tuple[str, dict[str, Json]]:
    """What a client is told of an end that the node did not tell of: the type of the frame and its data."""
    data: dict[str, Json] = {"prompt_id": record.job_id}
    if record.state is JobState.SUCCEEDED:
        return "execution_success", {**data, "timestamp": record.ended_ms}
    data |= {"node_id": "", "node_type": "", "executed": []}
    if record.state is JobState.CANCELLED:
        return "execution_interrupted", {**data, "timestamp": record.ended_ms}
    error = types_pb2.JobError.FromString(record.error)
    data |= {
        "exception_message": error.detail,
        "exception_type": error.reason,
        "traceback": [],
        "current_inputs": {},
        "current_outputs": [],
        "timestamp": record.ended_ms,
    }
    return "execution_error", data


def _status(record: JobRecord) -> dict[str, Json]:
    messages: list[Json] = []
    if record.started_ms is not None:
        messages.append(["execution_start", {"prompt_id": record.job_id, "timestamp": record.started_ms}])
    messages.append(list(end_message(record)))
    done = record.state is JobState.SUCCEEDED
    return {"status_str": "success" if done else "error", "completed": done, "messages": messages}


# Names of files: what nodes number each for itself is made unique by the prompt's id.


def tagged(filename: str, prompt_id: str) -> str:
    """The name under which clients get a file of a prompt: `a_00001_.png` with the id before the ending."""
    try:
        tag = uuid.UUID(prompt_id).hex
    except ValueError:
        return filename
    stem, dot, ending = filename.rpartition(".")
    if not dot:
        stem, ending = filename, ""
    return f"{stem}{'' if stem.endswith('_') else '_'}{tag}{dot}{ending}"


def untagged(filename: str) -> tuple[str, tuple[str, ...]] | None:
    """The prompt's id in a name, and the names that its node may have given the file; None where there is no id."""
    match = _TAGGED.fullmatch(filename)
    if match is None:
        return None
    ending = match["ending"] or ""
    return str(uuid.UUID(match["tag"])), (f"{match['stem']}_{ending}", f"{match['stem']}{ending}")


def tagged_outputs(outputs: Mapping[str, Json], prompt_id: str) -> dict[str, Json]:
    """The outputs of nodes with the names that clients get."""
    return {node_id: _tagged_output(output, prompt_id) for node_id, output in outputs.items()}


def made_files(output: Json) -> Iterator[tuple[str, str, str]]:
    """Name, folder and type of the files in what a node shows."""
    for listed in output.values() if isinstance(output, dict) else ():
        for one in listed if isinstance(listed, list) else ():
            if isinstance(one, dict) and isinstance(one.get("filename"), str) and one.get("type") in _KEPT:
                yield one["filename"], str(one.get("subfolder") or ""), one["type"]


def _tagged_output(output: Json, prompt_id: str) -> Json:
    if not isinstance(output, dict):
        return output
    return {
        kind: [_tagged_file(file, prompt_id) for file in files] if isinstance(files, list) else files
        for kind, files in output.items()
    }


def _tagged_file(file: Json, prompt_id: str) -> Json:
    if isinstance(file, dict) and isinstance(file.get("filename"), str) and file.get("type") in _KEPT:
        return {**file, "filename": tagged(file["filename"], prompt_id)}
    return file


# /api/jobs.


def job_row(prompt: Prompt, note: bytes | None = None) -> dict[str, Json]:
    """A row of /api/jobs."""
    record = prompt.record
    row: dict[str, Json] = {
        "id": record.job_id,
        "status": _STATUS[record.state],
        "priority": prompt.number,
        "create_time": prompt.create_time_ms,
    }
    if record.started_ms is not None:
        row["execution_start_time"] = record.started_ms
    if record.ended_ms is not None:
        row["execution_end_time"] = record.ended_ms
    if record.state is JobState.FAILED:
        row["execution_error"] = _error(prompt, note)
    outputs = history_entry(prompt, note)["outputs"] if record.state.ended else {}
    made = [
        (node_id, kind, one)
        for node_id, output in outputs.items()
        if isinstance(output, dict)
        for kind, listed in output.items()
        if isinstance(listed, list) and kind != "animated"
        for one in listed
    ]
    shown = [
        {**one, "nodeId": node_id, "mediaType": kind}
        for node_id, kind, one in made
        if isinstance(one, dict) and kind in _MEDIA
    ]
    row["outputs_count"] = len(made)
    row["previewable_outputs_count"] = len(shown)
    if shown:
        row["preview_output"] = next((file for file in shown if file.get("type") == "output"), shown[0])
    workflow = (prompt.extra_data().get("extra_pnginfo") or {}).get("workflow") or {}
    if isinstance(workflow, dict) and workflow.get("id"):
        row["workflow_id"] = workflow["id"]
    return row


def job_detail(prompt: Prompt, note: bytes | None = None) -> dict[str, Json]:
    """The reply of /api/jobs/{id}."""
    entry = history_entry(prompt, note) if prompt.record.state.ended else {"outputs": {}, "status": None}
    return {
        **job_row(prompt, note),
        "outputs": entry["outputs"],
        "execution_status": entry["status"],
        "workflow": {"prompt": prompt.graph, "extra_data": prompt.extra_data()},
    }


def _error(prompt: Prompt, note: bytes | None) -> Json:
    for kind, data in history_entry(prompt, note)["status"]["messages"]:
        if kind == "execution_error":
            return data
    return end_message(prompt.record)[1]
