"""How long a failed job waits before its next attempt. Pure."""

from __future__ import annotations

FIRST_MS = 1_000
LAST_MS = 60_000


def backoff_ms(attempt: int, draw: float = 0.5, *, first_ms: int = FIRST_MS) -> int:
    """The wait after failure number `attempt` (from 1): doubling from `first_ms` to 60 s, +-20 % by `draw` (0 to 1)."""
    doubled = first_ms * 2 ** min(max(attempt, 1) - 1, 16)
    return int(min(doubled, LAST_MS) * (0.8 + 0.4 * draw))
