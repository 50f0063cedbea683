"""The agents' streams of this replica: who may begin one, who is replaced, and what becomes of a node without one."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import grpc
import structlog
from fleet.v1 import node_pb2 as pb

from fleet_server.domain.errors import Code, FleetError, invalid_field
from fleet_server.domain.job import Claim
from fleet_server.domain.node import NodeStatus
from fleet_server.services.completion import Completions, job_error
from fleet_server.services.departures import Departures
from fleet_server.services.elsewhere import Elsewhere
from fleet_server.services.fleet import FleetView
from fleet_server.services.hello_bucket import HelloBucket
from fleet_server.services.inputs import InputResolver
from fleet_server.services.nodes import address_of, beat_of, now_ms
from fleet_server.services.progress import ProgressHub
from fleet_server.services.refusals import forbidden
from fleet_server.services.session import Session
from fleet_server.services.session_parts import Listener, SessionCounters, SessionParts, SessionSettings
from fleet_server.store import Held, JobRecord, NodeRow, Store

_log = structlog.get_logger("fleet.sessions")

PROTOCOL_VERSION = 1
"""Version of Node.Connect; agent and server must have the same."""

_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_RESERVED = frozenset({"heartbeats", "tokens"})

LOST = job_error("NODE_LOST", "the node's agent was restarted while it ran the job").SerializeToString()
RECOVERY_TRIES = 60
"""Then the leases of the lost jobs have run out by themselves."""
POISON = job_error("POISON", "nodes were lost again and again while they ran the job").SerializeToString()


class Sessions:
    """The live streams. One per node: the same agent takes over its own at once, another one is refused while it lives.

    `run()` is one task beside the streams: it writes down who left, and gives nodes up that stay away for a lease.
    `replica` names this server; it stays the same over restarts.
    """

    def __init__(
        self,
        store: Store,
        fleet: FleetView,
        hub: ProgressHub,
        completions: Completions,
        *,
        settings: SessionSettings | None = None,
        replica: str = "server",
        version: str = "",
        inputs: InputResolver | None = None,
    ) -> None:
        self.settings = settings or SessionSettings()
        self.counters = SessionCounters()
        self._store = store
        self._fleet = fleet
        inputs = inputs or InputResolver(store.jobs, store.outputs, store.inputs)
        self._parts = SessionParts(store, fleet, hub, completions, self.settings, self.counters, inputs)
        self._replica = replica
        self._version = version
        self._admission = HelloBucket(self.settings.hellos_per_second)
        self._live: dict[str, Session] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._departures = Departures(store, fleet, self.settings, replica, live=self._live, lock=self._lock)
        self._others = Elsewhere(store, fleet, self.settings, replica, live=self._live)
        self._closing: float | None = None
        self._recoveries: set[asyncio.Task[None]] = set()

    # For dispatch and for callers.

    def slots_free(self, node_id: str) -> int:
        """Slots of the node that this replica may fill now."""
        session = self._live.get(node_id)
        return session.slots_free if session is not None else 0

    def assign(self, claim: Claim) -> bool:
        """Sends a claimed job to the session that it was claimed for; False if that has ended: give the job back."""
        session = self._live.get(claim.job.node_id)
        return session is not None and session.session_id == claim.job.session and session.assign(claim)

    async def cancel_attempt(self, job_id: str, node_id: str, token: str) -> None:
        """Tells the node to stop an attempt, as far as it is connected here; the next heartbeat heals what is lost."""
        session = self._live.get(node_id)
        if session is not None and token:
            session.cancel(job_id, token)

    def live(self, node_id: str) -> Session | None:
        """The node's stream; None where there is none here."""
        session = self._live.get(node_id)
        return None if session is None or session.stopping else session

    def listen(self, kind: str, listener: Listener) -> None:
        """Calls `listener(node_id, message)` for each message of this kind (`container`, `service`, `frame`), in each
        agent's order; it must not wait. One listener a kind."""
        self._parts.listeners[kind] = listener

    # The stream.

    async def connect(
        self, requests: AsyncIterator[pb.AgentMessage], context: grpc.aio.ServicerContext[Any, Any], *, only: str = ""
    ) -> AsyncGenerator[pb.ServerMessage, None]:
        """Serves Node.Connect: a Welcome, then what the agent must hear, until either side ends it. `only` is the node
        that the caller may speak for, "" for any.

        Raises NODE_FORBIDDEN (PERMISSION_DENIED), RATE_LIMITED (too many Hellos at once: come again), SHUTTING_DOWN,
        INVALID_FIELD, PROTOCOL_VERSION (FAILED_PRECONDITION), NAME_IN_USE (ALREADY_EXISTS: another live agent has this
        node's name), TAKEN_OVER and STREAM_STUCK (ABORTED).
        """
        hello = await self._hello(requests)
        if only and hello.node_id != only:
            _log.warning("an agent spoke for another node", node_id=only, claimed=hello.node_id)
            raise forbidden(f"hello.node_id: the certificate is {only}'s: an agent speaks for its own node alone")
        session = await self._begin(hello, context.peer())
        session.writer = asyncio.current_task()
        life = asyncio.create_task(session.run(requests))

        def over(_: object) -> None:
            # A generator that waits at its yield may be closed late.
            session.stop()
            self._leave(session)

        context.add_done_callback(over)  # type: ignore[arg-type]  # the stubs want a class of their own
        try:
            async with aclosing(session.outgoing()) as messages:
                async for message in messages:
                    yield message
        finally:
            session.stop()
            self._leave(session)
            await asyncio.shield(life)

    async def run(self) -> None:
        """Loads the nodes, then looks after those without a stream; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._departures.run(), name="departures")
            group.create_task(self._others.run(), name="elsewhere")

    def told(self, row: NodeRow) -> None:
        """The store says that a node changed, on whatever replica."""
        self._others.told(row)

    async def loaded(self) -> None:
        """Returns when the nodes that the store knows are known here; before, no job can be judged. Needs `run()`."""
        await self._departures.loaded()

    async def shutdown(self, retry_after_seconds: float = 1.0) -> None:
        """Says goodbye to all agents, refuses new ones; returns when all streams have ended and are written down.

        `run()` must still be running. Waits at most twice `drain_seconds`.
        """
        self._closing = retry_after_seconds
        self._departures.closing = True
        live = tuple(self._live.values())
        for session in live:
            session.send(pb.ServerMessage(goodbye=pb.ServerGoodbye(retry_after_seconds=retry_after_seconds)))
            session.stop()
        try:
            async with asyncio.timeout(2 * self.settings.drain_seconds):
                for session in live:
                    await session.ended.wait()
                    self._leave(session)
                await self._departures.settled()
        except TimeoutError:
            _log.warning("agents' streams were not ended in time")
        for task in tuple(self._recoveries):
            task.cancel()
        await asyncio.gather(*self._recoveries, return_exceptions=True)

    # The beginning of a stream.

    async def _hello(self, requests: AsyncIterator[pb.AgentMessage]) -> pb.Hello:
        self.counters.hellos += 1
        wait = self._admission.wait_seconds()
        if self._closing is not None:
            raise FleetError("SHUTTING_DOWN", "the server is shutting down", retry_after_seconds=self._closing)
        if wait > 0:
            self.counters.refused_hellos += 1
            detail = "too many agents are connecting at once: come again after a while"
            raise FleetError("RATE_LIMITED", detail, code=Code.UNAVAILABLE, retry_after_seconds=wait)
        try:
            async with asyncio.timeout(self.settings.hello_seconds):
                message = await anext(requests)
        except TimeoutError as error:
            raise FleetError("TIMEOUT", f"no hello came within {self.settings.hello_seconds:g} s") from error
        except StopAsyncIteration as error:
            raise invalid_field("hello", "must be the first message") from error
        if message.WhichOneof("message") != "hello":
            raise invalid_field("hello", "must be the first message", message.WhichOneof("message"))
        _judge(message.hello)
        return message.hello

    async def _begin(self, hello: pb.Hello, peer: str) -> Session:
        """The session of an agent that may have one; its Welcome is the first message to go out."""
        async with self._lock(hello.node_id):
            await self._replace(hello)
            await self._departures.settle(hello.node_id)
            if self._closing is not None:
                raise FleetError("SHUTTING_DOWN", "the server is shutting down", retry_after_seconds=self._closing)
            session = Session(secrets.token_hex(16), hello, self._parts, address=address_of(peer))
            try:
                return await self._welcomed(session, hello)
            except BaseException:
                # The store may hold the session already: it is taken back.
                session.ended.set()
                self._departures.add(session)
                raise

    async def _welcomed(self, session: Session, hello: pb.Hello) -> Session:
        before = await self._store.nodes.connect(
            hello.node_id,
            session=session.session_id,
            instance_id=hello.instance_id,
            info=session.description,
            replica=self._replica,
        )
        restarted = before is not None and bool(before.session) and before.instance_id != hello.instance_id
        kept = [] if restarted else await self._kept(hello, session.session_id)
        session.adopt(kept)
        row = await self._store.nodes.get(hello.node_id) or NodeRow(hello.node_id, session.description)
        if row.session not in ("", session.session_id):
            raise FleetError("TAKEN_OVER", "this node has a newer stream at another server", code=Code.ABORTED)
        self._departures.came_back(hello.node_id)
        self._live[hello.node_id] = session
        session.send(pb.ServerMessage(welcome=self._welcome(hello, kept)))
        self._fleet.connected(
            replace(row, session=session.session_id),
            hello,
            beat_of(hello),
            address=session.address,
            slots_free=session.slots_free,
            running=session.job_ids,
        )
        if restarted and before is not None:
            self._recover(session, before.session)
        _log.info("node connected", node_id=hello.node_id, address=session.address, restarted=restarted)
        return session

    async def _replace(self, hello: pb.Hello) -> None:
        """Makes room for the newcomer, or refuses it: the same agent comes back, another waits for the old to die."""
        old = self._live.get(hello.node_id)
        if old is None:
            row = await self._store.nodes.get(hello.node_id)
            if row is not None and self._elsewhere(row, hello):
                raise _in_use(hello.node_id)
            return
        if old.instance_id != hello.instance_id and await self._alive(old):
            _log.warning("node name in use", node_id=hello.node_id, address=old.address)
            raise _in_use(hello.node_id)
        old.stop(FleetError("TAKEN_OVER", "a newer stream of this node has taken over", code=Code.ABORTED))
        await old.ended.wait()
        self._leave(old)

    def _elsewhere(self, row: NodeRow, hello: pb.Hello) -> bool:
        """Whether another replica holds a living stream of another agent of this name."""
        settings = self.settings
        fresh = now_ms() - row.heartbeat_ms < 1000 * (settings.persist_seconds + 2 * settings.heartbeat_seconds)
        other = row.replica != self._replica and row.instance_id != hello.instance_id
        return other and fresh and row.status == NodeStatus.ONLINE

    async def _alive(self, session: Session) -> bool:
        """Whether the agent says anything within a heartbeat's time."""
        heard = session.heard_at
        loop = asyncio.get_running_loop()
        deadline = loop.time() + 1.2 * self.settings.heartbeat_seconds
        while loop.time() < deadline and not session.ended.is_set():
            if session.heard_at > heard:
                return True
            await asyncio.sleep(min(0.05, self.settings.heartbeat_seconds / 20))
        return session.heard_at > heard

    async def _kept(self, hello: pb.Hello, session: str) -> list[JobRecord]:
        """The jobs that the agent goes on with. What it should have but does not was never received: it goes back,
        unless it has been given through a newer session meanwhile.
        """
        held = [Held(one.job_id, one.token) for one in (*hello.held, *hello.spooled)]
        dropped = set(await self._store.jobs.renew(held, self.settings.lease_ms)) if held else set()
        records = await self._store.jobs.get_many([one.job_id for one in hello.held])
        tokens = {one.token for one in hello.held} - dropped
        known = {one.token for one in held}
        for token, job_id in (await self._store.jobs.held_by(hello.node_id)).items():
            if token not in known:
                await self._store.jobs.release(job_id, token, session=session)
        return [record for record in records if record is not None and record.token in tokens]

    def _welcome(self, hello: pb.Hello, kept: list[JobRecord]) -> pb.Welcome:
        keep = {record.token for record in kept}
        return pb.Welcome(
            heartbeat_seconds=self.settings.heartbeat_seconds,
            lease_seconds=self.settings.lease_seconds,
            keep_tokens=[one.token for one in hello.held if one.token in keep],
            kill_tokens=[one.token for one in hello.held if one.token not in keep],
            server_version=self._version,
            batches=True,
        )

    def _recover(self, session: Session, before: str) -> None:
        task = asyncio.create_task(self._lose(session, before))
        self._recoveries.add(task)
        task.add_done_callback(self._recoveries.discard)

    async def _lose(self, session: Session, before: str) -> None:
        """A restarted agent: what it ran is lost, once the results that it has brought along are settled."""
        try:
            async with asyncio.timeout(self.settings.spool_seconds):
                await session.spool_settled.wait()
        except TimeoutError:
            _log.warning("spooled results did not come", node_id=session.node_id)
        single = len(self._fleet.nodes()) == 1
        for _ in range(RECOVERY_TRIES):
            try:
                lost = await self._store.jobs.lose_session(
                    session.node_id, before, error=LOST, error_poison=POISON, single_node=single
                )
            except FleetError as error:
                _log.warning("lost jobs not given back yet", node_id=session.node_id, detail=error.detail)
                await asyncio.sleep(self.settings.repeat_seconds)
                continue
            if lost:
                _log.warning("jobs lost with a restarted agent", node_id=session.node_id, jobs=len(lost))
                self._fleet.touch(session.node_id)
            return

    # The end of a stream.

    def _leave(self, session: Session) -> None:
        if self._live.get(session.node_id) is session:
            del self._live[session.node_id]
            self._departures.add(session)
            _log.info("node left", node_id=session.node_id, goodbye=session.goodbye_at is not None)

    def _lock(self, node_id: str) -> asyncio.Lock:
        lock = self._locks.get(node_id)
        if lock is None:
            lock = self._locks[node_id] = asyncio.Lock()
        return lock


def _judge(hello: pb.Hello) -> None:
    if hello.protocol_version != PROTOCOL_VERSION:
        raise FleetError(
            "PROTOCOL_VERSION",
            f"hello.protocol_version: the agent speaks version {hello.protocol_version}, this server version "
            f"{PROTOCOL_VERSION}: install the same release on both",
            code=Code.FAILED_PRECONDITION,
        )
    if _NODE_ID.fullmatch(hello.node_id) is None or hello.node_id in _RESERVED:
        raise invalid_field("hello.node_id", "must be letters, digits and . _ -, at most 63, and no word of the API")
    if not 1 <= len(hello.instance_id) <= 128:
        raise invalid_field("hello.instance_id", "must be 1 to 128 characters")


def _in_use(node_id: str) -> FleetError:
    return FleetError(
        "NAME_IN_USE",
        f"hello.node_id: another agent is connected as {node_id!r}: stop it, or give this one another name",
        code=Code.ALREADY_EXISTS,
    )
