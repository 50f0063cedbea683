"""The stream to the server: dial, Hello and Welcome, one writer, one reader, heartbeats; again after every loss."""

from __future__ import annotations

import asyncio
import platform
import random
import socket
import time
import uuid
from contextlib import suppress
from typing import Any

import grpc
import structlog
from fleet.v1 import node_pb2, node_pb2_grpc

from fleet_agent import PROTOCOL_VERSION, __version__
from fleet_agent.attempt import Stop
from fleet_agent.inventory import Inventory
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.outbox import Outbox
from fleet_agent.runner import Runner
from fleet_agent.settings import AgentSettings
from fleet_agent.upload import Metadata, Uploader

_log = structlog.get_logger("fleet.agent.session")
_WELCOME_SECONDS = 15.0
_WRITE_SECONDS = 10.0
_STABLE_SECONDS = 30.0
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
    """Keeps the agent connected until `stop`. A lost stream never stops the work."""

    def __init__(self, settings: AgentSettings, inventory: Inventory, runner: Runner, metrics: MetricsReader) -> None:
        self._settings = settings
        self._inventory = inventory
        self._runner = runner
        self._metrics = metrics
        self._instance_id = uuid.uuid4().hex
        self._outbox: Outbox | None = None
        self._session_id = ""
        self._inventory_sent: list[node_pb2.ModelFile] = []
        self._retry_after = 0.0

    async def run(self) -> None:
        """Connects for ever."""
        attempt = 0
        while True:
            begun = time.monotonic()
            try:
                await self._connect()
            except (grpc.aio.AioRpcError, SessionEndedError, OSError, TimeoutError) as error:
                _log.warning("the server cannot be reached", server=self._settings.server, why=_why(error))
            except BaseExceptionGroup as group:
                rest = group.split((grpc.aio.AioRpcError, SessionEndedError, OSError, TimeoutError))[1]
                if rest is not None:
                    raise
                _log.warning("the session is over", server=self._settings.server, why=_why(group.exceptions[0]))
            attempt = 0 if time.monotonic() - begun > _STABLE_SECONDS else attempt + 1
            await asyncio.sleep(self._pause(attempt))

    def _pause(self, attempt: int) -> float:
        """Full jitter; the first retry is spread over the setting, so that a fleet does not come back as one."""
        ceiling = self._settings.reconnect_seconds * min(1.6 ** max(0, attempt - 1), 3)
        pause = max(random.uniform(0, ceiling), self._retry_after)
        self._retry_after = 0.0
        return pause

    async def goodbye(self) -> None:
        """Says that the agent is being shut down, and lets what waits be written."""
        outbox = self._outbox
        if outbox is None:
            return
        outbox.control(node_pb2.AgentMessage(session=self._session_id, goodbye=node_pb2.AgentGoodbye()))
        with suppress(TimeoutError):
            async with asyncio.timeout(self._settings.stop_grace_seconds):
                await outbox.drained()

    async def _connect(self) -> None:
        metadata: Metadata = ()
        if self._settings.api_key is not None:
            metadata = (("x-api-key", self._settings.api_key.get_secret_value()),)
        options = list(_CHANNEL_OPTIONS)
        async with (
            grpc.aio.insecure_channel(self._settings.server, options=options) as channel,
            grpc.aio.insecure_channel(self._settings.server, options=options) as uploads,
        ):
            call: Any = node_pb2_grpc.NodeStub(channel).Connect(metadata=metadata)
            try:
                await self._converse(call, Uploader(uploads, metadata, self._settings.upload_timeout_seconds))
            finally:
                self._runner.disconnected()
                self._outbox = None
                call.cancel()

    async def _converse(self, call: Any, uploader: Uploader) -> None:
        async with asyncio.timeout(_WELCOME_SECONDS):
            await call.write(node_pb2.AgentMessage(hello=await self._hello()))
            message = await call.read()
        if message is grpc.aio.EOF or message.WhichOneof("message") != "welcome":
            await _raise_status(call)
        self._session_id = message.session
        outbox = self._outbox = Outbox()
        welcome: node_pb2.Welcome = message.welcome
        _log.info("connected", server=self._settings.server, session=message.session)
        self._runner.connected(message.session, outbox, uploader, welcome.kill_tokens)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._write(call, outbox))
            tasks.create_task(self._beat(outbox, welcome.heartbeat_seconds))
            tasks.create_task(self._read(call))

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
            slots=self._settings.slots,
            models=self._inventory_sent,
            loaded_models=self._runner.loaded(),
            held=self._runner.running(),
            spooled=self._runner.spooled(),
            host=readings.host,
            gpus=readings.gpus,
            metrics_source=readings.source,
            warnings=[*readings.warnings, *self._inventory.warnings],
        )
        hello.now.GetCurrentTime()
        return hello

    async def _write(self, call: Any, outbox: Outbox) -> None:
        while True:
            message = await outbox.next()
            async with asyncio.timeout(_WRITE_SECONDS):
                await call.write(message)
            outbox.written()

    async def _beat(self, outbox: Outbox, seconds: float) -> None:
        sequence = 0
        while True:
            await asyncio.sleep(seconds)
            sequence += 1
            outbox.control(node_pb2.AgentMessage(session=self._session_id, heartbeat=await self._heartbeat(sequence)))

    async def _heartbeat(self, sequence: int) -> node_pb2.AgentHeartbeat:
        readings = await self._metrics.read()
        await self._inventory.rescan()
        heartbeat = node_pb2.AgentHeartbeat(
            sequence=sequence,
            host=readings.host,
            gpus=readings.gpus,
            metrics_source=readings.source,
            warnings=[*readings.warnings, *self._inventory.warnings],
            slots=self._settings.slots,
            slots_free=self._runner.slots_free,
            held=[*self._runner.running(), *self._runner.spooled()],
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

    async def _read(self, call: Any) -> None:
        while True:
            message = await call.read()
            if message is grpc.aio.EOF:
                await _raise_status(call)
            if message.session != self._session_id:
                continue
            self._handle(message)

    def _handle(self, message: node_pb2.ServerMessage) -> None:
        kind = message.WhichOneof("message")
        if kind == "assign":
            self._runner.assign(message.assign)
        elif kind == "cancel":
            self._runner.stop([message.cancel.token], Stop.CANCELLED)
        elif kind == "complete_ack":
            self._runner.acknowledged(message.complete_ack.token)
        elif kind == "heartbeat_ack":
            self._runner.stop(message.heartbeat_ack.drop_tokens, Stop.DROPPED)
            self._runner.show_previews(message.heartbeat_ack.preview_tokens)
        elif kind == "goodbye":
            self._retry_after = message.goodbye.retry_after_seconds
            raise SessionEndedError("the server is being shut down")


async def _raise_status(call: Any) -> None:
    """Ends the session with the status that the server closed it with."""
    code, details = await call.code(), await call.details()
    raise SessionEndedError(f"the server closed the stream: {code.name}: {details}")


def _why(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
