"""A limit of memory for a slot's process and what it starts: beyond it the process ends itself, and the agent knows.


What is counted is resident memory, not addresses: libraries of GPUs reserve far more than they use.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path

import psutil

EXIT_CODE = 97
"""A child that ended with this code needed too much."""
_LOOK_SECONDS = 0.2
_OOM_SCORE = "500"


def go_first() -> None:
    """Where the machine itself runs out, the kernel ends this process rather than the agent."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)


def limit_memory(most_bytes: int) -> None:
    """Has a thread end this process once it takes more than that, with its children."""

    def watch() -> None:
        own = psutil.Process()
        while True:
            used = _used(own)
            if used > most_bytes:
                sys.stderr.write(f"the engine took {used:,} bytes of memory; it may have {most_bytes:,}\n")
                sys.stderr.flush()
                os._exit(EXIT_CODE)
            time.sleep(_LOOK_SECONDS)

    threading.Thread(target=watch, daemon=True, name="memory limit").start()


def _used(own: psutil.Process) -> int:
    used = 0
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            used += process.memory_info().rss
    return used
