"""Progress of long operations that are no jobs, told to whoever listens on this replica."""

from __future__ import annotations

from collections.abc import Callable

from fleet.v1 import types_pb2

from fleet_server.services.events import EventHub
from fleet_server.services.mailbox import Happening


class Operations:
    """Tells of operations. A listener who is slow hears the latest of each."""

    def __init__(self, hub: EventHub, *, clock: Callable[[], int]) -> None:
        self._hub = hub
        self._clock = clock

    def tell(self, progress: types_pb2.OperationProgress) -> None:
        """Never waits. The message is shared: not to be changed afterwards."""
        boxes = self._hub.listeners
        if not boxes:
            return
        event = types_pb2.Event(operation_progress=progress)
        event.time.FromMilliseconds(self._clock())
        subject = "\0".join((progress.operation, progress.node_id, progress.name, progress.request_id))
        happening = Happening(event, "operation_progress", node_id=progress.node_id, subject=subject)
        for box in boxes:
            box.put_tick(happening)
