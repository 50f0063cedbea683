"""The index of outputs, newest first. Rows are written by JobStore.complete, in the step that ends the job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fleet_server.store._room import Room
from fleet_server.store.client import gather
from fleet_server.store.file_records import OutputChanges, OutputRow
from fleet_server.store.records import PageKey, pairs

OutputRows = list[OutputRow]
MaybeRows = list[OutputRow | None]


def decode_output(filename: str, flat: Sequence[bytes] | None) -> OutputRow | None:
    """A row as scripts return it."""
    if not flat:
        return None
    fields = pairs(flat)
    return OutputRow(
        filename,
        fields["j"].decode(),
        int(fields["c"]),
        int(fields["s"]),
        fields["r"],
        key=fields.get("k", b"").decode(),
        making=fields.get("m", b""),
        home=fields.get("h", b"").decode(),
        local=fields.get("l", b"1") == b"1",
        synced=fields.get("y") == b"1",
        starred=fields.get("t") == b"1",
    )


class OutputStore:
    """One row for each file, whether its job is still kept or not. Deletes only what it is asked to."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def get(self, filename: str) -> OutputRow | None:
        """One row, None if unknown."""
        return (await self.get_many([filename]))[0]

    async def list(self, *, before: PageKey | None = None, limit: int = 100) -> tuple[OutputRows, PageKey | None]:
        """All outputs, newest first; the key of the next page is None at the end."""
        names, following = await self._room.page([self._room.keys.outputs], before, limit)
        rows = await self.get_many([name for name, _ in names])
        return [row for row in rows if row is not None], following

    async def by_job(self, job_id: str) -> OutputRows:
        """A job's outputs in the order in which it made them."""
        names = await self._room.bulk.call("ZRANGE", self._room.keys.job_outputs(job_id), 0, -1)
        return [row for row in await self.get_many([name.decode() for name in names]) if row is not None]

    async def put(self, row: OutputRow) -> None:
        """Adds a row, or replaces its record: where a file is and whether it has a star stays as it is."""
        args = self._room.args(
            row.filename, row.job_id, row.created_ms, row.size_bytes, row.record, row.key, row.making, row.home
        )
        await self._room.bulk.run("output_put", [self._room.keys.output(row.filename)], args)

    async def update(self, filename: str, record: bytes) -> OutputRow | None:
        """Replaces the record of a row that is there; the row afterwards."""
        return await self._run("output_update", filename, "r", record)

    async def star(self, filename: str, starred: bool) -> OutputRow | None:
        """Gives a row that is there a star, or takes it away; the row afterwards."""
        return await self._run("output_update", filename, "t", "1" if starred else "0")

    async def delete(self, filename: str, *, in_bucket: bool = False) -> OutputRow | None:
        """Removes a row; as it was, None if unknown. From then on its file is one of `SyncStore.leaving`.

        `in_bucket`: the bucket may hold the file even where the row does not say so.
        """
        return await self._run("output_delete", filename, "1" if in_bucket else "0")

    async def changes(self, since: int, limit: int, *, epoch: str) -> OutputChanges:
        """The rows that changed after the change number `since`, at most `limit`, in the order of their changes.

        One command, whatever the size of the index. `epoch` is given to an index that has none.
        """
        reply = await self._room.bulk.run(
            "output_changes", [self._room.keys.output_totals], self._room.args(since, limit, epoch)
        )
        return _changes(reply)

    async def get_many(self, filenames: Sequence[str]) -> MaybeRows:
        """Rows in the order asked, None for each that is unknown."""
        if not filenames:
            return []
        replies = await gather(
            [self._room.bulk.post_call("HGETALL", self._room.keys.output(filename)) for filename in filenames]
        )
        return [decode_output(filename, flat) for filename, flat in zip(filenames, replies, strict=True)]

    async def _run(self, script: str, filename: str, *values: str | bytes) -> OutputRow | None:
        args = self._room.args(filename, *values)
        return decode_output(filename, await self._room.bulk.run(script, [self._room.keys.output(filename)], args))


def _changes(reply: Any) -> OutputChanges:
    epoch, floor, newest, *rest = reply
    rows = []
    for i in range(0, len(rest), 3):
        filename = rest[i].decode()
        rows.append((filename, int(rest[i + 1]), decode_output(filename, rest[i + 2])))
    return OutputChanges(epoch.decode(), int(floor), int(newest), tuple(rows))
