"""The search index of outputs kept up with the store, and asked."""

from __future__ import annotations

import asyncio
import secrets
import sqlite3
from collections.abc import Sequence

import structlog
from fleet.v1 import types_pb2

from fleet_server.domain.errors import FleetError
from fleet_server.services.output_views import OutputViews
from fleet_server.storage.gallery_index import GalleryIndex, IndexRow, Span
from fleet_server.store import OutputRow, OutputStore, PageKey

_log = structlog.get_logger("fleet.gallery")
_CHUNK = 500
_SHOWN = ("image/", "video/")
SHOWN = "shown:1"
"""The mark of what a gallery shows: pictures and clips."""


class GalleryFeed:
    """Pages of outputs. What a caller knows to be stored is found: each page takes in what is new, in one command.

    `run` has to be running, so that there is never much that is new.
    """

    def __init__(
        self, outputs: OutputStore, index: GalleryIndex, views: OutputViews, *, pause_seconds: float = 2.0
    ) -> None:
        self._outputs = outputs
        self._index = index
        self._views = views
        self._pause_seconds = pause_seconds
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            try:
                await self.catch_up()
            except FleetError as error:
                _log.info("the gallery's index is behind", reason=error.reason, detail=error.detail)
            await asyncio.sleep(self._pause_seconds)

    async def page(
        self, span: Span, prompt: str, marks: Sequence[str], limit: int
    ) -> tuple[list[types_pb2.Output], PageKey | None]:
        """The newest outputs that fit, with metadata, and where the next page begins: None at the end.

        Raises STORE_UNAVAILABLE, DISK_FULL.
        """
        await self.catch_up()
        try:
            found = await self._index.page(span, prompt, marks, limit + 1)
        except sqlite3.OperationalError as error:
            raise _unusable(error) from error
        outputs = [self._views.restored(one.content) for one in found[:limit]]
        if len(found) <= limit:
            return outputs, None
        last = outputs[-1]
        return outputs, PageKey(last.create_time.ToMilliseconds(), last.filename)

    async def catch_up(self) -> None:
        """Takes in what has changed in the store. Raises STORE_UNAVAILABLE, DISK_FULL."""
        async with self._turn:
            while True:
                index = self._index
                news = await self._outputs.changes(index.place, _CHUNK, epoch=secrets.token_hex(8))
                lost = 0 < index.place < news.floor or index.place > news.newest
                try:
                    if index.place and (news.epoch != index.epoch or lost):
                        _log.info("the gallery's index is made anew from the store")
                        await index.clear(news.epoch)
                        continue
                    if news.rows:
                        rows = [(name, None if row is None else self._row(row)) for name, _, row in news.rows]
                        await index.apply(news.epoch, news.rows[-1][1], rows)
                except sqlite3.OperationalError as error:
                    raise _unusable(error) from error
                if len(news.rows) < _CHUNK:
                    return

    def _row(self, row: OutputRow) -> IndexRow:
        output = self._views.of(row)
        metadata = output.metadata
        marks = {f"model:{name}" for name in (metadata.model, metadata.resolved_model) if name}
        marks |= {f"node:{output.node_id}", f"job:{row.job_id}", f"starred:{int(row.starred)}"}
        if output.content_type.startswith(_SHOWN):
            marks.add(SHOWN)
        # The time by which the row is found is the one that pages go on from.
        output.create_time.FromMilliseconds(row.created_ms)
        content = self._views.kept(output, row)
        return IndexRow(row.filename, row.created_ms, metadata.prompt, sorted(marks), content)


def _unusable(error: sqlite3.OperationalError) -> FleetError:
    if "full" in str(error):
        return FleetError("DISK_FULL", "the server's disk is full: the gallery's index cannot be kept there")
    return FleetError("INTERNAL", f"the gallery's index cannot be used: {error}")
