"""Reads server-sent events."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fleet_client.errors import ApiError

Event = dict[str, Any]


class EventReader:
    """Turns lines of a text/event-stream into events. Comments are keep-alives and give nothing."""

    def __init__(self) -> None:
        self._data: list[str] = []
        self._kind = ""
        self.last_id: str | None = None

    def feed(self, line: str) -> Iterator[Event]:
        """The event that this line ends, if it ends one. Raises ApiError for an error event."""
        if line:
            name, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if name == "data":
                self._data.append(value)
            elif name == "event":
                self._kind = value
            elif name == "id":
                self.last_id = value
            return
        data, kind = self._data, self._kind
        self._data, self._kind = [], ""
        if not data:
            return
        event = json.loads("\n".join(data))
        if kind == "error":
            raise ApiError(500, event, None)
        yield event
