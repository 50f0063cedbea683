"""The files that a prompt has made: found in its history, brought from /view."""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fleet_agent.engines.base import EngineFile, EngineOutput, Reporter
from fleet_agent.engines.comfyui.client import ComfyClient

_ENDING = re.compile(r"\.[A-Za-z0-9]{1,10}\Z")


def files_of(entry: Mapping[str, Any], *, temporary: bool) -> list[EngineFile]:
    """The files that stand in the outputs of a history's entry, each once, in their order.

    Those of ComfyUI's temp folder only where they are wanted, or nothing else was made.
    """
    found = list(dict.fromkeys(_files(entry.get("outputs") or {})))
    lasting = [file for file in found if file.type == "output"]
    return found if temporary or not lasting else lasting


def _files(outputs: Mapping[str, Any]) -> Iterator[EngineFile]:
    for node_id, shown in outputs.items():
        for kind, listed in shown.items() if isinstance(shown, dict) else ():
            for one in listed if isinstance(listed, list) else ():
                if isinstance(one, dict) and one.get("filename") and one.get("type") in ("output", "temp"):
                    yield EngineFile(node_id, kind, one["filename"], one.get("subfolder") or "", one["type"])


def bring(
    client: ComfyClient,
    files: list[EngineFile],
    folder: Path,
    report: Reporter,
    *,
    seed: int | None,
    duration_seconds: float | None,
) -> Iterator[EngineOutput]:
    """Writes each file into the folder. Raises EngineError, OSError; `Cancelled` passes."""
    for index, file in enumerate(files):
        ending = _ENDING.search(file.filename)
        path = folder / f"{index}{ending.group() if ending else ''}"
        view = client.view(file.filename, file.subfolder, file.type, report)
        with view as (content_type, chunks), path.open("wb") as out:
            for chunk in chunks:
                out.write(chunk)
        if content_type == "application/octet-stream":
            content_type = mimetypes.guess_type(file.filename)[0] or content_type
        width, height, length = _measured(path, content_type)
        yield EngineOutput(
            path, content_type, width, height, duration_seconds if length is None else length, seed, engine_file=file
        )


def _measured(path: Path, content_type: str) -> tuple[int | None, int | None, float | None]:
    """Width, height and, of an animation, seconds; nothing where it is no picture that can be read."""
    if not content_type.startswith("image/"):
        return None, None, None
    try:
        with Image.open(path) as image:
            frames = getattr(image, "n_frames", 1)
            if frames == 1:
                return image.width, image.height, None
            milliseconds = 0
            for number in range(frames):
                image.seek(number)
                image.load()
                milliseconds += image.info.get("duration", 0)
            return image.width, image.height, milliseconds / 1000 or None
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return None, None, None
