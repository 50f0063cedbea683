"""The `sketch` engine, as the agent knows it.

NumPy and all that paints is imported for the first picture: an agent asks for its engines at each start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleet_agent.engines.base import (
    EngineInfo,
    EngineResult,
    EngineSettings,
    LoadedModel,
    LoraUse,
    ModelFile,
    Reporter,
    Task,
)

if TYPE_CHECKING:
    from fleet_agent.engines.sketch.studio import Studio

NAME = "sketch"
VERSION = "1.0.0"
DEFAULT_MODEL = "sketch"
ARCHITECTURE = "sketch"


class SketchEngine:
    """A painter of landscapes and cities out of NumPy. It knows some words and is no diffusion model."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._made: Studio | None = None

    @property
    def _studio(self) -> Studio:
        if self._made is None:
            from fleet_agent.engines.sketch.studio import Studio

            self._made = Studio()
        return self._made

    def info(self) -> EngineInfo:
        return EngineInfo(
            NAME,
            VERSION,
            ("image_gen",),
            default_model=DEFAULT_MODEL,
            detail="paints from the prompt's words without a GPU; it is no diffusion model",
            architectures=(ARCHITECTURE,),
            builtin_models=(DEFAULT_MODEL,),
        )

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """Read every tensor of the files, as a real engine must; another model in memory is freed first."""
        return self._studio.load(model, loras)

    def unload(self, model: str) -> None:
        self._studio.unload(model)

    def loaded(self) -> list[LoadedModel]:
        return [] if self._made is None else self._made.loaded()

    def estimate(self, task: Task) -> int:
        """Canvas, target and the largest temporary, float32, plus the finished bytes."""
        width, height = task.fields.get("width", 1024), task.fields.get("height", 1024)
        pixels = (width if isinstance(width, int) else 1024) * (height if isinstance(height, int) else 1024)
        return pixels * (3 * 4 * 3 + 4 * 4 + 6) + (16 << 20)

    def run(self, task: Task, report: Reporter) -> EngineResult:
        return self._studio.run(task, report)
