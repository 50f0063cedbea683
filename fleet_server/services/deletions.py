"""Outputs that are to be gone everywhere, and are tried again until they are."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from fleet_server.domain.errors import FleetError
from fleet_server.services.shield import Shield
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.outputs import LocalOutputs
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.thumbnails import Thumbnails
from fleet_server.store import Leaving, OutputRow, Store

_log = structlog.get_logger("fleet.deletions")
_WORDS = {"L": "local", "S": "s3", "T": "thumbnail"}


@dataclass(frozen=True, slots=True)
class Removal:
    """What a deletion removed, and what it could not reach yet: local, s3, thumbnail, index."""

    removed: tuple[str, ...]
    pending: tuple[str, ...]


class Deletions:
    """The index forgets first, in one step that also writes down where the file still is: a deletion that was cut short
    is finished by `run`, of this server or, for files on its disk, of the output's own."""

    def __init__(
        self,
        store: Store,
        local: LocalOutputs,
        thumbnails: Thumbnails,
        s3: S3Store,
        home: str,
        *,
        pause_seconds: float = 30.0,
    ) -> None:
        self._store = store
        self._local = local
        self._thumbnails = thumbnails
        self._s3 = s3
        self._home = home
        self._pause_seconds = pause_seconds
        self._wanted = asyncio.Event()
        self._shield = Shield()

    async def aclose(self) -> None:
        """Waits for the deletions under way."""
        await self._shield.aclose(2.0)

    async def delete(self, filename: str) -> Removal | None:
        """Removes an output; None if there is none. Finished even if the caller leaves. Raises STORE_UNAVAILABLE."""
        return await self._shield.run(self._delete(filename))

    async def _delete(self, filename: str) -> Removal | None:
        row = await self._store.outputs.delete(filename, in_bucket=self._s3.on)
        if row is None:
            return None
        leaving = await self._store.syncs.leaving_of(filename)
        done, pending = await self._remove(leaving, row) if leaving is not None else ([], [])
        return Removal((*done, "index"), tuple(pending))

    def wake(self) -> None:
        """S3 may be back: try again now. Never waits."""
        self._wanted.set()

    async def run(self) -> None:
        """Tries what is left again and again, until cancelled."""
        while True:
            try:
                for leaving in await self._store.syncs.leaving():
                    await self._remove(leaving, None)
            except FleetError as error:
                _log.info("deletions wait", reason=error.reason, detail=error.detail)
            try:
                async with asyncio.timeout(self._pause_seconds):
                    await self._wanted.wait()
            except TimeoutError:
                pass
            self._wanted.clear()

    async def _remove(self, leaving: Leaving, row: OutputRow | None) -> tuple[list[str], list[str]]:
        """Removes what can be reached: what was there and is gone now, and what is left."""
        gone = ""
        done: list[str] = []
        pending: list[str] = []
        for place in leaving.places:
            try:
                there = await self._remove_from(place, leaving)
            except (FleetError, OSError) as error:
                _log.info("an output cannot be removed yet", filename=leaving.filename, place=place, detail=str(error))
                pending.append(_WORDS[place])
                continue
            gone += place
            # Of the bucket we know it by the index; to ask it would cost a request.
            if there if place != "S" else row is not None and row.synced:
                done.append(_WORDS[place])
        if gone:
            await self._store.syncs.gone(leaving.filename, gone)
        return done, pending

    async def _remove_from(self, place: str, leaving: Leaving) -> bool:
        if place == "S":
            await self._s3.delete(OUTPUTS, leaving.key or leaving.filename)
            return True
        if place == "T":
            return await self._thumbnails.delete(leaving.filename)
        there = await self._local.delete(leaving.filename)
        if not there and leaving.home not in ("", self._home):
            raise FleetError("OUTPUT_NOT_FOUND", f"it is on the disk of the server {leaving.home}")
        return there
