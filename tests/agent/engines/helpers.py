"""A slot's end of the protocol, for tests: it records, and cancels when told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image

from fleet_agent.engines.base import Cancelled, EngineSettings, InputFile, LoraUse, ModelFile, Task
from fleet_agent.engines.sketch.engine import SketchEngine

Pixels = npt.NDArray[np.uint8]
SMALL: Mapping[str, object] = {
    "prompt": "a beautiful sunset over mountains",
    "negative_prompt": "blurry, bad quality",
    "width": 128,
    "height": 128,
    "steps": 8,
    "guidance_scale": 7.5,
}


class Recorder:
    """A Reporter. `cancel_when` is asked at every call, with the number of steps done."""

    def __init__(self, cancel_when: Callable[[int], bool] = lambda done: False) -> None:
        self.steps: list[tuple[int, int]] = []
        self.previews: list[tuple[str, bytes]] = []
        self.texts: list[str] = []
        self.messages: list[str] = []
        self.frames: list[str | bytes] = []
        self.checks = 0
        self._changed = threading.Condition()
        self.cancel_when = cancel_when

    def check(self) -> None:
        self.checks += 1
        with self._changed:
            self._changed.notify_all()
        if self.cancel_when(self.steps[-1][0] if self.steps else 0):
            raise Cancelled

    def progress(self, step: int, steps: int, message: str | None = None) -> None:
        self.steps.append((step, steps))
        if message is not None:
            self.messages.append(message)
        self.check()

    def preview(self, content_type: str, data: bytes) -> None:
        self.previews.append((content_type, data))
        self.check()

    def wait_for(self, condition: Callable[[], bool], seconds: float = 50) -> None:
        """For a test beside which another thread runs the engine."""
        with self._changed:
            assert self._changed.wait_for(condition, seconds)

    def text(self, text: str) -> None:
        self.texts.append(text)
        self.check()

    def frame(self, frame: str | bytes) -> None:
        self.frames.append(frame)
        self.check()


def sketch(folder: Path) -> SketchEngine:
    return SketchEngine(EngineSettings(folder / "models", folder / "data"))


def task_of(
    folder: Path,
    *,
    seed: int = 7,
    model: ModelFile | None = None,
    loras: tuple[LoraUse, ...] = (),
    previews: bool = False,
    job_type: str = "image_gen",
    fields: Mapping[str, object] = MappingProxyType({}),
    inputs: Mapping[str, tuple[InputFile, ...]] = MappingProxyType({}),
    **more: object,
) -> Task:
    return Task("job-1", job_type, model, loras, {**SMALL, **fields, **more}, seed, folder, previews, inputs)


def paint(
    folder: Path,
    *,
    seed: int = 7,
    model: ModelFile | None = None,
    loras: tuple[LoraUse, ...] = (),
    engine: SketchEngine | None = None,
    fields: Mapping[str, object] = MappingProxyType({}),
    **more: object,
) -> Pixels:
    """Run one task on the sketch engine and return the pixels of its file."""
    task = task_of(folder, seed=seed, model=model, loras=loras, fields={**fields, **more})
    result = (engine or sketch(folder)).run(task, Recorder())
    return np.asarray(Image.open(result.outputs[0].path))


def psnr(a: Pixels, b: Pixels) -> float:
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return float("inf") if error == 0 else 10.0 * float(np.log10(255.0**2 / error))


def mean_colour(pixels: Pixels) -> tuple[float, float, float]:
    red, green, blue = pixels.reshape(-1, 3).mean(axis=0)
    return float(red), float(green), float(blue)


def luminance(pixels: Pixels) -> float:
    red, green, blue = mean_colour(pixels)
    return 0.299 * red + 0.587 * green + 0.114 * blue
