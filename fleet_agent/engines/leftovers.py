"""What a slot's process left running elsewhere, fallen or unable to end it: noted on disk, ended by who comes next."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path


class Leftovers:
    """Notes in `folder`, one for each process that has something under way: a prompt, a container."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def note(self, name: str) -> None:
        """This process has that under way. Best effort: a full disk does not stop it."""
        with contextlib.suppress(OSError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._path().write_text(json.dumps({"name": name}))

    def done(self) -> None:
        """It is over."""
        with contextlib.suppress(OSError):
            self._path().unlink(missing_ok=True)

    def give_up(self) -> None:
        """It could not be ended: that is for who comes next, this process too."""
        with contextlib.suppress(OSError):
            # No process has the number 0.
            self._path().rename(self._folder / f"0-{os.getpid()}-{time.time_ns()}.json")

    def end(self, cancel: Callable[[str], bool | None]) -> None:
        """Calls `cancel` with each name whose process is gone, or gave it up.

        Where that returns False, or raises, the name stays noted.
        """
        for path in self._folder.glob("*.json"):
            if _lives(path.stem):
                continue
            name = _noted(path)
            if name is not None and cancel(name) is False:
                continue
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _path(self) -> Path:
        return self._folder / f"{os.getpid()}-{_started(os.getpid())}.json"


def _noted(path: Path) -> str | None:
    """The name in a note; None where it has none."""
    try:
        return str(json.loads(path.read_text())["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _lives(stem: str) -> bool:
    """Whether the process that wrote the note is still there, and not another of its number."""
    pid, _, started = stem.partition("-")
    return pid.isdecimal() and _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process was started, in the kernel's ticks; "" where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
