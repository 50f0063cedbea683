"""Processes of this machine, found and killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_LOOKS = 50
_PAUSE_SECONDS = 0.02


def kill_all(wanted: Callable[[int], bool]) -> int:
    """Kills every process that is wanted; how many were found. Blocks for a second at the most.

    What is being started while one looks is found by looking again, until there is none; what cannot be killed, another
    user's say, is given up.
    """
    killed: set[int] = set()
    for _ in range(_LOOKS):
        found = [pid for pid in _pids() if wanted(pid)]
        if not found:
            break
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
        time.sleep(_PAUSE_SECONDS)
    return len(killed)


def in_session(pid: int, leader: int) -> bool:
    """Whether it belongs to the leader's session and has not ended."""
    try:
        # After the name, which may hold anything: state, parent, process group, session.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(fields[3]) == leader and fields[0] not in "ZX"


def marked(pid: int, mark: str, container_id: str) -> bool:
    """Whether it runs in the container and was started with that variable."""
    try:
        place = Path(f"/proc/{pid}/cgroup").read_text()
        return container_id in place and mark.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
