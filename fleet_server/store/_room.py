"""What the parts of the store share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fleet_server.domain.job import JobRecord
from fleet_server.store.client import Argument, Client
from fleet_server.store.keys import Keys
from fleet_server.store.records import AttemptEncoder, AttemptRow, PageKey, decode_job, pairs

Clock = Callable[[], int]
Rows = list[tuple[str, int]]


@dataclass(frozen=True, slots=True)
class Room:
    """One namespace: its keys, connections and clock. `dispatch` is for what agents wait for, `bulk` for all else."""

    keys: Keys
    dispatch: Client
    bulk: Client
    clock: Clock | None
    encode_attempt: AttemptEncoder

    def args(self, *rest: Argument) -> list[Argument]:
        """A script's arguments: now_ms ("" but with a test's clock), prefix, its own."""
        return ["" if self.clock is None else self.clock(), self.keys.prefix, *rest]

    async def page(
        self,
        zsets: Sequence[str],
        before: PageKey | None,
        limit: int,
        *,
        newer_than_ms: int | None = None,
        older_than_ms: int | None = None,
    ) -> tuple[Rows, PageKey | None]:
        """Members of several zsets, merged, highest (score, member) first, and where the next page begins."""
        ceiling, member = ("", "") if older_than_ms is None else (str(older_than_ms), "")
        if before is not None and (older_than_ms is None or before.time_ms < older_than_ms):
            ceiling, member = str(before.time_ms), before.member
        floor = "" if newer_than_ms is None else str(newer_than_ms)
        found = await self.bulk.run("page", zsets, self.args(ceiling, member, floor, limit))
        rows = [(part[i].decode(), int(part[i + 1])) for part in found for i in range(0, len(part), 2)]
        rows.sort(key=lambda row: (row[1], row[0]), reverse=True)
        full = any(len(part) >= 2 * limit for part in found) or len(rows) > limit
        rows = rows[:limit]
        return rows, PageKey(rows[-1][1], rows[-1][0]) if rows and full else None

    def attempt(self, stored: bytes) -> bytes:
        """An attempt as fleet.v1.JobAttempt, whether a caller or a script wrote it."""
        if stored[:1] == b"P":
            return stored[1:]
        generation, number, node_id, started, ended, error = stored[1:].split(b"\0", 5)
        return self.encode_attempt(
            AttemptRow(
                generation=int(generation),
                attempt=int(number),
                node_id=node_id.decode(),
                started_ms=int(started) if started else None,
                ended_ms=int(ended),
                error=error,
            )
        )

    def whole(self, job_id: str, row: Any) -> JobRecord | None:
        """A reply of get.lua."""
        if row is None:
            return None
        flat, spec, result, attempts = row
        return decode_job(
            pairs(flat),
            job_id=job_id,
            spec=spec or b"",
            result=result or b"",
            attempts=tuple(self.attempt(stored) for stored in attempts),
        )


def short(flat: Sequence[bytes]) -> JobRecord:
    """A job's fields as scripts return them, without spec, result and attempts."""
    return decode_job(pairs(flat))


def encode_attempt(row: AttemptRow) -> bytes:
    """The fleet.v1.JobAttempt of an attempt that the store ended."""
    # Imported here: the room itself needs no generated code, and tests of it run without.
    from fleet.v1 import types_pb2

    message = types_pb2.JobAttempt(
        generation=row.generation,
        attempt=row.attempt,
        node_id=row.node_id,
        error=types_pb2.JobError.FromString(row.error),
    )
    if row.started_ms is not None:
        message.start_time.FromMilliseconds(row.started_ms)
    message.end_time.FromMilliseconds(row.ended_ms)
    encoded: bytes = message.SerializeToString()
    return encoded


def reason_of(error: bytes) -> str:
    """The reason in an encoded fleet.v1.JobError; "" where there is none."""
    from fleet.v1 import types_pb2
    from google.protobuf.message import DecodeError

    try:
        reason: str = types_pb2.JobError.FromString(error).reason
    except DecodeError:
        return ""
    return reason


__all__ = ["Clock", "Room", "Rows", "encode_attempt", "reason_of", "short"]
