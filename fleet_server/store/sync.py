"""Which outputs are where: on servers' disks, verified in the bucket, still to be removed. Every step is one script."""

from __future__ import annotations

from collections.abc import Sequence

from fleet_server.store._room import Room
from fleet_server.store.client import gather
from fleet_server.store.file_records import Leaving, OutputCounts, OutputFailure
from fleet_server.store.records import PageKey, pairs

FailureList = list[OutputFailure]
Names = list[str]


class SyncStore:
    """The book of copies. `home` is always the name of the server on whose disk files are."""

    def __init__(self, room: Room) -> None:
        self._room = room

    async def unsynced(
        self, home: str, *, after: PageKey | None = None, limit: int = 500
    ) -> tuple[Names, PageKey | None]:
        """Files of a server that are not known to be in the bucket, oldest first, after a place; the next place."""
        return await self._oldest(self._room.keys.output_unsynced(home), after, limit, None)

    async def waiting(self, home: str) -> int:
        """How many files of a server are not known to be in the bucket."""
        found: int = await self._room.bulk.call("ZCARD", self._room.keys.output_unsynced(home))
        return found

    async def local(
        self, home: str, *, after: PageKey | None = None, before_ms: int | None = None, limit: int = 500
    ) -> tuple[Names, PageKey | None]:
        """Files on a server's disk, oldest first, after a place, stored before a time; the next place."""
        return await self._oldest(self._room.keys.output_local(home), after, limit, before_ms)

    async def synced(self, filename: str, key: str) -> bool:
        """The bucket was seen to hold the file, unharmed, under this key. Again: the same.

        False: it was deleted meanwhile, and its object is one of `leaving` now.
        """
        return bool(await self._run("output_synced", filename, key))

    async def unsynced_again(self, filename: str) -> bool:
        """The bucket's copy is missing or spoiled: the local one is to be copied again. False where there is none."""
        return bool(await self._run("output_unsynced", filename))

    async def cleaned(self, filename: str) -> bool:
        """The local file is gone. False, and no change, where the bucket is not known to hold it."""
        return bool(await self._run("output_cleaned", filename))

    async def failed(self, filename: str, reason: str, detail: str) -> int:
        """A copy failed; how often so far, 0 where the file does not wait any more."""
        return int(await self._run("output_failed", filename, reason, detail))

    async def adopt(self, home: str, filenames: Sequence[str]) -> int:
        """Takes rows that know of no server as files of this one; how many were."""
        if not filenames:
            return 0
        return int(
            await self._room.bulk.run("output_adopt", [self._room.keys.outputs], self._room.args(home, *filenames))
        )

    async def counts(self, home: str) -> tuple[OutputCounts, OutputCounts, OutputCounts]:
        """Files on the server's disk; in the bucket; on any disk and not in the bucket."""
        names = (f"local:{home}", "s3", "unsynced")
        fields = [f"{name}:{what}" for name in names for what in ("files", "bytes")]
        found = await self._room.bulk.call("HMGET", self._room.keys.output_totals, *fields)
        numbers = [int(value or 0) for value in found]
        local, bucket, waiting = (OutputCounts(*numbers[i : i + 2]) for i in (0, 2, 4))
        return local, bucket, waiting

    async def failures(self, limit: int = 100) -> FailureList:
        """Outputs whose copy failed and that still wait, oldest first."""
        names = [
            name.decode() for name in await self._room.bulk.call("ZRANGE", self._room.keys.output_failed, 0, limit - 1)
        ]
        if not names:
            return []
        rows = await gather(
            [self._room.bulk.post_call("HMGET", self._room.keys.output(name), "fr", "fd", "fa", "c") for name in names]
        )
        return [
            OutputFailure(name, row[0].decode(), row[1].decode(), int(row[2]), int(row[3]))
            for name, row in zip(names, rows, strict=True)
            if row[0] is not None
        ]

    async def keep_sweep(self, sweep: bytes) -> None:
        """Remembers the last sync."""
        await self._room.bulk.call("HSET", self._room.keys.output_totals, "sweep", sweep)

    async def last_sweep(self) -> bytes | None:
        """What `keep_sweep` was given last."""
        found: bytes | None = await self._room.bulk.call("HGET", self._room.keys.output_totals, "sweep")
        return found

    async def leaving(self, limit: int = 1_000) -> list[Leaving]:
        """Deleted outputs whose files are not all gone, some of them."""
        _, flat = await self._room.bulk.call("HSCAN", self._room.keys.output_leaving, 0, "COUNT", limit)
        return [_leaving(name, entry) for name, entry in pairs(flat).items()]

    async def leaving_of(self, filename: str) -> Leaving | None:
        """One of them."""
        entry = await self._room.bulk.call("HGET", self._room.keys.output_leaving, filename)
        return None if entry is None else _leaving(filename, entry)

    async def gone(self, filename: str, places: str) -> str:
        """The file is gone from these places (letters, see Leaving); those that are left."""
        args = self._room.args(filename, places)
        left: bytes = await self._room.bulk.run("output_gone", [self._room.keys.output_leaving], args)
        return left.decode()

    async def _oldest(
        self, key: str, after: PageKey | None, limit: int, before_ms: int | None
    ) -> tuple[Names, PageKey | None]:
        ceiling = "+inf" if before_ms is None else f"({before_ms}"
        found: list[tuple[int, str]] = []
        offset = 0
        while True:
            floor = "-inf" if after is None else str(after.time_ms)
            flat = await self._room.bulk.call(
                "ZRANGE", key, floor, ceiling, "BYSCORE", "LIMIT", offset, limit, "WITHSCORES"
            )
            rows = [(int(flat[i + 1]), flat[i].decode()) for i in range(0, len(flat), 2)]
            found += [row for row in rows if after is None or row > (after.time_ms, after.member)]
            offset += len(rows)
            if found or len(rows) < limit:
                break
        following = PageKey(*found[-1]) if len(rows) == limit else None
        return [name for _, name in found], following

    async def _run(self, script: str, filename: str, *values: str) -> int:
        reply: int = await self._room.bulk.run(
            script, [self._room.keys.output(filename)], self._room.args(filename, *values)
        )
        return reply


def _leaving(filename: str, entry: bytes) -> Leaving:
    places, home, key = entry.decode().split("\0", 2)
    return Leaving(filename, places, home, key)
