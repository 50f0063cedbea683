"""`FleetProgress`, a node for a real ComfyUI: steps with pictures of their own, no weights needed.

Copy this file into its folder `custom_nodes` before tests/comfy/test_real.py; the tests import nothing of it.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from PIL import Image

_MOST = 100_000


class FleetProgress:
    """Takes `steps` steps of `step_ms` milliseconds, each with a preview; raises at step `fail_at` (0: at none)."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"
    CATEGORY = "fleet"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        def number(default: int, low: int = 0, high: int = _MOST) -> tuple[str, dict[str, int]]:
            return "INT", {"default": default, "min": low, "max": high}

        return {
            "required": {
                "width": number(256, 16),
                "height": number(256, 16),
                "steps": number(4, 1),
                "seed": number(0, 0, 2**64 - 1),
                "step_ms": number(0),
                "fail_at": number(0),
            }
        }

    def run(self, width: int, height: int, steps: int, seed: int, step_ms: int, fail_at: int) -> tuple[Any]:
        torch, utils = importlib.import_module("torch"), importlib.import_module("comfy.utils")
        bar = utils.ProgressBar(steps)
        for step in range(1, steps + 1):
            time.sleep(step_ms / 1000)
            if step == fail_at:
                raise RuntimeError(f"made up at step {step}")
            shade = (255 * step // steps, seed % 256, 0)
            bar.update_absolute(step, steps, ("JPEG", Image.new("RGB", (width, height), shade), 64))
        return (torch.full((1, height, width, 3), (seed % 256) / 255),)


NODE_CLASS_MAPPINGS = {"FleetProgress": FleetProgress}
