"""Pauses: which queued jobs are held back. The claim script judges them, so no replica starts what is paused."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import Pause, PauseKey, Priority
from fleet_server.store._room import Room

MAX_PAUSES = 256

Pauses = tuple[Pause, ...]


def _spelled(key: PauseKey) -> str:
    return "\0".join((key.cluster or "", key.job_type or "", key.priority.value if key.priority else ""))


def _decoded(flat: Sequence[bytes]) -> Pauses:
    """Pauses of a hash, the oldest first."""
    found = []
    for field, created in zip(flat[::2], flat[1::2], strict=True):
        cluster, job_type, priority = field.decode().split("\0")
        key = PauseKey(cluster or None, job_type or None, Priority(priority) if priority else None)
        found.append(Pause(key, int(created)))
    return tuple(sorted(found, key=lambda pause: (pause.created_ms, _spelled(pause.key))))


class PauseStore:
    """All pauses of the fleet, at most `MAX_PAUSES`. No job is touched by one: running jobs go on, submits are taken.

    Each method raises FleetError STORE_UNAVAILABLE if the store is away.
    """

    def __init__(self, room: Room) -> None:
        self._room = room

    async def list(self) -> Pauses:
        """Those in force, the oldest first."""
        return _decoded(await self._room.bulk.call("HGETALL", self._room.keys.pauses))

    async def pause(self, key: PauseKey) -> Pauses:
        """Puts a pause in force, if it is not already; all in force afterwards.

        Raises INVALID_FIELD if there are too many.
        """
        reply = await self._run("pause", key)
        if reply is None:
            raise FleetError(
                "INVALID_FIELD", f"target_cluster: {MAX_PAUSES} pauses are in force; resume some, or pause more at once"
            )
        return _decoded(reply)

    async def resume(self, key: PauseKey) -> Pauses:
        """Ends the pause with just these fields; all in force afterwards. Raises PAUSE_NOT_FOUND."""
        reply = await self._run("resume", key)
        if reply is None:
            raise FleetError(
                "PAUSE_NOT_FOUND",
                "there is no pause with just these fields; GET /api/queue/stats lists those in force",
            )
        return _decoded(reply)

    async def _run(self, what: str, key: PauseKey) -> Any:
        keys = [self._room.keys.pauses, self._room.keys.resumed]
        return await self._room.bulk.run(
            "pause", keys, self._room.args(what, _spelled(key), MAX_PAUSES, uuid.uuid4().hex)
        )
