"""Replies of calls that take several steps, kept for 24 hours under their idempotency key."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Awaitable, Callable

from fleet_server.domain.errors import FleetError
from fleet_server.store._room import Room
from fleet_server.store.job_submit import key_reused
from fleet_server.store.records import Idempotency

_UNSURE = frozenset({"STORE_UNAVAILABLE", "OUTCOME_UNKNOWN", "NODE_OFFLINE", "TIMEOUT", "INTERNAL"})
"""After these the work may have been done: the next one goes on with the same operation."""


class ReplyStore:
    """See `once`."""

    def __init__(self, room: Room, *, claim_ms: int = 60_000, poll_seconds: float = 0.1) -> None:
        self._room = room
        self._claim_ms = claim_ms
        self._poll_seconds = poll_seconds

    async def once(
        self, idempotency: Idempotency, work: Callable[[str], Awaitable[bytes]], *, most_bytes: int | None = None
    ) -> bytes:
        """What `work(operation)` gave the first time that this key was used; waits for it while it still runs.

        Refusals are not remembered. `operation` is the same where the work is begun again since nobody knows what came
        of it (_UNSURE), since its reply had more than `most_bytes` and was not kept, or since who began it has not
        ended within `claim_ms`. Raises IDEMPOTENCY_KEY_REUSED for another fingerprint,
        STORE_UNAVAILABLE, and what `work` does.
        """
        key = self._room.keys.reply(idempotency.owner, idempotency.method, idempotency.key)
        caller = uuid.uuid4().hex
        while True:
            begin = self._room.args("begin", idempotency.fingerprint, caller, self._claim_ms)
            found = await self._room.bulk.run("reply", [key], begin)
            if found[0] == b"reused":
                raise key_reused()
            if found[0] == b"kept":
                return bytes(found[1])
            if found[0] == b"ours":
                break
            await asyncio.sleep(self._poll_seconds)
        try:
            reply = await work(found[1].decode())
        except FleetError as error:
            # Where the outcome is unknown, the next one goes on with the same operation.
            how = "leave" if error.reason in _UNSURE else "drop"
            with contextlib.suppress(FleetError):
                await self._room.bulk.run("reply", [key], self._room.args(how, caller))
            raise
        if most_bytes is not None and len(reply) > most_bytes:
            await self._room.bulk.run("reply", [key], self._room.args("leave", caller))
            return reply
        await self._room.bulk.run("reply", [key], self._room.args("keep", caller, reply))
        return reply
