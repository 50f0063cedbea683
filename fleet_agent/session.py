"""The stream to the server: dial, Hello and Welcome, one writer, one reader, heartbeats; again after every loss."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import random
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, NoReturn

import grpc
import structlog
from fleet.v1 import command_pb2, node_pb2, node_pb2_grpc

from fleet_agent import PROTOCOL_VERSION, __version__
from fleet_agent.attempt import Stop
from fleet_agent.commands import CommandDesk, CommandRoad
from fleet_agent.docker_engine import NO_ENGINE, EngineFacts
from fleet_agent.flow import GATHER_SECONDS, Flow
from fleet_agent.identity import Door, Options
from fleet_agent.inputs import Downloader
from fleet_agent.inventory import Inventory
from fleet_agent.link import Link
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.outbox import Outbox, OutboxFullError
from fleet_agent.runner import Runner
from fleet_agent.settings import AgentSettings
from fleet_agent.upload import Metadata, Uploader

_log = structlog.get_logger("fleet.agent.session")
_BEAT_SECONDS = 5.0
_BEATS_KEPT = 64
_RECONNECT_GROWTH, _RECONNECT_MOST = 1.6, 3
_CHANNEL_OPTIONS = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    ("grpc.use_local_subchannel_pool", 1),
)


class SessionEndedError(Exception):
    """The stream is over; the text says why."""


class Session:
    """Keeps the agent connected until `goodbye`. A lost stream never stops the work."""

    def __init__(
        self,
        settings: AgentSettings,
        inventory: Inventory,
        runner: Runner,
        metrics: MetricsReader,
        desk: CommandDesk | None = None,
        facts: Callable[[], EngineFacts] = lambda: NO_ENGINE,
        welcomed: Callable[[], None] = lambda: None,
        door: Door | None = None,
    ) -> None:
        self._settings = settings
        self._inventory = inventory
        self._runner = runner
        self._metrics = metrics
        self._desk = desk
        self._facts = facts
        self._welcomed = welcomed
        self._door = door or Door(settings.server)
        self._instance_id = uuid.uuid4().hex
        self._link: Link | None = None
        self._call: Any = None
        self._inventory_sent: list[node_pb2.ModelFile] = []
        self._lease_seconds = 0.0
        self._beats: dict[int, tuple[float, list[str]]] = {}
        self._beat_now = asyncio.Event()
        self._retry_after = 0.0
        self._reached = False
        self._stopping = False
        self._said_ready = False
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Connects, again after every loss whatever its cause; returns after `goodbye`."""
        attempt = 0
        while not self._stopping:
            begun = time.monotonic()
            try:
                await self._connect()
            except Exception as error:
                cause = _cause(error)
                if not isinstance(cause, _EXPECTED):
                    _log.error("the session failed", exc_info=error)
                _log.warning("the server is not connected", server=self._settings.server, why=_why(cause))
            self._ended.set()
            if self._stopping:
                return
            stable = time.monotonic() - begun > self._settings.stable_seconds
            # A server that is away is dialled within the same jitter for as long as it takes: so a fleet is back soon
            # after it, and evenly. Only one that is there and ends our streams is given more and more time.
            attempt = attempt + 1 if self._reached and not stable else 0
            await asyncio.sleep(self._pause(attempt))

    def _pause(self, attempt: int) -> float:
        """What the server asked for and full jitter on top, so that a fleet does not come back as one."""
        # The exponent is bounded: after hours without a server the power would be no float any more.
        growth = min(_RECONNECT_GROWTH ** min(max(0, attempt - 1), 10), _RECONNECT_MOST)
        pause = self._retry_after + random.uniform(0, self._settings.reconnect_seconds * growth)
        self._retry_after = 0.0
        return pause

    def beat(self) -> None:
        """Says how the node is now, without waiting for the next heartbeat."""
        self._beat_now.set()

    def say(self, message: node_pb2.AgentMessage) -> bool:
        """Queues a message that is about no job; false where no server is connected."""
        if self._link is None:
            return False
        self._link.say(message)
        return True

    async def goodbye(self) -> None:
        """Says that the agent is being shut down; returns when the server has heard all that waited, or in time."""
        self._stopping = True
        link, call = self._link, self._call
        if link is None:
            return
        link.say_last(node_pb2.AgentMessage(goodbye=node_pb2.AgentGoodbye()))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stop_grace_seconds):
                ended = asyncio.ensure_future(self._ended.wait())
                drained = asyncio.ensure_future(link.outbox.drained())
                try:
                    await asyncio.wait({ended, drained}, return_when=asyncio.FIRST_COMPLETED)
                    if drained.done():
                        # A cancelled stream may lose what the server has not read yet; a half-closed one does not.
                        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                            await call.done_writing()
                        await ended
                finally:
                    ended.cancel()
                    drained.cancel()

    async def _connect(self) -> None:
        metadata: Metadata = ()
        if self._settings.api_key is not None:
            metadata = (("x-api-key", self._settings.api_key.get_secret_value()),)
        options: Options = list(_CHANNEL_OPTIONS)
        async with (
            self._door.channel(options) as channel,
            self._door.channel(options) as uploads,
            # Long answers of commands do not share the uploads' connection; it is made with the first command.
            self._door.channel(options) as commands,
        ):
            call: Any = node_pb2_grpc.NodeStub(channel).Connect(metadata=metadata)
            try:
                # Connected ahead of the first result, which need not wait for it then.
                uploads.get_state(try_to_connect=True)
                seconds = self._settings.upload_timeout_seconds
                files = Uploader(uploads, metadata, seconds), Downloader(uploads, metadata, seconds)
                await self._converse(call, *files, CommandRoad(commands, metadata))
            finally:
                self._over(channel)
                call.cancel()

    def _over(self, channel: grpc.aio.Channel) -> None:
        """The stream on this channel has ended."""
        self._reached = channel.get_state() is grpc.ChannelConnectivity.READY
        self._runner.disconnected()
        self._link = self._call = None

    async def _converse(
        self, call: Any, uploader: Uploader, downloader: Downloader | None = None, road: CommandRoad | None = None
    ) -> None:
        seconds = self._settings.welcome_seconds
        async with _deadline(seconds, f"no Welcome within {seconds:g} s"):
            await call.write(node_pb2.AgentMessage(hello=await self._hello()))
            message = await call.read()
        if message is grpc.aio.EOF:
            await _raise_status(call)
        if message.WhichOneof("message") != "welcome":
            raise SessionEndedError(f"the server's first message is no Welcome but {message.WhichOneof('message')}")
        welcome: node_pb2.Welcome = message.welcome
        link = Link(message.session, Outbox(), uploader, downloader, welcome.batches, road)
        self._lease_seconds = welcome.lease_seconds
        self._beats.clear()
        self._link, self._call = link, call
        self._ended.clear()
        _log.info("connected", server=self._settings.server, session=link.session)
        self._say_ready()
        self._runner.connected(link, welcome.kill_tokens)
        self._welcomed()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(call, link))
            tasks.create_task(self._beat(link, welcome.heartbeat_seconds))
            tasks.create_task(self._read(call, link))

    def _say_ready(self) -> None:
        """Once, on standard output, for who started this process and waits."""
        if self._settings.ready_json and not self._said_ready:
            self._said_ready = True
            ready = {"status": "ready", "node_id": self._settings.node_id, "server": self._settings.server}
            sys.stdout.write(json.dumps({**ready, "slots": self._settings.capacity, "pid": os.getpid()}) + "\n")
            sys.stdout.flush()

    async def _hello(self) -> node_pb2.Hello:
        readings = await self._metrics.read()
        self._inventory_sent = self._inventory.models()
        hello = node_pb2.Hello(
            protocol_version=PROTOCOL_VERSION,
            node_id=self._settings.node_id,
            instance_id=self._instance_id,
            hostname=socket.gethostname(),
            agent_version=__version__,
            os=platform.system().lower(),
            arch=platform.machine(),
            clusters=self._settings.clusters,
            labels=self._settings.labels,
            engines=self._inventory.engines(),
            slots=self._settings.capacity,
            models=self._inventory_sent,
            loaded_models=self._runner.loaded(),
            held=self._runner.running(),
            spooled=self._runner.spooled(),
            host=readings.host,
            gpus=readings.gpus,
            metrics_source=readings.source,
            warnings=[*readings.warnings, *self._inventory.warnings],
            batches=True,
            docker_version=self._facts().version,
            swarm_role=self._facts().swarm_role,
            swarm_node_id=self._facts().swarm_node_id,
            managed_containers=self._facts().managed_containers,
            intake=self._inventory.intake(),
        )
        hello.now.GetCurrentTime()
        return hello

    async def _write(self, call: Any, link: Link) -> None:
        seconds, outbox, flow = self._settings.write_seconds, link.outbox, Flow()
        while True:
            message = await outbox.next()
            if link.batches:
                if flow.busy:
                    # Where much is said, more is on its way: many small writes cost more than what they carry.
                    await asyncio.sleep(GATHER_SECONDS)
                message = outbox.with_company(message)
                flow.note(max(1, len(message.batch.messages)) + outbox.spared)
                outbox.crowded, outbox.spared = flow.busy, 0
            async with _deadline(seconds, f"a message could not be written within {seconds:g} s"):
                await call.write(message)
            outbox.written()

    async def _beat(self, link: Link, seconds: float) -> None:
        sequence = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds if seconds > 0 else _BEAT_SECONDS):
                    await self._beat_now.wait()
            self._beat_now.clear()
            sequence += 1
            begun = time.monotonic()
            heartbeat = await self._heartbeat(sequence)
            self._beats[sequence] = begun, [held.token for held in heartbeat.held]
            if len(self._beats) > _BEATS_KEPT:
                self._beats.pop(next(iter(self._beats)))
            link.say(node_pb2.AgentMessage(heartbeat=heartbeat))

    async def _heartbeat(self, sequence: int) -> node_pb2.AgentHeartbeat:
        readings = await self._metrics.read()
        heartbeat = node_pb2.AgentHeartbeat(
            sequence=sequence,
            host=readings.host,
            gpus=readings.gpus,
            metrics_source=readings.source,
            warnings=[*readings.warnings, *self._inventory.warnings],
            slots=self._settings.capacity,
            slots_free=self._runner.slots_free,
            held=[*self._runner.running(), *self._runner.spooled()],
            docker_version=self._facts().version,
            swarm_role=self._facts().swarm_role,
            swarm_node_id=self._facts().swarm_node_id,
            managed_containers=self._facts().managed_containers,
            loaded_models=self._runner.loaded(),
        )
        models = self._inventory.models()
        if models != self._inventory_sent:
            heartbeat.inventory = True
            heartbeat.models.extend(models)
            heartbeat.engines.extend(self._inventory.engines())
            self._inventory_sent = models
        heartbeat.now.GetCurrentTime()
        return heartbeat

    async def _read(self, call: Any, link: Link) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                await _raise_status(call)
            if message.session != link.session:
                continue
            if message.HasField("batch"):
                for one in message.batch.messages:
                    self._handle(one)
            else:
                self._handle(message)

    def _handle(self, message: node_pb2.ServerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "assign":
            self._runner.assign(message.assign)
            if message.assign.exclusive:
                # It begins when the server has heard of it again.
                self._beat_now.set()
        elif kind == "cancel":
            self._runner.cancel(message.cancel.job_id, message.cancel.token)
        elif kind == "complete_ack":
            self._runner.deliveries.acknowledged(message.complete_ack.token)
        elif kind == "heartbeat_ack":
            self._acknowledged(message.heartbeat_ack)
            self._runner.stop(message.heartbeat_ack.drop_tokens, Stop.DROPPED)
            self._runner.show_previews(message.heartbeat_ack.preview_tokens)
        elif kind == "command":
            self._command(message.command)
        elif kind == "goodbye":
            self._retry_after = message.goodbye.retry_after_seconds
            raise SessionEndedError("the server is being shut down")

    def _command(self, command: command_pb2.Command) -> None:
        link = self._link
        if self._desk is not None and link is not None and link.commands is not None:
            self._desk.take(link.commands, link.session, command)

    def _acknowledged(self, ack: node_pb2.HeartbeatAck) -> None:
        """The leases that this heartbeat renewed last at least from when it was begun."""
        beat = self._beats.pop(ack.sequence, None)
        if beat is not None and self._lease_seconds > 0:
            begun, tokens = beat
            dropped = set(ack.drop_tokens)
            until = begun + self._lease_seconds * self._settings.exclusive_share
            self._runner.renewed([token for token in tokens if token not in dropped], until)


_EXPECTED = (
    grpc.aio.AioRpcError,
    SessionEndedError,
    OutboxFullError,
    OSError,
    asyncio.InvalidStateError,
    grpc.aio.UsageError,
)


@contextlib.asynccontextmanager
async def _deadline(seconds: float, why: str) -> AsyncIterator[None]:
    """SessionEndedError with `why` where the block takes longer."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise SessionEndedError(why) from None


async def _raise_status(call: Any) -> NoReturn:
    """Ends the session with the status that the server closed it with."""
    code, details = await call.code(), await call.details()
    raise SessionEndedError(f"the server closed the stream: {code.name}: {details}")


def _cause(error: BaseException) -> BaseException:
    """The error at the heart of a group: the reader's, which has the server's status, before the writer's."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [_cause(one) for one in error.exceptions]
    return next((one for one in inner if isinstance(one, SessionEndedError)), inner[0])


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
