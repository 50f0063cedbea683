"""How many agents may say Hello a second: a herd that comes back at once is spread."""

from __future__ import annotations

import time
from collections.abc import Callable


class HelloBucket:
    """A bucket of tokens, filled at `per_second` and holding one second's worth."""

    def __init__(self, per_second: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._clock = clock
        self._tokens = max(1.0, per_second)
        self._at = clock()

    def wait_seconds(self) -> float:
        """0 and one is let in, or how long to stay away."""
        now = self._clock()
        self._tokens = min(max(1.0, self._per_second), self._tokens + (now - self._at) * self._per_second)
        self._at = now
        if self._tokens >= 1:
            self._tokens -= 1
            return 0.0
        return max(1.0, (1 - self._tokens) / self._per_second)
