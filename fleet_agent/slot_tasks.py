"""Tasks as frames carry them, and as engines take them."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fleet_agent import frames
from fleet_agent.engines.base import EngineError, EngineResult, InputFile, LoraUse, ModelFile, Task


def task_of(message: frames.Message) -> Task:
    """The task of a `run` frame. Raises EngineError for a LoRA without a file."""
    return Task(
        job_id=message["job_id"],
        job_type=message["job_type"],
        model=model_of(message["model"]),
        loras=tuple(LoraUse(_required(model_of(use["file"])), use["weight"]) for use in message["loras"]),
        fields=message["fields"],
        seed=int(message["seed"]),
        output_folder=Path(message["output_folder"]),
        previews=message["previews"],
        inputs={
            reference: tuple(
                InputFile(Path(file["path"]), file["content_type"], file.get("name", "")) for file in files
            )
            for reference, files in message.get("inputs", {}).items()
        },
    )


def failure(reason: str, detail: str, retryable: bool) -> frames.Message:
    """The frame of a task that failed."""
    # A lone surrogate, as in a path that is no UTF-8, has no place in JSON.
    detail = detail[:2000].encode(errors="replace").decode()
    return {"event": "failed", "reason": str(reason), "detail": detail, "retryable": retryable}


def model_of(fields: dict[str, Any] | None) -> ModelFile | None:
    """A model file of a frame."""
    if fields is None:
        return None
    path = fields["path"]
    return ModelFile(
        **{
            **fields,
            "path": None if path is None else Path(path),
            "trigger_words": tuple(fields["trigger_words"]),
        }
    )


def _required(model: ModelFile | None) -> ModelFile:
    if model is None:
        raise EngineError("LORA_NOT_FOUND", "a LoRA without a file")
    return model


def taken_out(outputs: Sequence[frames.Message], folder: Path, most_bytes: int) -> bytes:
    """Takes outputs that have at most so many bytes together out of their files, which are removed: the bytes, one
    after the other; `inline` of each says how many are its.

    b"" where they are larger, or one is no plain file of this folder: then all stay as they are, for others to judge.
    """
    paths = [Path(output["path"]) for output in outputs]
    try:
        found = [path.lstat() for path in paths]
        if sum(one.st_size for one in found) > most_bytes or not all(stat.S_ISREG(one.st_mode) for one in found):
            return b""
        parts = [path.read_bytes() for path in paths if path.parent == folder]
        if len(parts) < len(paths) or sum(map(len, parts)) > most_bytes:
            return b""
        for path in paths:
            path.unlink()
    except OSError:
        return b""
    for output, part in zip(outputs, parts, strict=True):
        output["inline"] = len(part)
    return b"".join(parts)


def result_of(result: EngineResult) -> frames.Message:
    """What a result adds to its frame."""
    outputs = [{**asdict(output), "path": str(output.path)} for output in result.outputs]
    return {
        "outputs": outputs,
        "text": result.text,
        "usage": None if result.usage is None else dict(result.usage),
        "exit_code": result.exit_code,
        "finish_reason": result.finish_reason,
        "segments": [asdict(segment) for segment in result.segments],
        "record_json": result.record_json,
    }
