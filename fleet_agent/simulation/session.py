"""The real agent's session over a shared channel, with every choice of its own seeded, and watched by the tally."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from typing import Any

from fleet.v1 import node_pb2, node_pb2_grpc

from fleet_agent.inventory import Inventory
from fleet_agent.link import Link
from fleet_agent.metrics.reader import MetricsReader
from fleet_agent.runner import Runner
from fleet_agent.session import Session, SessionEndedError
from fleet_agent.settings import AgentSettings
from fleet_agent.simulation.channels import Channels
from fleet_agent.simulation.tally import Tally

_BEAT_JITTER = 0.1


class SimulatedSession(Session):
    """A Session whose stream is one of many on a channel. `cut` ends the stream for a while, as a network does."""

    def __init__(
        self,
        settings: AgentSettings,
        inventory: Inventory,
        runner: Runner,
        metrics: MetricsReader,
        *,
        number: int,
        channels: Channels,
        tally: Tally,
        rng: random.Random,
    ) -> None:
        super().__init__(settings, inventory, runner, metrics)
        self._instance_id = uuid.UUID(int=rng.getrandbits(128)).hex
        self._number = number
        self._channels = channels
        self._tally = tally
        self._rng = rng
        self._away = 0.0
        self._cut = asyncio.Event()

    def cut(self, seconds: float) -> None:
        """Ends the stream; the next one is dialled after that many seconds."""
        self._away = seconds
        self._cut.set()

    def _pause(self, attempt: int) -> float:
        if self._away:
            pause, self._away = self._away, 0.0
            return pause
        return super()._pause(attempt)

    async def _connect(self) -> None:
        self._cut.clear()
        channels = self._channels
        self._tally.dialled(time.monotonic())
        channel = channels.stream(self._number)
        call: Any = node_pb2_grpc.NodeStub(channel).Connect(metadata=channels.metadata)
        try:
            await self._converse(call, channels.uploader(self._number))
        finally:
            self._tally.offline(self._settings.node_id, time.monotonic())
            self._over(channel)
            call.cancel()

    async def _beat(self, link: Link, seconds: float) -> None:
        self._tally.online(self._settings.node_id, time.monotonic())
        # The first beat anywhere in the interval: agents that were welcomed together do not beat together.
        beats = asyncio.create_task(self._beat_after(self._rng.uniform(0, seconds), link, seconds))
        cut = asyncio.create_task(self._cut.wait())
        try:
            await asyncio.wait({beats, cut}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            beats.cancel()
            cut.cancel()
        if self._cut.is_set():
            raise SessionEndedError("cut by the simulation")
        beats.result()

    async def _beat_after(self, pause: float, link: Link, seconds: float) -> None:
        await asyncio.sleep(pause)
        await super()._beat(link, seconds * self._rng.uniform(1 - _BEAT_JITTER, 1 + _BEAT_JITTER))

    async def _heartbeat(self, sequence: int) -> node_pb2.AgentHeartbeat:
        self._tally.beats += 1
        return await super()._heartbeat(sequence)

    def _handle(self, message: node_pb2.ServerMessage) -> None:
        kind = message.WhichOneof("message")
        node_id, now = self._settings.node_id, time.monotonic()
        if kind == "assign":
            self._tally.assigned(message.assign, node_id, now)
        elif kind == "complete_ack":
            self._tally.acknowledged(message.complete_ack, node_id, now)
        elif kind == "heartbeat_ack":
            self._tally.dropped(message.heartbeat_ack.drop_tokens, node_id)
        elif kind == "cancel":
            self._tally.cancelled(message.cancel.token)
        super()._handle(message)
