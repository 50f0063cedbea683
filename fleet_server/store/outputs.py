"""The index of outputs, newest first. Rows are written by JobStore.complete, in the step that ends the job."""

from __future__ import annotations

from collections.abc import Sequence

from fleet_server.store._room import Room
from fleet_server.store.client import gather
from fleet_server.store.records import OutputRow, PageKey, pairs

OutputRows = list[OutputRow]
MaybeRows = list[OutputRow | None]


def _row(filename: str, flat: Sequence[bytes] | None) -> OutputRow | None:
    if not flat:
        return None
    fields = pairs(flat)
    return OutputRow(filename, fields["j"].decode(), int(fields["c"]), int(fields["s"]), fields["r"])


class OutputStore:
    """One row for each file, whether its job is still kept or not. Deletes only what it is asked to."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def get(self, filename: str) -> OutputRow | None:
        """One row, None if unknown."""
        return (await self._rows([filename]))[0]

    async def list(self, *, before: PageKey | None = None, limit: int = 100) -> tuple[OutputRows, PageKey | None]:
        """All outputs, newest first; the key of the next page is None at the end."""
        names, following = await self._room.page([self._room.keys.outputs], before, limit)
        rows = await self._rows([name for name, _ in names])
        return [row for row in rows if row is not None], following

    async def by_job(self, job_id: str) -> OutputRows:
        """A job's outputs in the order in which it made them."""
        names = await self._room.bulk.call("ZRANGE", self._room.keys.job_outputs(job_id), 0, -1)
        return [row for row in await self._rows([name.decode() for name in names]) if row is not None]

    async def put(self, row: OutputRow) -> None:
        """Adds or replaces a row (a file found on disk, a rebuilt index)."""
        args = self._room.args(row.filename, row.job_id, row.created_ms, row.size_bytes, row.record)
        await self._room.bulk.run("output_put", [self._room.keys.output(row.filename)], args)

    async def update(self, filename: str, record: bytes) -> OutputRow | None:
        """Replaces the record of a row that is there (starred, moved, checked); the row afterwards."""
        return await self._run("output_update", filename, record)

    async def delete(self, filename: str) -> OutputRow | None:
        """Removes a row; as it was, None if unknown."""
        return await self._run("output_delete", filename, filename)

    async def _run(self, script: str, filename: str, value: str | bytes) -> OutputRow | None:
        flat = await self._room.bulk.run(script, [self._room.keys.output(filename)], self._room.args(value))
        return _row(filename, flat)

    async def _rows(self, filenames: Sequence[str]) -> MaybeRows:
        if not filenames:
            return []
        replies = await gather(
            [self._room.bulk.post_call("HGETALL", self._room.keys.output(filename)) for filename in filenames]
        )
        return [_row(filename, flat) for filename, flat in zip(filenames, replies, strict=True)]
