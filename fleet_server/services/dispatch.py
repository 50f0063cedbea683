"""Gives waiting jobs to free slots: one loop a replica, woken by submits and by freed slots."""

from __future__ import annotations


class Dispatcher:
    """`wake()` is cheap and may be called from anywhere in the loop's thread; `run()` is one task."""

    def wake(self) -> None:
        """Something changed: jobs wait or slots are free. Never waits; many wakes are one round."""
        raise NotImplementedError

    async def run(self) -> None:
        """Rounds until cancelled."""
        raise NotImplementedError
