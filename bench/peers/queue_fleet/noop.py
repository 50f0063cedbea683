"""The engine `noop`: custom jobs whose body appends one mark, as the peers' bodies do, and nothing else."""

from __future__ import annotations

import os
import struct
import time

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

_MARK = struct.Struct("<QQ")


class NoopEngine:
    """See the module."""

    def __init__(self, settings: EngineSettings) -> None:
        self._marks = os.open(os.environ["BENCH_MARKS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def info(self) -> EngineInfo:
        return EngineInfo("noop", "1", ("custom",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        return LoadedModel("noop", 0, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return []

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        os.write(self._marks, _MARK.pack(int(float(str(task.fields["number"]))), time.monotonic_ns()))
        return EngineResult()
