"""The lease of exclusive work, judged on this machine's clock so that it ends here before the server may give it away.

The server renews a lease when it takes a heartbeat that names the attempt. What we know of it is later and less: an
acknowledged heartbeat was sent at a time of ours, and the lease lasts at least from then. Of that span only a share is
used (25 of 30 seconds), so that killing has time. Without an acknowledgement nothing is begun.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


class Lease:
    """Until when an exclusive attempt may run. `on_end` is called once when that time has come."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self.until = 0.0
        self._on_end = on_end
        self._ours = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._over = False

    def renew(self, until: float) -> bool:
        """The lease is ours until then (monotonic). False where that is no gain, or it has run out before."""
        if self._over or until <= self.until:
            return False
        loop = asyncio.get_running_loop()
        self.until = until
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_later(max(0.0, until - time.monotonic()), self._end)
        self._ours.set()
        return True

    async def ours(self) -> None:
        """Returns once the lease is surely ours."""
        await self._ours.wait()

    def close(self) -> None:
        """The attempt is over; nothing is called any more."""
        self._over = True
        if self._timer is not None:
            self._timer.cancel()

    @property
    def lost(self) -> bool:
        """Whether the time is over. The engine's process may have been ended by its own timer a moment before ours."""
        return self.until > 0 and time.monotonic() >= self.until - 0.05

    def _end(self) -> None:
        if not self._over:
            self._over = True
            self._on_end()
