"""Who waits on this replica for the end of which job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from contextlib import contextmanager

from fleet_server.domain.job import JobRecord


class Ending:
    """Tells when a job may have ended: look then. Also told where events were lost.

    `record` is how it ended, spec and result included, where the end was written down by this very process.
    """

    def __init__(self) -> None:
        self.record: JobRecord | None = None
        self._some = asyncio.Event()

    def tell(self, record: JobRecord | None = None) -> None:
        self.record = record or self.record
        self._some.set()

    async def wait(self, seconds: float) -> None:
        """Returns when told, or after so long at most; being told once lets one wait pass."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._some.wait()
        self._some.clear()


class Endings:
    """Those who wait, by job."""

    def __init__(self) -> None:
        self._waiting: dict[str, set[Ending]] = {}

    @contextmanager
    def expect(self, job_id: str) -> Iterator[Ending]:
        """Told of the end of a job from here on."""
        ending = Ending()
        self._waiting.setdefault(job_id, set()).add(ending)
        try:
            yield ending
        finally:
            left = self._waiting[job_id]
            left.discard(ending)
            if not left:
                del self._waiting[job_id]

    @property
    def awaited(self) -> bool:
        """Whether anybody waits."""
        return bool(self._waiting)

    def awaits(self, job_id: str) -> bool:
        """Whether anybody waits for the end of this job."""
        return job_id in self._waiting

    def tell(self, job_id: str, record: JobRecord | None = None) -> None:
        """The job has ended; `record`, whole, if that is known to be on the store's disk."""
        for ending in self._waiting.get(job_id, ()):
            ending.tell(record)

    def tell_all(self) -> None:
        """Any of them may have ended."""
        for job_id in self._waiting:
            self.tell(job_id)
