"""What engines that make one picture a task share: the payload's fields, the texts in the file, the preview."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from fleet_agent.engines.base import EngineError, Task
from fleet_agent.engines.start import DEFAULT_STRENGTH

MAX_PREVIEW_BYTES = 64 * 1024
MAX_SEED = 2**64 - 1


@dataclass(frozen=True, slots=True)
class ImageRequest:
    """What to make. The same request gives the same pixels."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    steps: int
    guidance_scale: float
    seed: int
    scheduler: str


def preview_bytes(picture: npt.NDArray[np.uint8]) -> bytes:
    """Return the picture as a JPEG of at most 64 KiB."""
    image = Image.fromarray(picture)
    data = b""
    for quality in (82, 65, 45, 25):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        data = buffer.getvalue()
        if len(data) <= MAX_PREVIEW_BYTES:
            return data
    return preview_bytes(np.ascontiguousarray(picture[::2, ::2]))


def request_of(task: Task, engine: str, schedulers: Collection[str], default: str) -> ImageRequest:
    """Read the payload's fields; `default` is the scheduler where none is named.

    Raises INVALID_FIELD naming the field, its limits and what to do.
    """
    fields = task.fields
    if task.job_type != "image_gen":
        raise EngineError("INVALID_FIELD", f"job_type: {engine} runs image_gen, not {task.job_type}")
    if fields.get("workflow") not in (None, ""):
        raise EngineError("INVALID_FIELD", f"workflow: {engine} makes pictures from prompts; leave it out")
    prompt, negative = fields.get("prompt"), fields.get("negative_prompt", "blurry, bad quality")
    if not isinstance(prompt, str) or not prompt.strip():
        raise EngineError("INVALID_FIELD", "prompt: must be a text that is not blank")
    if not isinstance(negative, str):
        raise EngineError("INVALID_FIELD", 'negative_prompt: must be a text; "" is none')
    scheduler = fields.get("scheduler") or default
    if not isinstance(scheduler, str) or scheduler not in schedulers:
        raise EngineError("INVALID_FIELD", f"scheduler: {engine} knows {', '.join(sorted(schedulers))}")
    width, height = (_integer(fields, name, 1024, 64, 2048) for name in ("width", "height"))
    for name, value in (("width", width), ("height", height)):
        if value % 8:
            raise EngineError("INVALID_FIELD", f"{name}: must be a multiple of 8, got {value}")
    guidance = fields.get("guidance_scale", 7.5)
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not 0 <= guidance <= 50:
        raise EngineError("INVALID_FIELD", f"guidance_scale: must be a number from 0 to 50, got {guidance!r}")
    if not 0 <= task.seed <= MAX_SEED:
        raise EngineError("INVALID_FIELD", f"seed: must be 0 to 2^64-1, got {task.seed}")
    steps = _integer(fields, "steps", 20, 1, 150)
    return ImageRequest(prompt, negative, width, height, steps, float(guidance), task.seed, scheduler)


def _integer(fields: Mapping[str, object], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise EngineError("INVALID_FIELD", f"{name}: must be an integer from {low} to {high}, got {value!r}")
    return value


def texts_of(task: Task, request: ImageRequest, model: str, *, engine: str, version: str) -> dict[str, str]:
    """The PNG's text chunks: a keyword per setting, and all in one as `parameters`, as other tools show it."""
    loras = ", ".join(f"{use.file.name}:{use.weight:g}" for use in task.loras)
    parameters = (
        f"{request.prompt}\nNegative prompt: {request.negative_prompt}\nSteps: {request.steps}, "
        f"Sampler: {request.scheduler}, CFG scale: {request.guidance_scale:g}, Seed: {request.seed}, "
        f"Size: {request.width}x{request.height}, Model: {model}, Version: fleet-{engine} {version}"
    )
    begun_with = {name: str(task.fields[name]) for name in ("init_image", "mask_image") if task.fields.get(name)}
    if begun_with:
        begun_with["strength"] = f"{task.fields.get('strength', DEFAULT_STRENGTH):g}"
        parameters += f", Denoising strength: {begun_with['strength']}"
    return {
        **begun_with,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "seed": str(request.seed),
        "model": model,
        "steps": str(request.steps),
        "guidance_scale": f"{request.guidance_scale:g}",
        "scheduler": request.scheduler,
        "loras": loras,
        "engine": engine,
        "version": version,
        "job_id": task.job_id,
        "parameters": parameters,
        "Software": f"Fleet Commander {engine} {version}",
    }
