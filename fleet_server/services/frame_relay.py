"""Frames between replicas: a client may listen at one server and its node's stream be held by another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from fleet.v1 import node_pb2
from google.protobuf.message import DecodeError

from fleet_server.domain.errors import FleetError
from fleet_server.services.frames import Frame, FrameHub

KIND = b"f"
_WAITING = 1_024


class Relay(Protocol):
    """What replicas say to each other: services.tick_relay."""

    heard: dict[bytes, Callable[[bytes], None]]

    @property
    def others(self) -> bool:
        """Whether another replica listens."""
        ...

    async def say(self, kind: bytes, message: bytes) -> None:
        """Says it to the others. Raises STORE_UNAVAILABLE."""
        ...


class FrameRelay:
    """Passes on the frames of this replica's agents that are for clients elsewhere, in order; `elsewhere(job_id)` says
    which. At most 1,024 wait; more are lost, as all are while the store is away: ends are told by the store's events.
    """

    def __init__(self, relay: Relay, hub: FrameHub, elsewhere: Callable[[str], bool]) -> None:
        self._relay = relay
        self._hub = hub
        self._elsewhere = elsewhere
        self._waiting: asyncio.Queue[Frame] = asyncio.Queue(_WAITING)
        relay.heard[KIND] = self._heard
        hub.subscribe(self._note)

    async def run(self) -> None:
        """Says what waits, until cancelled."""
        while True:
            frame = await self._waiting.get()
            message = node_pb2.EngineFrame(job_id=frame.job_id, token=frame.node_id)
            if frame.text is None:
                message.binary = frame.binary
            else:
                message.text = frame.text
            try:
                await self._relay.say(KIND, message.SerializeToString())
            except FleetError:
                # Whoever listens there is told of the end.
                continue

    def _note(self, frame: Frame) -> None:
        if not frame.relayed and self._relay.others and self._elsewhere(frame.job_id) and not self._waiting.full():
            self._waiting.put_nowait(frame)

    def _heard(self, message: bytes) -> None:
        try:
            frame = node_pb2.EngineFrame.FromString(message)
        except DecodeError:
            return
        text = frame.text if frame.WhichOneof("frame") == "text" else None
        # (Between replicas the token's place names the node.)
        self._hub.publish(Frame(frame.job_id, frame.token, text, frame.binary, relayed=True))
