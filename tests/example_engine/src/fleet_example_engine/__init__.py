"""`wordcount`: an engine in one file. It takes jobs of type `custom` with `{"engine": "wordcount", "text": "..."}`.

It writes a table of the words to a file, and says the most frequent one. `pause_seconds` between two words stands for
real work.
"""

from __future__ import annotations

import csv
import time
from collections import Counter

from fleet_agent.engines.base import (
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


class WordCount:
    """What the entry point names: called with the settings, it gives an engine."""

    def __init__(self, settings: EngineSettings) -> None:
        # FLEET_AGENT_OPTIONS=wordcount_least=2 on the node; every option is a text.
        self._least = int(settings.options.get("wordcount_least", "1"))

    def info(self) -> EngineInfo:
        """Asked when the agent starts. Raise EngineError here where the engine cannot work on this machine."""
        return EngineInfo(name="wordcount", version="0.1.0", job_types=("custom",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        """Called before every run. An engine with models loads one here, unless it is in memory already."""
        return LoadedModel("", 0, 0.0)

    def unload(self, model: str) -> None:
        """Frees a model."""

    def loaded(self) -> list[LoadedModel]:
        """The models in memory: jobs for them come here first."""
        return []

    def estimate(self, task: Task) -> int:
        """Bytes of memory that the task needs beyond its model."""
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        """The work. Files go into `task.output_folder`; each call of `report` may raise Cancelled: let it pass."""
        text, pause = task.fields.get("text"), task.fields.get("pause_seconds", 0)
        if not isinstance(text, str) or not isinstance(pause, int | float):
            # The caller's fault: another try would not help, so it is not retryable.
            raise EngineError("INVALID_FIELD", "payload.text: must be a text")
        words, counts = text.split(), Counter[str]()
        for done, word in enumerate(words, 1):
            counts[word.lower()] += 1
            time.sleep(pause)
            # At least every 100 ms: it is also how a cancellation is heard.
            report.progress(done, len(words), word)
        path = task.output_folder / "words.csv"
        with path.open("w", newline="") as out:
            csv.writer(out).writerows((w, n) for w, n in counts.most_common() if n >= self._least)
        most = counts.most_common(1)
        return EngineResult((EngineOutput(path, "text/csv"),), text=most[0][0] if most else "")
