"""The store: one namespace of a Valkey or Redis server."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from fleet_server.domain.errors import FleetError
from fleet_server.store._room import Clock, Room, encode_attempt
from fleet_server.store.broadcast import Broadcast
from fleet_server.store.client import Client
from fleet_server.store.comfy import ComfyStore
from fleet_server.store.doors import DoorStore
from fleet_server.store.events import EventStore
from fleet_server.store.inputs import InputStore
from fleet_server.store.jobs import JobStore
from fleet_server.store.joins import JoinStore
from fleet_server.store.keys import Keys
from fleet_server.store.lua import Script, load_scripts
from fleet_server.store.memory import MemoryGuard, parse_info
from fleet_server.store.nodes import NodeStore
from fleet_server.store.outputs import OutputStore
from fleet_server.store.pauses import PauseStore
from fleet_server.store.records import AttemptEncoder, Durability
from fleet_server.store.replies import ReplyStore
from fleet_server.store.speeds import SpeedStore
from fleet_server.store.swarm import SwarmStore
from fleet_server.store.sync import SyncStore
from fleet_server.store.webhooks import WebhookStore

WANTED = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}


class Store:
    """Owns its connections (dispatch, bulk, events); `aclose()` or `async with` ends them. Reconnects by itself."""

    def __init__(
        self,
        url: str,
        namespace: str,
        clock: Clock | None,
        attempt_encoder: AttemptEncoder,
        scripts: Mapping[str, Script] | None = None,
    ) -> None:
        scripts = scripts or load_scripts()
        self._dispatch = Client(url, name="dispatch", scripts=scripts)
        self._bulk = Client(url, name="bulk", scripts=scripts)
        room = Room(Keys(namespace), self._dispatch, self._bulk, clock, attempt_encoder)
        self._memory = MemoryGuard(self._bulk)
        self.jobs = JobStore(room, self._memory)
        self.pauses = PauseStore(room)
        self.speeds = SpeedStore(room)
        self.comfy = ComfyStore(room)
        self.nodes = NodeStore(room)
        self.joins = JoinStore(room)
        self.doors = DoorStore(room)
        self.events = EventStore(room, url)
        self.broadcast = Broadcast(room, url)
        self.outputs = OutputStore(room)
        self.syncs = SyncStore(room)
        self.inputs = InputStore(room)
        self.webhooks = WebhookStore(room)
        self.replies = ReplyStore(room)
        self.swarm = SwarmStore(room)

    async def check(self) -> Durability:
        """What the server promises, read from its configuration; never raises for what it may not read."""
        info = parse_info(await self._bulk.call("INFO", "server"))
        wrong: list[str] = []
        for name, wanted in WANTED.items():
            try:
                reply = await self._bulk.call("CONFIG", "GET", name)
            except FleetError as error:
                if error.reason == "STORE_UNAVAILABLE":
                    raise
                wrong.append(f"{name} cannot be read")
                continue
            found = reply[1].decode() if len(reply) == 2 else "unknown"
            if found != wanted:
                wrong.append(f"{name} is {found}, set it to {wanted}")
        return Durability(
            mode="best-effort" if wrong else "fsync",
            detail="; ".join(wrong) or "each accepted write is fsynced before its reply",
            run_id=info.get("run_id", ""),
            uptime_seconds=int(info.get("uptime_in_seconds", 0)),
            server=f"{info.get('server_name', 'redis')} {info.get('valkey_version') or info.get('redis_version', '')}",
        )

    async def ping(self) -> None:
        """Returns if the store answers on both connections, else raises STORE_UNAVAILABLE."""
        await self._bulk.call("PING", seconds=2.0)
        await self._dispatch.call("PING", seconds=2.0)

    async def memory(self) -> tuple[int, int]:
        """(used, max) bytes; max 0: no limit is set."""
        return await self._memory.read()

    async def aclose(self) -> None:
        """Ends the connections; calls under way answer STORE_UNAVAILABLE."""
        await self.events.aclose()
        await self._dispatch.aclose()
        await self._bulk.aclose()

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
    clock: Clock | None = None,
    encode_attempt: AttemptEncoder = encode_attempt,
) -> Store:
    """A store on `unix:///path/sock` or `redis://host:port/db`; connects at the first call, within a running loop.

    `clock` (Unix ms) replaces the server's own time, for tests. `encode_attempt` makes the fleet.v1.JobAttempt of an
    attempt that the store ended by itself; the default uses the generated stubs.
    """
    return Store(url, namespace, clock, encode_attempt)
