"""Frames of engines' own protocols, from the sessions to who passes them on. Nothing is kept here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fleet.v1 import node_pb2


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame about a job, of the attempt that runs now: `text`, or `binary` where that is None."""

    job_id: str
    node_id: str
    text: str | None
    binary: bytes = b""
    relayed: bool = False
    """It comes from another replica."""


class FrameHub:
    """One for each replica. Frames come in the order in which the node sent them."""

    def __init__(self) -> None:
        self._listeners: list[Callable[[Frame], None]] = []

    def take(self, node_id: str, message: node_pb2.AgentMessage) -> None:
        """A frame came from a node; its attempt has been judged to be current."""
        frame = message.frame
        text = frame.text if frame.WhichOneof("frame") == "text" else None
        self.publish(Frame(frame.job_id, node_id, text, frame.binary))

    def publish(self, frame: Frame) -> None:
        """Gives the frame to all who listen, at once."""
        for listener in tuple(self._listeners):
            listener(frame)

    def subscribe(self, listener: Callable[[Frame], None]) -> Callable[[], None]:
        """Calls `listener(frame)` for each frame from now on; it must not wait. Returns how to end it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)
