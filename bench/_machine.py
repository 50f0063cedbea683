"""Where and on what a benchmark ran, printed above its results."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent


def heading() -> str:
    """Commit, date, machine and load, one line each."""
    now = datetime.datetime.now(datetime.UTC)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"commit {_commit()}, {now:%Y-%m-%d %H:%M} UTC\n"
        f"{os.cpu_count()} cores, {_processor()}, {platform.system()}, Python {platform.python_version()}\n"
        f"load average before: {load}\n"
    )


def core_waits(pid: int | None = None) -> float:
    """Seconds that the main thread of a process (ours) was ready to run and had no core, since its start.

    NaN where the kernel does not tell. A machine that others use shows here, not in CPU time.
    """
    try:
        words = Path(f"/proc/{pid or os.getpid()}/schedstat").read_text().split()
        return int(words[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return math.nan


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "fleet_server", "fleet_agent", "bench")
        return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")
    except OSError:
        return "unknown"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
