"""The stream of state changes: capped, replayable, fanned out in process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager

from fleet_server.store.records import StoredEvent


class EventStore:
    """About the newest 100,000 events. One blocking reader a process."""

    def subscribe(self, *, buffer: int = 1024) -> AbstractAsyncContextManager[AsyncIterator[StoredEvent]]:
        """Every event committed after entering, in order, at least until `buffer` waits: then one `gap` stands for the lost.

        Subscribe, then snapshot, then drop what is not newer.
        """
        raise NotImplementedError

    async def read(self, since: str, limit: int = 1000) -> tuple[list[StoredEvent], str]:
        """Events after id `since` ("0": all that is kept), oldest first, and the oldest id kept ("" if none)."""
        raise NotImplementedError

    async def last_id(self) -> str:
        """The id of the newest event ("0-0" if there never was one)."""
        raise NotImplementedError

    async def publish(self, type: str, fields: Mapping[str, str | bytes | int]) -> str:
        """Appends an event that has no row of its own in the store; its id. At least once."""
        raise NotImplementedError
