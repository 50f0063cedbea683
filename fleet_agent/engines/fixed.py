"""`fixed`: answers at once with a picture of a given size in bytes, to measure everything but an engine.

Made only when asked for by name (FLEET_ENGINES=fixed). Option `size_bytes`, else the variable
FLEET_FIXED_SIZE_BYTES, else 1,500,000, is the PNG's size, about.
"""

from __future__ import annotations

import math
import os

import numpy as np

from fleet_agent.engines import png
from fleet_agent.engines.base import (
    EngineInfo,
    EngineOutput,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reporter,
    Task,
)

NAME = "fixed"
_VERSION = "1.0.0"


class FixedEngine:
    """The same incompressible picture for every job."""

    def __init__(self, settings: EngineSettings) -> None:
        size = int(settings.options.get("size_bytes") or os.environ.get("FLEET_FIXED_SIZE_BYTES", "1500000"))
        if not 1_000 <= size <= 50_000_000:
            raise ValueError(f"fixed: size_bytes must be 1,000 to 50,000,000, got {size}")
        side = self._side = max(8, round(math.sqrt(size / 3)))
        noise = np.random.PCG64(1).random_raw(-(-side * side * 3 // 8))
        pixels = np.asarray(noise).view(np.uint8)[: side * side * 3].reshape(side, side, 3)
        self._data = png.encode(pixels)

    def info(self) -> EngineInfo:
        detail = f"for benchmarks: always the same picture of {len(self._data)} bytes"
        return EngineInfo(NAME, _VERSION, ("image_gen",), NAME, detail, builtin_models=(NAME,))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        return LoadedModel(NAME, len(self._data), 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return [LoadedModel(NAME, len(self._data), 0.0)]

    def estimate(self, task: Task) -> int:
        return len(self._data)

    def run(self, task: Task, report: Reporter) -> EngineResult:
        report.progress(0, 1)
        path = task.output_folder / f"{task.job_id}.png"
        path.write_bytes(self._data)
        report.progress(1, 1)
        return EngineResult((EngineOutput(path, "image/png", self._side, self._side, seed=task.seed),))
