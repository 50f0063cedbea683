"""Sync, cleanup and move as calls that may be repeated with the same request_id."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from fleet.v1 import fleet_pb2, types_pb2
from google.protobuf.message import Message

from fleet_server.services.intake import idempotency
from fleet_server.services.sweeps import Sweeps
from fleet_server.store import ReplyStore


class SweepCalls:
    """Within 24 hours the same key gives the first summary again. Raises what `Sweeps` does, IDEMPOTENCY_KEY_REUSED."""

    def __init__(self, sweeps: Sweeps, replies: ReplyStore) -> None:
        self._sweeps = sweeps
        self._replies = replies

    async def stats(self) -> fleet_pb2.GetOutputStatsResponse:
        """See `Sweeps.stats`."""
        return await self._sweeps.stats()

    async def sync(self, request: fleet_pb2.SyncOutputsRequest, *, owner: str, key: str | None) -> types_pb2.Sweep:
        """See `Sweeps.sync`."""
        return await self._once(request, "Fleet/SyncOutputs", owner, key, lambda: self._sweeps.sync(key))

    async def cleanup(
        self, request: fleet_pb2.CleanupOutputsRequest, *, owner: str, key: str | None
    ) -> types_pb2.Sweep:
        """See `Sweeps.cleanup`."""
        hours, dry_run = request.max_age_hours, request.dry_run
        return await self._once(
            request,
            "Fleet/CleanupOutputs",
            owner,
            key,
            lambda: self._sweeps.cleanup(hours, dry_run=dry_run, request_id=key),
        )

    async def move(self, request: fleet_pb2.MoveOutputsRequest, *, owner: str, key: str | None) -> types_pb2.Sweep:
        """See `Sweeps.move`."""
        return await self._once(request, "Fleet/MoveOutputs", owner, key, lambda: self._sweeps.move(key))

    async def _once(
        self, request: Message, method: str, owner: str, key: str | None, work: Callable[[], Awaitable[types_pb2.Sweep]]
    ) -> types_pb2.Sweep:
        once = idempotency(request, method=method, owner=owner, key=key)
        if once is None:
            return await work()

        async def encoded(_: str) -> bytes:
            return (await work()).SerializeToString()

        return types_pb2.Sweep.FromString(await self._replies.once(once, encoded))
