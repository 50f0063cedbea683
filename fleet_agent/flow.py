"""Whether much is going on just now: then a few milliseconds of waiting make one message of many."""

from __future__ import annotations

import time

SPAN_SECONDS = 0.05
MANY = 60
GATHER_SECONDS = 0.005


class Flow:
    """Counts messages: up to five belong to an attempt, so that 240 attempts a second are much. GPUs make fewer."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._now = 0
        self._before = 0

    def note(self, count: int) -> None:
        """So many happened."""
        self._turn()
        self._now += count

    @property
    def busy(self) -> bool:
        """Whether many happened in the last moments."""
        self._turn()
        return max(self._now, self._before) >= MANY

    def _turn(self) -> None:
        now = time.monotonic()
        if now - self._begun >= SPAN_SECONDS:
            self._before = self._now if now - self._begun < 2 * SPAN_SECONDS else 0
            self._begun, self._now = now, 0
