"""Files that callers bring for payloads to name; each row forgets itself when its time is over.

What a job that has not ended names stays: a submit and a retry count the job in the rows of its inputs, its end takes
that back, each in one step with what it does to the job.
"""

from __future__ import annotations

from fleet_server.store._room import Room
from fleet_server.store.client import gather
from fleet_server.store.file_records import InputRow
from fleet_server.store.records import pairs


class InputStore:
    """One row for each input."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def put(self, row: InputRow) -> None:
        """Adds a row, which is gone once its time is over and no job needs it."""
        await self._room.bulk.run(
            "input_put",
            [self._room.keys.input(row.input_id)],
            self._room.args(
                row.expire_ms, row.filename, row.content_type, row.size_bytes, row.sha256, row.home, row.key
            ),
        )

    async def get(self, input_id: str) -> InputRow | None:
        """One row, None if unknown or over."""
        (flat,) = await gather([self._room.bulk.post_call("HGETALL", self._room.keys.input(input_id))])
        if not flat:
            return None
        fields = pairs(flat)
        return InputRow(
            input_id,
            fields["f"].decode(),
            fields["t"].decode(),
            int(fields["s"]),
            fields["d"].decode(),
            fields["h"].decode(),
            fields["k"].decode(),
            int(fields["e"]),
            int(fields.get("n", 0)),
        )

    async def moved(self, input_id: str, key: str) -> bool:
        """From now on its file is in the bucket under `key`; False where there is no row any more."""
        reply = await self._room.bulk.run("input_moved", [self._room.keys.input(input_id)], self._room.args(key))
        return bool(reply)

    async def over(self, input_id: str, now_ms: int) -> bool:
        """Whether its file may go: its time is over and no job that has not ended names it. Then nobody finds it any
        more."""
        reply = await self._room.bulk.run("input_over", [self._room.keys.input(input_id)], self._room.args(now_ms))
        return bool(reply)
