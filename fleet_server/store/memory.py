"""Refuses submits before the store's memory is full."""

from __future__ import annotations

import asyncio

from fleet_server.domain.errors import FleetError
from fleet_server.store.client import Client

FULL_SHARE = 0.8
FRESH_SECONDS = 1.0


def parse_info(text: bytes) -> dict[str, str]:
    """The fields of an INFO reply."""
    lines = (line.partition(":") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, colon, value in lines if colon}


class MemoryGuard:
    """Reads used and maximal memory at most once a second."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._read_at = float("-inf")
        self._last = (0, 0)

    async def read(self) -> tuple[int, int]:
        """(used, max) bytes now; max 0: no limit is set."""
        info = parse_info(await self._client.call("INFO", "memory"))
        self._last = (int(info.get("used_memory", 0)), int(info.get("maxmemory", 0)))
        return self._last

    async def admit(self) -> None:
        """Raises QUEUE_FULL at 80 % of the limit, by a reading at most a second old."""
        now = asyncio.get_running_loop().time()
        if now - self._read_at >= FRESH_SECONDS:
            self._read_at = now
            await self.read()
        used, most = self._last
        if most and used > most * FULL_SHARE:
            raise FleetError(
                "QUEUE_FULL",
                f"the store uses {used} of {most} bytes and takes no new jobs above {FULL_SHARE:.0%}; submit again "
                "later or raise its maxmemory",
            )
