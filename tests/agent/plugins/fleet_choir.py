"""An engine for tests of batches: `choir` sings tasks of one key together, and writes down with whom."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path

from fleet_agent.engines.base import (
    Cancelled,
    EngineError,
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
from fleet_agent.engines.batch import Ended


class ChoirEngine:
    """The prompt says what a task does: sing, wait (until it is cancelled), fail, die (with all of its batch)."""

    def __init__(self, settings: EngineSettings) -> None:
        self._book = settings.data_folder / "batches"

    def info(self) -> EngineInfo:
        return EngineInfo("choir", "1.0", ("image_gen",), "choir", builtin_models=("choir",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        return LoadedModel("choir", 4096, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return [LoadedModel("choir", 4096, 0.0, pixel_steps_per_second=50.0)]

    def estimate(self, task: Task) -> int:
        return 0

    def batch_limit(self, task: Task) -> int:
        return 3

    def batch_key(self, task: Task) -> Hashable:
        if task.fields["prompt"] == "unclear":
            raise EngineError("INVALID_FIELD", "prompt: makes no sense")
        return task.fields.get("steps")

    def run(self, task: Task, report: Reporter) -> EngineResult:
        for _, ended in self.run_batch([task], [report]):
            if isinstance(ended, EngineResult):
                return ended
            raise ended
        raise AssertionError

    def run_batch(self, tasks: Sequence[Task], reports: Sequence[Reporter]) -> Iterator[tuple[int, Ended]]:
        with self._book.open("a") as book:
            book.write(json.dumps([task.job_id for task in tasks]) + "\n")
        waiting = []
        for place, (task, report) in enumerate(zip(tasks, reports, strict=True)):
            report.progress(1, 2)
            word = task.fields["prompt"]
            if word == "die":
                raise RuntimeError("the whole choir falls silent")
            if word in ("fail", "unclear"):
                yield place, EngineError("INVALID_FIELD", "prompt: cannot be sung")
            elif word == "wait":
                waiting.append(place)
            elif word != "forgotten":
                yield place, EngineResult((self._written(task),))
        while waiting:
            for place in tuple(waiting):
                try:
                    reports[place].check()
                except Cancelled as cancelled:
                    waiting.remove(place)
                    yield place, cancelled
            time.sleep(0.005)

    @staticmethod
    def _written(task: Task) -> EngineOutput:
        path: Path = task.output_folder / "song.png"
        path.write_text(str(task.seed))
        return EngineOutput(path, "image/png", seed=task.seed)
