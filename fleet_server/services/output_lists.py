"""What the folder, or the bucket, really holds, whatever the index says."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from fleet.v1 import fleet_pb2, types_pb2

from fleet_server.services.output_views import OutputViews
from fleet_server.services.pages import page_key_of, token_of
from fleet_server.storage.buckets import OUTPUTS
from fleet_server.storage.outputs import LocalOutputs, OutputStat
from fleet_server.storage.s3 import S3Store
from fleet_server.storage.s3_types import ObjectStat
from fleet_server.store import OutputRow, OutputStore, PageKey

_REQUEST = 1_000
_CHUNK = 500


class OutputLists:
    """Pages of `list?source=`, newest first."""

    def __init__(self, outputs: OutputStore, local: LocalOutputs, s3: S3Store, views: OutputViews) -> None:
        self._outputs = outputs
        self._local = local
        self._s3 = s3
        self._views = views

    async def page(self, request: fleet_pb2.ListOutputsRequest) -> tuple[list[types_pb2.Output], str]:
        """A page and the next one's token. Raises INVALID_PAGE_TOKEN, S3_UNAVAILABLE."""
        before = page_key_of(request)
        if request.source == "local":
            outputs, following = await self._of_folder(request.prefix, before, request.limit)
        else:
            outputs, following = await self._of_bucket(request.prefix, before, request.limit)
        return outputs, token_of(request, following)

    async def _of_bucket(
        self, prefix: str, before: PageKey | None, limit: int
    ) -> tuple[list[types_pb2.Output], PageKey | None]:
        """S3 lists by name: the newest are found by looking at all, one request for each 1,000, keeping one page."""
        newest: list[tuple[int, str, ObjectStat]] = []
        after = ""
        while True:
            objects = await self._s3.list(OUTPUTS, prefix, after, _REQUEST)
            fresh = [(one.modified_ms, one.key, one) for one in objects]
            fresh = [one for one in fresh if before is None or one[:2] < (before.time_ms, before.member)]
            newest = heapq.nlargest(limit + 1, [*newest, *fresh], key=lambda one: one[:2])
            if len(objects) < _REQUEST:
                break
            after = objects[-1].key
        page = newest[:limit]
        rows = await self._outputs.get_many([key.rpartition("/")[2] for _, key, _ in page])
        outputs = [
            self._views.of(row) if row is not None and row.object_key == key else self._views.of_object(found)
            for (_, key, found), row in zip(page, rows, strict=True)
        ]
        return outputs, PageKey(*page[-1][:2]) if len(newest) > limit else None

    async def _of_folder(
        self, prefix: str, before: PageKey | None, limit: int
    ) -> tuple[list[types_pb2.Output], PageKey | None]:
        """Files lie side by side; a prefix is one of their names in the bucket."""
        files = [
            one
            for one in await self._local.listing()
            if before is None or (one.modified_ms, one.filename) < (before.time_ms, before.member)
        ]
        found: list[tuple[OutputStat, OutputRow | None]] = []
        for start in range(0, len(files), _CHUNK):
            part = files[start : start + _CHUNK]
            rows = await self._outputs.get_many([one.filename for one in part])
            found += _named(part, rows, lambda name: name.startswith(prefix))
            if len(found) > limit:
                break
        page = found[:limit]
        outputs = [
            self._views.of(row)
            if row is not None
            else self._views.of_file(one.filename, one.size_bytes, one.modified_ms)
            for one, row in page
        ]
        if len(found) <= limit:
            return outputs, None
        return outputs, PageKey(page[-1][0].modified_ms, page[-1][0].filename)


def _named(
    files: Sequence[OutputStat], rows: Sequence[OutputRow | None], fits: Callable[[str], bool]
) -> list[tuple[OutputStat, OutputRow | None]]:
    return [
        (one, row)
        for one, row in zip(files, rows, strict=True)
        if fits(row.object_key if row is not None else one.filename)
    ]
