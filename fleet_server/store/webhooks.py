"""Callbacks in the store: which are due, who sends them, what came of each. A terminal step makes the row."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fleet_server.domain.errors import FleetError
from fleet_server.domain.job import JobRecord
from fleet_server.domain.webhook import DeliveryState, Verdict, split_webhook_id, webhook_id
from fleet_server.store._room import Room
from fleet_server.store.client import Argument
from fleet_server.store.job_submit import key_reused
from fleet_server.store.records import Idempotency, decode_job, pairs


@dataclass(frozen=True, slots=True)
class HookRow:
    """A callback as it stands. `log` is what its senders kept, opaque here; `tries` are those of this round.

    `due_ms` is None while it is being sent, and once it has ended. `end` is how the job ended, where the job has gone
    on to another generation since; it has a result, but neither spec nor attempts.
    """

    job_id: str
    generation: int
    state: DeliveryState
    tries: int
    log: bytes
    due_ms: int | None = None
    ended_ms: int | None = None
    end: JobRecord | None = None

    @property
    def webhook_id(self) -> str:
        return webhook_id(self.job_id, self.generation)


@dataclass(frozen=True, slots=True)
class HookClaims:
    """What one claim gave; in `wait_ms` the next callback of anybody is due or given back, None if there is none."""

    rows: tuple[HookRow, ...]
    wait_ms: int | None


def _row(member: str, fields: Mapping[str, bytes], due: bytes | None = None) -> HookRow:
    job_id, generation = split_webhook_id(member)
    state = DeliveryState(fields.get("_s", b"pending").decode())
    sending = "_k" in fields
    return HookRow(
        job_id=job_id,
        generation=generation,
        state=state,
        tries=int(fields.get("_t", 0)),
        log=fields.get("_a", b""),
        due_ms=None if due is None or sending else int(float(due)),
        ended_ms=int(fields["_e"]) if "_e" in fields else None,
        end=decode_job(fields, job_id=job_id, result=fields["_p"]) if "_p" in fields else None,
    )


def ends_with_callback(raw: Mapping[bytes, bytes]) -> bool:
    """Whether the job of a job_complete event, as the store has it, has a callback."""
    return raw.get(b"li", b"").endswith(b"\0" + b"1")


class WebhookStore:
    """Each callback is sent by one sender at a time, under a claim that ends by itself. At least once.

    Every method raises FleetError STORE_UNAVAILABLE if the store is away or an outcome stays unknown.
    """

    def __init__(self, room: Room) -> None:
        self._room = room

    async def claim(self, sender: str, token: str, *, limit: int, lease_ms: int) -> HookClaims:
        """Up to `limit` callbacks that are due, the longest due first: nobody else gets them for `lease_ms`.

        `sender` names a process, `token` this one claim: the same token gives the same callbacks again.
        """
        keys = [self._room.keys.hooks, self._room.keys.hook_claim(sender)]
        first, *rows = await self._room.bulk.run("hook_claim", keys, self._room.args(token, limit, lease_ms))
        claimed = tuple(_row(member.decode(), pairs(flat)) for member, flat in rows)
        return HookClaims(claimed, first)

    async def settle(self, row: HookRow, token: str, verdict: Verdict, log: bytes) -> bool:
        """Writes what a try came to; again: the same. False if the claim was lost, so that nothing was written."""
        args = self._room.args(row.webhook_id, token, verdict.state.value, verdict.wait_ms or 0, row.tries + 1, log)
        return bool(await self._room.bulk.run("hook_settle", [self._room.keys.hooks], args) != b"refused")

    async def defer(self, rows: Sequence[tuple[HookRow, int]], token: str) -> None:
        """Gives claimed callbacks back untried, due after so many ms each; none whose claim was lost."""
        if not rows:
            return
        rest: list[Argument] = []
        for row, wait_ms in rows:
            rest += [row.webhook_id, token, wait_ms]
        await self._room.bulk.run("hook_defer", [self._room.keys.hooks], self._room.args(*rest))

    async def get_many(self, job_id: str, generations: Sequence[int]) -> list[HookRow]:
        """The callbacks of these generations of a job, in order, whether or not they were ever due."""
        members = [webhook_id(job_id, generation) for generation in generations]
        if not members:
            return []
        found = await self._room.bulk.run("hook_get", [self._room.keys.hooks], self._room.args(*members))
        return [_row(member, pairs(flat), due) for member, (flat, due) in zip(members, found, strict=True)]

    async def redeliver(self, job_id: str, generation: int, *, idempotency: Idempotency | None = None) -> HookRow:
        """Makes a callback due at once, with a new round of tries; one under way gets it should this try fail.

        Raises JOB_NOT_FOUND, IDEMPOTENCY_KEY_REUSED.
        """
        keys = [self._room.keys.hooks, self._room.keys.job(job_id)]
        if idempotency is not None:
            keys.append(self._room.keys.idempotency(idempotency.owner, idempotency.method, idempotency.key))
        member = webhook_id(job_id, generation)
        fingerprint = idempotency.fingerprint if idempotency is not None else ""
        args = self._room.args(member, uuid.uuid4().hex, fingerprint)
        reply = await self._room.bulk.run("hook_redeliver", keys, args)
        if reply is None:
            raise FleetError("JOB_NOT_FOUND", f"job_id: the job {job_id} has been deleted, and its callbacks with it")
        if reply[0] == b"reused":
            raise key_reused()
        flat, due = reply[1]
        return _row(member, pairs(flat), due)
