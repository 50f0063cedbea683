"""The bytes of outputs, from the local disk or, where they are not there any more, from S3."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.outputs import LocalOutputs, OutputStat
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import NoObjectError
from fleet_server.store import OutputRow, OutputStore

_LOOK_SECONDS = 0.05


class OutputFiles:
    """Reads fall back from local to S3, and whoever asks does not notice.

    S3_UNAVAILABLE comes only where S3 alone has the file. `home` is this server: what another one has just stored is
    waited for, `patience_seconds` at most, since it is being copied.
    """

    def __init__(
        self, local: LocalOutputs, s3: S3Store, index: OutputStore, home: str = "", *, patience_seconds: float = 5.0
    ) -> None:
        self._local = local
        self._s3 = s3
        self._index = index
        self._home = home
        self._patience_seconds = patience_seconds

    async def read(self, filename: str) -> bytes | None:
        """The whole file; None if it is nowhere. Raises S3_UNAVAILABLE, INTERNAL where the copy in S3 is spoiled."""
        data = await self._local.read(filename)
        if data is not None:
            return data
        row = await self._far(filename)
        if row is None:
            return None
        try:
            data = await self._s3.read(OUTPUTS, row.object_key, limit=row.size_bytes)
        except NoObjectError:
            return None
        except FleetError as error:
            if error.reason == "INVALID_FIELD":
                raise _spoiled(row) from error
            raise
        wanted = types_pb2.Output.FromString(row.record).sha256
        if len(data) != row.size_bytes or (wanted and hashlib.sha256(data).hexdigest() != wanted):
            raise _spoiled(row)
        self._local.keep(filename, data)
        return data

    async def stat(self, filename: str) -> OutputStat | None:
        """What is known of the file; None if it is nowhere. Raises S3_UNAVAILABLE."""
        seen = await self._local.stat(filename)
        if seen is not None:
            return seen
        row = await self._far(filename)
        if row is None:
            return None
        found = await self._s3.stat(OUTPUTS, row.object_key)
        return None if found is None else OutputStat(filename, found.size_bytes, found.modified_ms)

    async def stream(self, filename: str, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Bytes from `start` to before `end`, at most 1 MiB at a time. Raises OUTPUT_NOT_FOUND, S3_UNAVAILABLE.

        Begun at one place it ends there: a file that is cleaned up meanwhile is read to its end.
        """
        at = start
        try:
            async with aclosing(self._local.stream(filename, start, end)) as near:
                async for chunk in near:
                    at += len(chunk)
                    yield chunk
            return
        except FleetError as error:
            if error.reason != "OUTPUT_NOT_FOUND" or at != start:
                raise
            row = await self._far(filename)
            if row is None:
                raise
        async with aclosing(self._s3.stream(OUTPUTS, row.object_key, start, end)) as far:
            async for chunk in far:
                yield chunk

    async def delete(self, filename: str) -> bool:
        """Removes the local file; whether there was one."""
        return await self._local.delete(filename)

    async def _far(self, filename: str) -> OutputRow | None:
        """The row of a file that S3 should have."""
        ends = time.monotonic() + self._patience_seconds
        while True:
            row = await self._index.get(filename)
            if row is None or row.synced:
                return row
            elsewhere = self._s3.on and row.home not in ("", self._home)
            if not elsewhere or time.monotonic() > ends:
                return None
            await asyncio.sleep(_LOOK_SECONDS)


def _spoiled(row: OutputRow) -> FleetError:
    return FleetError("INTERNAL", f"the copy of {row.filename} in S3 is spoiled: it has other bytes than were stored")
