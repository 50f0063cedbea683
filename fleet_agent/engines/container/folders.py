"""The three folders of a job: /inputs, /outputs and /checkpoints."""

from __future__ import annotations

import contextlib
import mimetypes
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from fleet_agent.engines.base import EngineError, EngineOutput, InputFile, Task
from fleet_agent.engines.container.request import references

_KEPT_SECONDS = 7 * 86_400
_MOST_OUTPUTS = 10_000
_UNFIT = re.compile(r"[^A-Za-z0-9._ ()\[\]-]")


class JobFolders:
    """Those of one attempt. Checkpoints lie beside the attempts: they outlive them, on this node."""

    def __init__(self, data: Path, task: Task) -> None:
        self.inputs = task.output_folder / "inputs"
        self.outputs = task.output_folder / "outputs"
        self.checkpoints = checkpoints(data) / task.job_id
        self._task = task

    def make(self) -> None:
        """Makes them and puts the inputs in. Raises EngineError, OSError."""
        for folder in (self.inputs, self.outputs, self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
            # The program in the container may be any user.
            folder.chmod(0o777)
        os.utime(self.checkpoints)
        for index, reference in enumerate(references(self._task.fields)):
            files = self._task.inputs.get(reference)
            if not files:
                raise EngineError("INPUT_NOT_FOUND", f"inputs[{index}]: {reference} was not brought to the node")
            for file in files:
                self._put(file)

    def _put(self, file: InputFile) -> None:
        name = _UNFIT.sub("_", file.name)[-128:].lstrip(".") or file.path.name
        target, count = self.inputs / name, 1
        while target.exists():
            count += 1
            target = self.inputs / f"{count}-{name}"
        try:
            os.link(file.path, target)
        except OSError:
            shutil.copyfile(file.path, target)
        target.chmod(0o444)

    def collected(self) -> Iterator[EngineOutput]:
        """Each plain file of /outputs, by path. Links are left out: they could lead anywhere."""
        found = sorted(path for path in _files(self.outputs))
        if len(found) > _MOST_OUTPUTS:
            raise EngineError("ENGINE_FAILED", f"/outputs holds {len(found):,} files, more than {_MOST_OUTPUTS:,}")
        for path in found:
            yield EngineOutput(path, mimetypes.guess_type(path.name)[0] or "application/octet-stream")

    def forget(self) -> None:
        """The job has succeeded: nothing goes on from its checkpoints."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def checkpoints(data: Path) -> Path:
    """Where checkpoints of all jobs lie."""
    return data / "checkpoints"


def forget_old(data: Path) -> None:
    """Removes checkpoints of jobs that were not tried for a week."""
    with contextlib.suppress(OSError):
        for folder in checkpoints(data).iterdir():
            if folder.stat().st_mtime < time.time() - _KEPT_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, followlinks=False):
        for name in names:
            path = Path(root) / name
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
