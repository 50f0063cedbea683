"""The store: one namespace of a Valkey or Redis server."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

from fleet_server.store.events import EventStore
from fleet_server.store.jobs import JobStore
from fleet_server.store.nodes import NodeStore
from fleet_server.store.outputs import OutputStore
from fleet_server.store.records import AttemptEncoder, Durability


class Store:
    """Owns its connections (dispatch, bulk, events); `aclose()` or `async with` ends them. Reconnects by itself."""

    jobs: JobStore
    nodes: NodeStore
    events: EventStore
    outputs: OutputStore

    async def check(self) -> Durability:
        """What the server promises; reads its configuration."""
        raise NotImplementedError

    async def ping(self) -> None:
        """Returns if the store answers, else raises STORE_UNAVAILABLE."""
        raise NotImplementedError

    async def memory(self) -> tuple[int, int]:
        """(used, max) bytes; max 0: no limit is set."""
        raise NotImplementedError

    async def aclose(self) -> None:
        """Ends the connections; calls under way answer STORE_UNAVAILABLE."""
        raise NotImplementedError

    async def __aenter__(self) -> Store:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


def open_store(
    url: str,
    *,
    namespace: str = "fleet",
    clock: Callable[[], int] | None = None,
    encode_attempt: AttemptEncoder | None = None,
) -> Store:
    """A store on `unix:///path/sock` or `redis://host:port/db`; connects at the first call, within a running loop.

    `clock` (Unix ms) replaces the server's own time, for tests. `encode_attempt` makes the fleet.v1.JobAttempt of an attempt
    that the store ended by itself; the default uses the generated stubs.
    """
    raise NotImplementedError
