"""How many bytes are free, for those who ask very often."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

FRESH_SECONDS = 0.1


class DiskRoom:
    """Of the disk that a folder lies on."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._looked_at = -math.inf
        self._free = 0

    def free(self) -> int:
        """Free bytes, as of a moment ago. Raises OSError."""
        now = self._clock()
        if now - self._looked_at > FRESH_SECONDS:
            self._free, self._looked_at = shutil.disk_usage(self._folder).free, now
        return self._free
