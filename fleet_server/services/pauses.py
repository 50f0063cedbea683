"""Pauses: putting them in force, ending them, and what of them this replica has seen lately."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fleet.v1 import queue_pb2, types_pb2

from fleet_server.domain.job import JobRecord, Pause, PauseKey, paused
from fleet_server.services.ports import Wake
from fleet_server.services.words import priority_number, priority_of, type_number, type_word
from fleet_server.store import PauseStore

Request = queue_pb2.PauseQueueRequest | queue_pb2.ResumeQueueRequest


class Pauses:
    """The pauses in force. The store judges claims by them; here they are for showing, at most `fresh_seconds` old.

    A pause ends only by its own resume: two that overlap are two.
    """

    def __init__(
        self, store: PauseStore, dispatcher: Wake, *, clock: Callable[[], float], fresh_seconds: float = 1.0
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._clock = clock
        self._fresh_seconds = fresh_seconds
        self._seen: tuple[Pause, ...] = ()
        self._seen_at: float | None = None
        self._looking = asyncio.Lock()

    async def pause(self, request: queue_pb2.PauseQueueRequest) -> list[types_pb2.Pause]:
        """All pauses afterwards. Raises INVALID_FIELD where there are too many."""
        return self._took(await self._store.pause(key_of(request)))

    async def resume(self, request: queue_pb2.ResumeQueueRequest) -> list[types_pb2.Pause]:
        """All pauses afterwards. Raises PAUSE_NOT_FOUND unless one has just these fields."""
        pauses = self._took(await self._store.resume(key_of(request)))
        self._dispatcher.wake()
        return pauses

    async def current(self) -> tuple[Pause, ...]:
        """Those in force, as of a moment ago."""
        if self._stale():
            async with self._looking:
                if self._stale():
                    self._took(await self._store.list())
        return self._seen

    async def messages(self) -> list[types_pb2.Pause]:
        """Those in force now, the oldest first."""
        return self._took(await self._store.list())

    def _stale(self) -> bool:
        return self._seen_at is None or self._clock() - self._seen_at > self._fresh_seconds

    def _took(self, pauses: tuple[Pause, ...]) -> list[types_pb2.Pause]:
        self._seen, self._seen_at = pauses, self._clock()
        return [message_of(pause) for pause in pauses]


def held_back(pauses: tuple[Pause, ...], record: JobRecord) -> bool:
    """Whether a pause is why a job does not start."""
    return bool(pauses) and paused(pauses, record.cluster, record.job_type, record.priority)


def key_of(request: Request) -> PauseKey:
    """What the call holds back, or lets go."""
    return PauseKey(
        cluster=request.target_cluster if request.HasField("target_cluster") else None,
        job_type=type_word(request.job_type) if request.HasField("job_type") else None,
        priority=priority_of(request.priority) if request.HasField("priority") else None,
    )


def message_of(pause: Pause) -> types_pb2.Pause:
    """A pause as callers see it."""
    key = pause.key
    message = types_pb2.Pause(
        target_cluster=key.cluster,
        job_type=type_number(key.job_type) if key.job_type is not None else None,
        priority=priority_number(key.priority) if key.priority is not None else None,
    )
    message.create_time.FromMilliseconds(pause.created_ms)
    return message
