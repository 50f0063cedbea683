"""Ends of attempts on their way into the spool, and out of it at the same time."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import structlog
from fleet.v1 import node_pb2

from fleet_agent.attempt import Attempt, failure
from fleet_agent.deliveries import Deliveries
from fleet_agent.spool import BadOutputError, Spool, SpoolEntry

_log = structlog.get_logger("fleet.agent")
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Keeper:
    """Keeps ends. At most one more than `slots` are being written by `keep_meanwhile` when `keep` returns another."""

    def __init__(self, spool: Spool, deliveries: Deliveries, slots: int) -> None:
        self._spool = spool
        self._deliveries = deliveries
        self._slots = slots
        self._keeping: set[asyncio.Task[None]] = set()

    async def aclose(self) -> None:
        """Returns when all is written."""
        await asyncio.gather(*self._keeping)

    async def keep(
        self, attempt: Attempt, complete: node_pb2.JobComplete, outputs: list[tuple[Path, str]]
    ) -> SpoolEntry:
        """Puts an end into the spool; where its files do not fit, the end is a failure.

        An entry without files is for `keep_meanwhile`; the files of another are on their way to the server already.
        """
        try:
            return await self._keep(complete, outputs)
        except BadOutputError as error:
            complete = failure(attempt, "ENGINE_FAILED", str(error), True)
        except OSError as error:
            _log.error("an end could not be spooled", job_id=attempt.assign.job_id, error=str(error))
            reason = "DISK_FULL" if error.errno in _DISK_FULL else "ENGINE_FAILED"
            complete = failure(attempt, reason, f"the node could not keep the outputs: {error.strerror}", True)
        await asyncio.to_thread(self._spool.discard, attempt.token)
        return await self._keep(complete, [])

    async def _keep(self, complete: node_pb2.JobComplete, outputs: list[tuple[Path, str]]) -> SpoolEntry:
        stage = self._spool.stage
        entry = await asyncio.to_thread(stage, complete, outputs) if outputs else stage(complete, outputs)
        if not entry.files:
            # Where the disk is slow, its slot waits for it.
            while len(self._keeping) > self._slots:
                await asyncio.wait(self._keeping, return_when=asyncio.FIRST_COMPLETED)
            return entry
        self._deliveries.begin(entry)
        try:
            await asyncio.to_thread(self._spool.commit, entry)
        except BaseException:
            self._deliveries.abandon(entry.token)
            raise
        return entry

    def keep_meanwhile(self, entry: SpoolEntry) -> None:
        """Writes an end without files down while it is being said."""

        async def keep() -> None:
            try:
                await self._spool.keep(entry.complete)
            except OSError as error:
                _log.error(
                    "an end is not on the disk: if this agent ends before the server has it, it is lost",
                    job_id=entry.complete.job_id,
                    error=str(error),
                )

        task = asyncio.create_task(keep(), name=f"keep {entry.token}")
        self._keeping.add(task)
        task.add_done_callback(self._keeping.discard)
