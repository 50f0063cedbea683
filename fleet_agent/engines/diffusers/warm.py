"""Before the first job with a model: it is compiled for the sizes that are asked for, and its speed is measured."""

from __future__ import annotations

import sys
import time
import traceback

from fleet_agent.engines.diffusers import denoise
from fleet_agent.engines.diffusers.model import Model, Shape
from fleet_agent.engines.diffusers.schedulers import OWN
from fleet_agent.engines.diffusers.vae import decoded
from fleet_agent.engines.image import ImageRequest

_STEPS = 4


def warm_up(model: Model, most: int) -> None:
    """For each size of the device's settings: one picture, and as many as a batch has at most. Sets `model.speed`.

    What cannot be compiled here, or needs more memory than there is, runs as it is later; nothing is raised.
    """
    if not model.device.sizes:
        return
    model.loras.have(())
    model.speed = None
    for width, height in model.device.sizes:
        limit = batch_limit(most, width, height)
        for count in (1, limit) if limit > 1 else (1,):
            request = ImageRequest("warm-up", "", width, height, _STEPS, 5.0, 0, OWN)
            # Prompts of one chunk, guided, as nearly all are.
            tokens = int(model.pipeline.tokenizer.model_max_length)
            shape = 2 * count, height // denoise.SCALE, width // denoise.SCALE, tokens
            seconds = _warmed(model, [denoise.Row(request, None)] * count, shape)
            if seconds is not None and model.speed is None:
                model.speed = width * height * _STEPS / seconds


def batch_limit(most: int, width: int, height: int) -> int:
    """How many pictures go together: as many pixels as `most` of 1024 x 1024 have, and no more than 16 pictures."""
    return max(1, min(most * (1 << 20) // (width * height), 16))


def _warmed(model: Model, rows: list[denoise.Row], shape: Shape) -> float | None:
    """What the second run took, without decoding; None where it failed."""
    try:
        if model.device.compile:
            model.make_ready(shape)
        *_, last = denoise.steps(model, rows)
        decoded(model.pipeline.vae, last.latents[0])
        begun = time.perf_counter()
        for _ in denoise.steps(model, rows):
            pass
        return time.perf_counter() - begun
    except Exception:
        # A compiler may be missing, or be wrong about this GPU: then jobs run without it.
        model.not_ready(shape)
        traceback.print_exc()
        sys.stderr.write(f"{model.file.name}: {len(rows)} pictures at once are not made ready\n")
        return None
