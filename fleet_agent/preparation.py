"""What has to be done before an engine may begin: files to be brought, a lease to be surely ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from fleet_agent.attempt import Attempt
from fleet_agent.inputs import Downloader, Inputs
from fleet_agent.lease import Lease


class Preparation:
    """Keeps the attempts' files under `folder`; `downloader` gives that of the session, None while there is none."""

    def __init__(self, folder: Path, downloader: Callable[[], Downloader | None]) -> None:
        self._inputs = Inputs(folder, downloader)

    async def open(self) -> None:
        """Forgets what an earlier process left."""
        await asyncio.to_thread(self._inputs.clear)

    async def prepare(self, attempt: Attempt, on_lease_end: Callable[[], None]) -> None:
        """Returns when the engine may begin, or the attempt has been stopped meanwhile. Raises InputError."""
        assign = attempt.assign
        if not assign.inputs and not assign.exclusive:
            return
        if assign.exclusive:
            attempt.lease = Lease(on_lease_end)
        attempt.preparing = asyncio.create_task(self._prepare(attempt))
        try:
            # Not awaited itself: its cancellation by a stop is not ours.
            await asyncio.wait([attempt.preparing])
            if not attempt.preparing.cancelled():
                attempt.preparing.result()
        finally:
            attempt.preparing.cancel()

    async def _prepare(self, attempt: Attempt) -> None:
        if attempt.assign.inputs:
            attempt.task["inputs"] = await self._inputs.fetch(attempt.token, attempt.assign.inputs)
        if attempt.lease is not None:
            await attempt.lease.ours()
            attempt.task["lease_until"] = attempt.lease.until

    async def clean(self, attempt: Attempt) -> None:
        """The engine's run is over: its files go, its lease is watched no more."""
        if attempt.lease is not None:
            attempt.lease.close()
        if attempt.assign.inputs:
            await self._inputs.discard(attempt.token)
