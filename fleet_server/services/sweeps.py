"""Sync, cleanup and move, started by callers and the clock: one at a time, and joined by whoever comes second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog
from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.shield import Shield
from fleet_server.services.sweep_tally import Tally
from fleet_server.services.sweeper import Sweeper
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.store import OutputCounts, Store

_log = structlog.get_logger("fleet.sync")
_MOST_FAILURES = 100
_HOUR_MS = 3_600_000


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """`eager`: each output is copied as soon as it is stored. `max_age_hours` is how long local files are kept by the
    cleanup that follows each timed sync. After a sync with failures the next one comes in `retry_seconds`."""

    interval_seconds: float = 900
    max_age_hours: float = 24
    eager: bool = False
    retry_seconds: float = 60


class Sweeps:
    """`run` has to be running for the timed ones. Work that has begun goes on when its caller leaves."""

    def __init__(
        self,
        store: Store,
        local: LocalOutputs,
        sweeper: Sweeper,
        home: str,
        *,
        clock: Callable[[], int],
        tell: Callable[[types_pb2.OperationProgress], None] = lambda _: None,
        settings: SweepSettings | None = None,
    ) -> None:
        self._store = store
        self._local = local
        self._sweeper = sweeper
        self._home = home
        self._clock = clock
        self._tell = tell
        self._settings = settings or SweepSettings()
        self._shield = Shield()
        self._turn = asyncio.Lock()
        self._running: dict[tuple[object, ...], asyncio.Task[types_pb2.Sweep]] = {}
        self._wanted = asyncio.Event()
        self._next_ms = clock() + int(self._settings.interval_seconds * 1000)

    async def aclose(self) -> None:
        """Gives the sweep under way a moment, then stops it where it is: the next one goes on."""
        await self._shield.aclose(1.0)

    # What callers ask for.

    async def sync(self, request_id: str | None = None) -> types_pb2.Sweep:
        """Copies local outputs to S3. Raises S3_UNAVAILABLE, STORE_UNAVAILABLE."""
        return await self._join(("sync",), lambda: self._sync(request_id))

    async def cleanup(self, max_age_hours: float, *, dry_run: bool, request_id: str | None = None) -> types_pb2.Sweep:
        """Removes local files older than that, where S3 verifiably has them. Raises as `sync`."""
        key = ("cleanup", max_age_hours, dry_run)
        return await self._join(key, lambda: self._cleanup(max_age_hours, dry_run, request_id))

    async def move(self, request_id: str | None = None) -> types_pb2.Sweep:
        """Copies all, then removes what S3 verifiably has, at any age. Raises as `sync`."""
        return await self._join(("move",), lambda: self._move(request_id))

    async def stats(self) -> fleet_pb2.GetOutputStatsResponse:
        """How many outputs are where. Answers with S3 away too."""
        local, bucket, unsynced = await self._store.syncs.counts(self._home)
        failures = await self._store.syncs.failures(_MOST_FAILURES)
        last = await self._store.syncs.last_sweep()
        reply = fleet_pb2.GetOutputStatsResponse(
            local=_counts(local),
            s3=_counts(bucket),
            unsynced=_counts(unsynced),
            disk_free_bytes=self._local.free_bytes(),
            sync_interval_seconds=round(self._settings.interval_seconds),
            max_age_hours=self._settings.max_age_hours,
        )
        reply.next_sync_time.FromMilliseconds(self._next_ms)
        if last is not None:
            reply.last_sync.ParseFromString(last)
        for failure in failures:
            one = reply.failures.add(
                filename=failure.filename, reason=failure.reason, detail=failure.detail, attempts=failure.attempts
            )
            one.create_time.FromMilliseconds(failure.created_ms)
        return reply

    # What the clock starts.

    def stored(self) -> None:
        """An output has been stored. Never waits."""
        if self._settings.eager:
            self._wanted.set()

    def wake(self) -> None:
        """S3 may be back: sync now. Never waits."""
        self._wanted.set()

    async def run(self) -> None:
        """Syncs in time, and what is old enough is cleaned up after; until cancelled."""
        await self._adopt()
        while not self._sweeper.off:
            timed = not await self._due()
            if timed:
                self._next_ms = self._clock() + int(self._settings.interval_seconds * 1000)
            trouble = False
            try:
                if (await self._store.syncs.waiting(self._home)) or timed:
                    sweep = await self.sync()
                    trouble = sweep.failed > 0
                if timed:
                    await self.cleanup(self._settings.max_age_hours, dry_run=False)
            except FleetError as error:
                # S3 coming back wakes us, too.
                trouble = True
                _log.info("outputs wait to be copied to S3", reason=error.reason, detail=error.detail)
            if trouble:
                self._next_ms = min(self._next_ms, self._clock() + int(self._settings.retry_seconds * 1000))

    async def _due(self) -> bool:
        """Waits for the next sync; whether it was asked for before its time."""
        seconds = max(0.0, (self._next_ms - self._clock()) / 1000)
        try:
            async with asyncio.timeout(seconds):
                await self._wanted.wait()
        except TimeoutError:
            return False
        self._wanted.clear()
        return True

    async def _adopt(self) -> None:
        """Rows of an older version become files of this server's disk, once."""
        before = None
        while True:
            try:
                rows, before = await self._store.outputs.list(before=before, limit=500)
                old = [row.filename for row in rows if not row.home]
                here = [name for name in old if await self._local.stat(name) is not None]
                await self._store.syncs.adopt(self._home, here)
            except FleetError:
                await asyncio.sleep(1)
                continue
            if before is None or not old:
                return

    # The work, one at a time.

    async def _join(self, key: tuple[object, ...], work: Callable[[], Awaitable[types_pb2.Sweep]]) -> types_pb2.Sweep:
        task = self._running.get(key)
        if task is None:
            task = self._shield.start(self._alone(work))
            self._running[key] = task
            task.add_done_callback(lambda _: self._running.pop(key, None))
        return await asyncio.shield(task)

    async def _alone(self, work: Callable[[], Awaitable[types_pb2.Sweep]]) -> types_pb2.Sweep:
        self._sweeper.check_s3()
        async with self._turn:
            return await work()

    def _tally(self, operation: str, request_id: str | None, dry_run: bool = False) -> Tally:
        return Tally(operation, clock=self._clock, tell=self._tell, request_id=request_id, dry_run=dry_run)

    async def _sync(self, request_id: str | None) -> types_pb2.Sweep:
        tally = self._tally("sync", request_id)
        began = time.monotonic()
        await self._sweeper.sync(tally)
        sweep = tally.end()
        await self._store.syncs.keep_sweep(sweep.SerializeToString())
        if sweep.uploaded or sweep.failed:
            _log.info(
                "outputs copied to S3",
                uploaded=sweep.uploaded,
                failed=sweep.failed,
                seconds=round(time.monotonic() - began, 1),
            )
        return sweep

    async def _cleanup(self, max_age_hours: float, dry_run: bool, request_id: str | None) -> types_pb2.Sweep:
        tally = self._tally("cleanup", request_id, dry_run)
        await self._sweeper.clean(tally, self._clock() - int(max_age_hours * _HOUR_MS))
        sweep = tally.end()
        if sweep.deleted and not dry_run:
            _log.info("local files of outputs removed, S3 has them", deleted=sweep.deleted, bytes=sweep.deleted_bytes)
        return sweep

    async def _move(self, request_id: str | None) -> types_pb2.Sweep:
        tally = self._tally("move", request_id)
        if await self._sweeper.sync(tally, last=False):
            await self._sweeper.clean(tally, None)
        return tally.end()


def _counts(counts: OutputCounts) -> fleet_pb2.FileCounts:
    return fleet_pb2.FileCounts(files=counts.files, size_bytes=counts.size_bytes)
