"""The road to the server while a session lasts."""

from __future__ import annotations

from dataclasses import dataclass

from fleet.v1 import node_pb2

from fleet_agent.commands import CommandRoad
from fleet_agent.inputs import Downloader
from fleet_agent.outbox import Outbox
from fleet_agent.upload import Uploader


@dataclass(frozen=True, slots=True)
class Link:
    """One session: its id, its outbox, its uploads and downloads, its answers to commands."""

    session: str
    outbox: Outbox
    uploader: Uploader
    downloader: Downloader | None = None
    batches: bool = False
    """The server takes batches."""
    commands: CommandRoad | None = None

    def say(self, message: node_pb2.AgentMessage, *, soon: bool = False) -> None:
        """Queues a control message of this session. `soon`: it may wait a few milliseconds for company."""
        message.session = self.session
        self.outbox.control(message, soon=soon)

    def say_last(self, message: node_pb2.AgentMessage) -> None:
        """Queues the last control message of this session: what is said after it is dropped."""
        message.session = self.session
        self.outbox.last(message)

    def tick(self, tick: node_pb2.JobTick) -> None:
        """Replaces the waiting tick of its attempt."""
        self.outbox.tick(node_pb2.AgentMessage(session=self.session, tick=tick))

    def preview(self, preview: node_pb2.JobPreview) -> None:
        """Replaces the waiting preview of its attempt."""
        self.outbox.preview(node_pb2.AgentMessage(session=self.session, preview=preview))
