"""Progress between replicas: whoever watches sees the ticks of every node, whichever replica holds its stream."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import structlog
from fleet.v1.types_pb2 import JobProgress
from google.protobuf.message import DecodeError

from fleet_server.domain.errors import FleetError
from fleet_server.services.progress import ProgressHub

_log = structlog.get_logger("fleet.ticks")
_NAME_BYTES = 8
_TICK, _WANT = b"t", b"w"
_EVERY_JOB = b"*"
_WANTED_JOBS = 500


class Channel(Protocol):
    """What replicas say to each other."""

    async def publish(self, message: bytes) -> None: ...

    async def listeners(self) -> int: ...

    async def listen(self, heard: Callable[[bytes], None]) -> None: ...


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """`interval_seconds` between two ticks of one job; who looks at previews is said each `renew_seconds`, and holds
    for `keep_seconds`.
    """

    interval_seconds: float = 0.5
    renew_seconds: float = 1.0
    keep_seconds: float = 5.0


class TickRelay:
    """Passes the ticks of this replica's agents on to the others, and theirs to who listens here.

    Ticks are lossy as they are; ends are stored events. A replica that is alone says nothing but that it listens. A
    message is the sender's name, a letter and a JobProgress, or the jobs whose previews somebody there looks at.
    """

    def __init__(self, channel: Channel, hub: ProgressHub, settings: RelaySettings | None = None) -> None:
        self._channel = channel
        self._hub = hub
        self._settings = settings or RelaySettings()
        self._name = secrets.token_bytes(_NAME_BYTES)
        self._wanted: dict[bytes, tuple[frozenset[str] | None, float]] = {}
        self._others = False
        self._changed = asyncio.Event()
        self.heard: dict[bytes, Callable[[bytes], None]] = {}
        """Who takes messages of other kinds, each a letter."""

    @property
    def others(self) -> bool:
        """Whether another replica listens."""
        return self._others

    async def say(self, kind: bytes, message: bytes) -> None:
        """Says something of another kind to the other replicas. Raises STORE_UNAVAILABLE."""
        await self._channel.publish(self._name + kind + message)

    async def run(self) -> None:
        """Relays until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._channel.listen(self._heard))
            group.create_task(self._renew())
            group.create_task(self._pass_on())

    def _heard(self, message: bytes) -> None:
        name, kind, rest = message[:_NAME_BYTES], message[_NAME_BYTES : _NAME_BYTES + 1], message[_NAME_BYTES + 1 :]
        if name == self._name:
            return
        self._others = True
        if kind == _TICK:
            try:
                self._hub.publish(JobProgress.FromString(rest), relayed=True)
            except DecodeError:
                _log.warning("a tick of another replica makes no sense", size=len(rest))
        elif kind in self.heard:
            self.heard[kind](rest)
        elif kind == _WANT:
            jobs = None if rest == _EVERY_JOB else frozenset(rest.decode(errors="replace").split("\0"))
            until = asyncio.get_running_loop().time() + self._settings.keep_seconds
            before = self._wanted.get(name, (frozenset(), 0.0))[0]
            self._wanted[name] = jobs, until
            if before != jobs:
                self._changed.set()

    async def _renew(self) -> None:
        """Looks who else is there, says what is looked at here, and forgets what others have stopped to look at."""
        while True:
            try:
                self._others = await self._channel.listeners() > 1
                looked_at = self._hub.previewed()
                if self._others and (looked_at is None or looked_at):
                    await self._channel.publish(self._name + _WANT + _spelled(looked_at))
            except FleetError as error:
                _log.warning("other replicas are not told of progress", detail=error.detail)
            now = asyncio.get_running_loop().time()
            gone = [name for name, (_, until) in self._wanted.items() if until < now]
            for name in gone:
                del self._wanted[name]
                self._changed.set()
            await asyncio.sleep(self._settings.renew_seconds)

    async def _pass_on(self) -> None:
        """Ticks of our agents; with previews those that somebody elsewhere looks at."""
        while True:
            self._changed.clear()
            async with asyncio.TaskGroup() as group:
                senders = [group.create_task(self._send(None, previews=False))]
                if self._wanted:
                    every = any(jobs is None for jobs, _ in self._wanted.values())
                    jobs = None if every else frozenset().union(*(jobs or () for jobs, _ in self._wanted.values()))
                    senders.append(group.create_task(self._send(jobs, previews=True)))
                await self._changed.wait()
                for sender in senders:
                    sender.cancel()

    async def _send(self, jobs: Collection[str] | None, *, previews: bool) -> None:
        interval = self._settings.interval_seconds
        async with self._hub.subscribe(jobs, previews=previews, local=True, interval_seconds=interval) as ticks:
            async for tick in ticks:
                if not self._others or (previews and not tick.HasField("preview")):
                    continue
                try:
                    await self._channel.publish(self._name + _TICK + tick.SerializeToString())
                except FleetError:
                    # The next one says more; `_renew` says that the store is away.
                    continue


def _spelled(jobs: Collection[str] | None) -> bytes:
    """The jobs in one message; all of them where they are many."""
    if jobs is None or len(jobs) > _WANTED_JOBS:
        return _EVERY_JOB
    return "\0".join(sorted(jobs)).encode()
