"""What the use cases of callers ask of the agents' side of this replica: of `FleetView`, `ProgressHub`, `Dispatcher`,
`Sessions` and `LocalOutputs`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from fleet.v1 import types_pb2

from fleet_server.domain.job import NewJob
from fleet_server.domain.node import NodeView
from fleet_server.storage.outputs import OutputStat


class Nodes(Protocol):
    """The nodes that this replica knows of, in memory."""

    def nodes(self) -> Sequence[NodeView]:
        """All registered nodes."""
        ...

    def node(self, node_id: str) -> NodeView | None:
        """One node; None if unknown."""
        ...

    def online(self) -> Sequence[NodeView]:
        """Those whose agents are connected."""
        ...

    def info(self, node_id: str) -> types_pb2.NodeInfo | None:
        """The node as callers see it; None if unknown."""
        ...

    def heartbeat(self, node_id: str) -> types_pb2.Heartbeat | None:
        """The node's last beat; None if there was none."""
        ...

    def subscribe_changes(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Calls `listener(node_id)` after each change; a beat that says nothing new is none. Returns how to end it."""
        ...

    def subscribe_beats(self, listener: Callable[[str], None]) -> Callable[[], None]:
        """Calls `listener(node_id)` after each beat. Returns how to end it."""
        ...


class Ticks(Protocol):
    """Progress of running jobs, in memory."""

    def latest(self, job_id: str) -> types_pb2.JobProgress | None:
        """The last tick of a running job."""
        ...

    def subscribe(
        self, job_ids: Collection[str] | None = None, *, previews: bool = False
    ) -> AbstractAsyncContextManager[AsyncIterator[types_pb2.JobProgress]]:
        """Ticks of these jobs (None: all), the latest of each, at most 10 a second a job; pictures where asked for."""
        ...


class Wake(Protocol):
    """Work may have come: look."""

    def wake(self) -> None: ...


class Line(Wake, Protocol):
    """Where jobs are given to nodes."""

    def expect(self, jobs: Sequence[NewJob]) -> None:
        """These jobs were put in line, or are being so by calls that go to the store before any made after this."""
        ...

    def rides(self) -> bool:
        """Whether the claim of a job that is submitted now should travel with its submit."""
        ...


class Attempts(Protocol):
    """Attempts that run on nodes."""

    async def cancel_attempt(self, job_id: str, node_id: str, token: str) -> None:
        """Tells the node to stop an attempt, where this replica holds its stream: heartbeats heal what is lost."""
        ...


class Files(Protocol):
    """Outputs on this machine's disk."""

    async def read(self, filename: str) -> bytes | None:
        """The bytes; None if there is no such file."""
        ...

    async def stat(self, filename: str) -> OutputStat | None:
        """What is known of the file; None if there is no such file."""
        ...

    def stream(self, filename: str, start: int, end: int) -> AsyncIterator[bytes]:
        """Bytes from `start` to before `end`, in chunks of at most 1 MiB."""
        ...

    async def delete(self, filename: str) -> bool:
        """Whether there was such a file."""
        ...
