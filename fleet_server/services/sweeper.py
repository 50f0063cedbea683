"""Copies outputs to S3 and removes local files that S3 verifiably has: file by file, in any state they are in.

Nothing here relies on what an earlier run remembers: a run that was cut short, at any point, is made good by the next.
A local file goes only right after the copy was proven by a checksum that the S3 server computed, or by reading it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import structlog
from fleet.v1 import types_pb2

from fleet_server.domain.errors import Code, FleetError
from fleet_server.services.sweep_tally import Tally
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.storage.s3 import S3Store
from fleet_server.store import OutputRow, PageKey, Store

_log = structlog.get_logger("fleet.sync")


@dataclass(frozen=True, slots=True)
class SweeperSettings:
    """`at_once` files are worked on together; `chunk` rows are read in one go; so many failures in a row that say that
    S3 is away end a sync, since the rest would fail alike."""

    at_once: int = 4
    chunk: int = 200
    failures_in_a_row: int = 4


class Sweeper:
    """The work of sync, cleanup and move on one server's files. `home` is this server."""

    def __init__(
        self, store: Store, local: LocalOutputs, s3: S3Store, home: str, settings: SweeperSettings | None = None
    ) -> None:
        self._store = store
        self._local = local
        self._s3 = s3
        self._home = home
        self._settings = settings or SweeperSettings()

    @property
    def off(self) -> bool:
        """Whether there is no S3 at all."""
        return not self._s3.on

    def check_s3(self) -> None:
        """Raises S3_UNAVAILABLE where it is known to be away, or off."""
        well, why = self._s3.status
        if not well:
            raise FleetError("S3_UNAVAILABLE", why or "S3 is not there")

    async def sync(self, tally: Tally, *, last: bool = True) -> bool:
        """Copies what S3 does not have. What it has by the index costs nothing. `last`: the copy is all there is to do.

        False where S3 went away meanwhile. Raises S3_UNAVAILABLE where it is away when it begins, STORE_UNAVAILABLE.
        """
        self.check_s3()
        local, _, _ = await self._store.syncs.counts(self._home)
        first, after = await self._store.syncs.unsynced(self._home, limit=self._settings.chunk)
        tally.total = local.files
        if last:
            waiting = await self._store.syncs.waiting(self._home)
            tally.skipped(max(0, local.files - waiting))
        away = _InARow(self._settings.failures_in_a_row)
        names = first
        while names:
            await self._each(names, lambda row: self._copy(row, tally, away, last), go_on=lambda: not away.reached)
            if after is None or away.reached:
                break
            names, after = await self._store.syncs.unsynced(self._home, after=after, limit=self._settings.chunk)
        return not away.reached

    async def clean(self, tally: Tally, before_ms: int | None) -> None:
        """Removes local files stored before a time (None: all) whose copy in S3 is proven now.

        Raises S3_UNAVAILABLE where S3 is away when it begins, STORE_UNAVAILABLE.
        """
        self.check_s3()
        after: PageKey | None = None
        local, _, _ = await self._store.syncs.counts(self._home)
        tally.total, tally.total_bytes = local.files, local.size_bytes
        away = _InARow(self._settings.failures_in_a_row)
        while True:
            names, after = await self._store.syncs.local(
                self._home, after=after, before_ms=before_ms, limit=self._settings.chunk
            )
            await self._each(names, lambda row: self._clean(row, tally, away), go_on=lambda: not away.reached)
            if after is None or away.reached:
                return

    async def _each(
        self, names: Sequence[str], work: Callable[[OutputRow], Awaitable[None]], *, go_on: Callable[[], bool]
    ) -> None:
        slots = asyncio.Semaphore(self._settings.at_once)

        async def one(row: OutputRow) -> None:
            async with slots:
                if go_on():
                    await work(row)

        rows = await self._store.outputs.get_many(names)
        try:
            async with asyncio.TaskGroup() as tasks:
                for row in rows:
                    if row is not None:
                        tasks.create_task(one(row))
        except ExceptionGroup as group:
            known, other = group.split(FleetError)
            if known is not None and other is None:
                # All of them say that the store is away.
                raise _first(known) from group
            raise

    async def _copy(self, row: OutputRow, tally: Tally, away: _InARow, last: bool) -> None:
        try:
            await self._upload(row)
        except FleetError as error:
            if error.reason == "STORE_UNAVAILABLE":
                raise
            away.note(error)
            await self._store.syncs.failed(row.filename, error.reason, error.detail)
            tally.failed(row.filename, error)
            _log.warning("an output was not copied to S3", filename=row.filename, reason=error.reason)
        else:
            away.clear()
            tally.uploaded(row.filename, row.size_bytes, last=last)

    async def _upload(self, row: OutputRow) -> None:
        """The bucket has the file, proven, and the index says so. Raises what kept it from that."""
        output = types_pb2.Output.FromString(row.record)
        if await self._local.stat(row.filename) is None:
            # Gone from the disk, perhaps after it was copied and before that was written down.
            if not await self._s3.verify(OUTPUTS, row.object_key, size=row.size_bytes, sha256=output.sha256):
                raise FleetError("OUTPUT_NOT_FOUND", "the file is not on this server's disk any more, nor in S3")
            if await self._store.syncs.synced(row.filename, row.object_key):
                await self._store.syncs.cleaned(row.filename)
            return
        if await self._local.sha256(row.filename) != output.sha256:
            # It must not go over a good copy.
            raise _mismatch("the file on this server's disk is spoiled: it has another hash than was stored")
        try:
            stored = await self._s3.put(
                OUTPUTS,
                row.object_key,
                self._local.path(row.filename),
                content_type=output.content_type,
                sha256=output.sha256,
            )
        except OSError as error:
            raise FleetError("INTERNAL", f"the file cannot be read: {error.strerror}") from error
        if stored.size_bytes != row.size_bytes or not stored.sha256_verified:
            raise _mismatch(stored.detail or f"S3 has {stored.size_bytes} bytes of {row.size_bytes}")
        await self._store.syncs.synced(row.filename, row.object_key)

    async def _clean(self, row: OutputRow, tally: Tally, away: _InARow) -> None:
        if not row.synced:
            tally.passed_by(row.filename)
            return
        try:
            proven = await self._proven(row)
        except FleetError as error:
            if error.reason == "STORE_UNAVAILABLE":
                raise
            away.note(error)
            tally.failed(row.filename, error)
            return
        away.clear()
        if not proven:
            if not tally.dry_run:
                # The next sync makes the copy good again.
                await self._store.syncs.unsynced_again(row.filename)
            tally.failed(
                row.filename,
                _mismatch("the copy in S3 is missing or spoiled: the local file is kept, and copied by the next sync"),
            )
            return
        if not tally.dry_run:
            await self._local.delete(row.filename)
            await self._store.syncs.cleaned(row.filename)
        tally.deleted(row.filename, row.size_bytes)

    async def _proven(self, row: OutputRow) -> bool:
        """Whether S3 has just those bytes, whatever the disk has."""
        sha256 = types_pb2.Output.FromString(row.record).sha256
        here = await self._local.sha256(row.filename)
        # Without a good local file there is no checksum to compare with: the object is read back.
        path = self._local.path(row.filename) if here == sha256 else None
        return await self._s3.verify(OUTPUTS, row.object_key, size=row.size_bytes, sha256=sha256, path=path)


def _first(group: BaseExceptionGroup[FleetError]) -> FleetError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _mismatch(detail: str) -> FleetError:
    return FleetError("CHECKSUM_MISMATCH", detail, code=Code.INTERNAL)


class _InARow:
    """Counts failures that say that S3 is away."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._count = 0

    def note(self, error: FleetError) -> None:
        self._count = self._count + 1 if error.reason == "S3_UNAVAILABLE" else 0

    def clear(self) -> None:
        self._count = 0

    @property
    def reached(self) -> bool:
        return self._count >= self._limit
