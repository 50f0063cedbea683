"""Engines for tests of the slot: `probe` does what the prompt's first word says, well or badly."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

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
    Segment,
    Task,
)


def deadly(settings: EngineSettings) -> NoReturn:
    """A plug-in that takes its process with it."""
    os._exit(9)


class ProbeEngine:
    """Behaves as it is told."""

    def __init__(self, settings: EngineSettings) -> None:
        self._data = settings.data_folder
        self._runs = 0

    def info(self) -> EngineInfo:
        return EngineInfo("probe", "1.0", ("image_gen", "custom"), "probe", builtin_models=("probe",))

    def load(self, model: ModelFile | None, loras: tuple[LoraUse, ...] = ()) -> LoadedModel:
        if (self._data / "no-memory").exists():
            raise EngineError("OUT_OF_MEMORY", "8 GB are not enough", retryable=True)
        while (self._data / "slow-load").exists():
            time.sleep(0.01)
        return LoadedModel("probe", 4096, 0.0)

    def unload(self, model: str) -> None:
        return None

    def loaded(self) -> list[LoadedModel]:
        if self._runs < 0:
            raise RuntimeError("cannot tell")
        return [LoadedModel("probe", 4096, 0.0)]

    def estimate(self, task: Task) -> int:
        return 0

    def run(self, task: Task, report: Reporter) -> EngineResult:
        self._runs += 1
        words = str(task.fields.get("prompt", "custom")).split()
        behaviour = getattr(self, f"_{words[0]}")
        result: EngineResult = behaviour(task, report, *words[1:])
        return result

    def _paint(self, task: Task, report: Reporter, size: str = "1000") -> EngineResult:
        path = task.output_folder / "picture.png"
        path.write_bytes(bytes(range(256)) * (int(size) // 256 + 1))
        report.progress(1, 1)
        return EngineResult((EngineOutput(path, "image/png", 8, 8, seed=task.seed),))

    def _deaf(self, task: Task, report: Reporter) -> EngineResult:
        """Ignores the alarm that is to end it, as a library might, and works on."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        return self._wait(task, report)

    def _read(self, task: Task, report: Reporter) -> EngineResult:
        """Says what files it was given."""
        said = [
            f"{reference}={file.content_type}:{file.path.read_text()}"
            for reference, files in sorted(task.inputs.items())
            for file in files
        ]
        return EngineResult(text=" ".join(said))

    def _custom(self, task: Task, report: Reporter) -> EngineResult:
        return EngineResult(text=repr(sorted(task.fields.items())), exit_code=3)

    def _wait(self, task: Task, report: Reporter, *then: str) -> EngineResult:
        """Works until a file named by the job appears in the data folder."""
        report.progress(1, 4, "waiting")
        while not (self._data / f"go-{task.job_id}").exists():
            report.check()
            time.sleep(0.01)
        return self._paint(task, report)

    def _looked(self, task: Task, report: Reporter) -> EngineResult:
        """Previews without end."""
        while not (self._data / f"go-{task.job_id}").exists():
            report.progress(1, 2)
            report.preview("image/jpeg", b"picture")
            time.sleep(0.01)
        return self._paint(task, report)

    def _pulse(self, task: Task, report: Reporter) -> EngineResult:
        """Works until it is ended, and keeps in the data folder when it did last (of the monotonic clock)."""
        report.progress(1, 4)
        with (self._data / "pulse").open("wb", buffering=0) as file:
            while True:
                os.pwrite(file.fileno(), struct.pack("d", time.monotonic()), 0)
                time.sleep(0.01)

    def _stubborn(self, task: Task, report: Reporter) -> EngineResult:
        report.progress(1, 4)
        while True:
            time.sleep(60)

    def _hold(self, task: Task, report: Reporter) -> EngineResult:
        """Never lets another thread of its process run, as a library's native code may."""
        report.progress(1, 4)
        re.match("(a+)+$", "a" * 64 + "b")
        raise AssertionError("no regular expression is that fast")

    def _late(self, task: Task, report: Reporter) -> EngineResult:
        """Ignores that it is told to stop, and finishes."""
        report.progress(1, 2)
        while True:
            try:
                report.check()
            except Cancelled:
                path = task.output_folder / "late.png"
                path.write_bytes(b"late")
                return EngineResult((EngineOutput(path, "image/png"),))
            time.sleep(0.01)

    def _brood(self, task: Task, report: Reporter) -> EngineResult:
        """Starts a process of its own and waits."""
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (self._data / "brood").write_text(str(child.pid))
        return self._stubborn(task, report)

    def _noise(self, task: Task, report: Reporter) -> EngineResult:
        sys.stdout.write("a library's banner\n")
        os.write(1, b"\x00\x00\x00\x05\x00\x00\x00\x00noise")
        subprocess.run(["/bin/sh", "-c", "echo more; cat"], check=True)
        report.progress(1, 2, "after the noise")
        return self._paint(task, report)

    def _chatter(self, task: Task, report: Reporter) -> EngineResult:
        while not (self._data / f"go-{task.job_id}").exists():
            report.progress(1, 100, "x" * 100)
        return EngineResult(text="done talking")

    def _memory(self, task: Task, report: Reporter) -> EngineResult:
        raise MemoryError

    def _vram(self, task: Task, report: Reporter) -> EngineResult:
        raise EngineError("OUT_OF_MEMORY", "8 GB are not enough", retryable=True)

    def _hog(self, task: Task, report: Reporter, size: str) -> EngineResult:
        """Takes memory and keeps it, and says that it has."""
        taken = bytearray(int(size))
        taken[::4096] = b"x" * len(taken[::4096])
        return self._wait(task, report)

    def _tell(self, task: Task, report: Reporter) -> EngineResult:
        """Says frames and text of its own, then how it ended."""
        for number in range(3):
            report.frame(f'{{"type": "executed", "data": {number}}}')
            report.text("wo")
        report.frame(b"\0\0\0\4")
        report.text("rd\ud800")
        segment = Segment(0.0, 1.5, "word")
        usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
        return EngineResult(
            text="word", usage=usage, finish_reason="stop", segments=(segment,), record_json='{"outputs": {}}'
        )

    def _fail(self, task: Task, report: Reporter) -> EngineResult:
        """Fails, and gives what there is."""
        raise EngineError("EXIT_NONZERO", "exit code 3", result=EngineResult(exit_code=3, record_json="{}"))

    def _bug(self, task: Task, report: Reporter) -> EngineResult:
        raise ValueError("a lone surrogate: \udc80 " + "x" * 5000)

    def _exit(self, task: Task, report: Reporter) -> EngineResult:
        os._exit(7)

    def _quit(self, task: Task, report: Reporter) -> EngineResult:
        raise Cancelled

    def _big(self, task: Task, report: Reporter, size: str) -> EngineResult:
        return EngineResult(text="x" * int(size))

    def _forgetful(self, task: Task, report: Reporter) -> EngineResult:
        self._runs = -1
        return EngineResult(text="done")

    def _absent(self, task: Task, report: Reporter) -> EngineResult:
        return EngineResult((EngineOutput(task.output_folder / "absent.png", "image/png"),))

    def _outside(self, task: Task, report: Reporter) -> EngineResult:
        path = self._data / "precious"
        path.write_text("not the engine's to give")
        return EngineResult((EngineOutput(path, "image/png"),))

    def _senseless(self, task: Task, report: Reporter) -> EngineResult:
        return EngineResult(usage={"no_such_count": 1})

    def _secrets(self, task: Task, report: Reporter) -> EngineResult:
        return EngineResult(text=",".join(sorted(name for name in os.environ if "KEY" in name)))

    def _folder(self, task: Task, report: Reporter) -> EngineResult:
        return EngineResult(text=str(Path(task.output_folder)))
