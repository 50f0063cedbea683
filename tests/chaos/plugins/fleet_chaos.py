"""An engine for tests of faults: does what the prompt says and writes down each run.

The prompt is words: `work:<ms>` how long, `fail` for a failure that may be retried, `fail-2` for one in the job's
second run alone, `kill-agent` to take the agent with it. Each run appends `start`, `alive` and `end` lines to the file
named by CHAOS_RUNS; the file that it makes names the job and the run, so that a result can be traced to the one run
that made it.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from pathlib import Path

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

STEPS = 10
SIGN_SECONDS = 0.05
"""So often a run says that it is alive: one that is killed cannot say when."""


def _write(line: str) -> None:
    # One write of a short line to a file opened for appending is never mixed with another's.
    with Path(os.environ["CHAOS_RUNS"]).open("ab", buffering=0) as runs:
        runs.write(line.encode())


def _runs_of(job_id: str) -> int:
    """How many runs of the job have begun, here or elsewhere."""
    return Path(os.environ["CHAOS_RUNS"]).read_text().count(f"start {job_id} ")


class ChaosEngine:
    """See the module."""

    def __init__(self, settings: EngineSettings) -> None:
        # Each agent of a trial has a folder of its own beside the file of the runs, named as its node.
        self._node = settings.data_folder.relative_to(Path(os.environ["CHAOS_RUNS"]).parent).parts[0]

    def info(self) -> EngineInfo:
        return EngineInfo("chaos", "1.0", ("image_gen",), "chaos", builtin_models=("chaos",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        return LoadedModel("chaos", 4096, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        return [LoadedModel("chaos", 4096, 0.0)]

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        run_id = uuid.uuid4().hex
        words = dict(word.partition(":")[::2] for word in str(task.fields["prompt"]).split())
        where = f"{task.job_id} {run_id} {self._node}"
        _write(f"start {where} {time.monotonic():.6f}\n")
        try:
            self._work(int(words.get("work", "50")) / 1000, report, where)
            if "kill-agent" in words:
                os.kill(os.getppid(), signal.SIGKILL)
                time.sleep(60)
            if "fail" in words or f"fail-{_runs_of(task.job_id)}" in words:
                raise EngineError("ENGINE_FAILED", "as the prompt says", retryable=True)
        finally:
            _write(f"end {where} {time.monotonic():.6f}\n")
        path = task.output_folder / "run.png"
        path.write_text(f"{task.job_id} {run_id}\n")
        return EngineResult((EngineOutput(path, "image/png", 8, 8, seed=task.seed),))

    def _work(self, seconds: float, report: Reporter, where: str) -> None:
        began = said = time.monotonic()
        step = 0
        while (done := time.monotonic() - began) < seconds:
            reached = int(done / seconds * STEPS)
            if reached > step:
                step = reached
                report.progress(step, STEPS)
            report.check()
            if began + done - said > SIGN_SECONDS:
                said = began + done
                _write(f"alive {where} {said:.6f}\n")
            time.sleep(0.005)
        report.progress(STEPS, STEPS)
