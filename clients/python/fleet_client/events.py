"""Reads server-sent events, and goes on where a stream broke."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from fleet_client.errors import ApiError, ConnectionFailedError, FleetError, WaitTimeoutError, error_of_event

Event = dict[str, Any]
_FIRST_DELAY = 0.1
_STEADY_SECONDS = 5.0
"""A stream that lived so long was no flapping one: the first try after it comes soon."""
_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventReader:
    """Turns the bytes of a text/event-stream into events. Comments are keep-alives and give nothing.

    Lines end where the standard says, and nowhere else: U+2028 and its like may stand in a JSON text.
    """

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []
        self._kind = b""

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that this chunk completes. Raises ApiError for an error event."""
        lines = _LINE_END.split(self._rest + chunk)
        # A CR at the very end may be the first half of CRLF: it waits for what follows.
        self._rest = lines.pop()
        if not self._rest and chunk.endswith(b"\r"):
            self._rest = lines.pop() + b"\r"
        for line in lines:
            if line:
                self._field(line)
            elif self._data:
                data, kind = b"\n".join(self._data), self._kind
                self._data, self._kind = [], b""
                event: Event = json.loads(data)
                if kind == b"error":
                    raise error_of_event(event)
                yield event
            else:
                self._kind = b""

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._kind = value


class Resume:
    """Says when to try a broken stream again, and where it goes on: after the last event that has an id.

    Gives up `patience_seconds` after the stream broke, or at the deadline, `limit_seconds` after the making of this
    object. A stream that never came up is not tried again: the address may be wrong. `live` is for a stream that begins
    with what happens next.
    """

    def __init__(
        self,
        patience_seconds: float,
        limit_seconds: float | None = None,
        *,
        live: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._live = live
        self._patience = patience_seconds
        self._clock = clock
        self._limit = limit_seconds
        self._deadline = None if limit_seconds is None else clock() + limit_seconds
        self._opened: float | None = None
        self._broke: float | None = None
        self._delay = _FIRST_DELAY
        self.last_id: str | None = None

    def headers(self) -> dict[str, str]:
        """Of the next try. Raises WaitTimeoutError past the deadline."""
        asked = {"Accept": "text/event-stream"}
        if self.last_id is not None:
            asked["Last-Event-ID"] = self.last_id
        if self._deadline is not None:
            left = self._deadline - self._clock()
            if left <= 0:
                raise self._late()
            # The server ends the stream then: only it can while nothing is sent. (At most 8 digits.)
            asked["Grpc-Timeout"] = f"{min(99_999_999, int(left * 1000) + 1)}m"
        return asked

    @property
    def lost_events(self) -> bool:
        """Whether what happened since the stream broke is lost to the next try."""
        return self._live and self.last_id is None

    def opened(self) -> None:
        """The stream has come up."""
        self._opened = self._clock()

    def saw(self, event: Event) -> None:
        """An event came: what broke is whole again."""
        self._broke = None
        if event.get("id") is not None:
            self.last_id = event["id"]

    def pause(self, error: FleetError) -> float:
        """Seconds to wait before the next try after `error`, which is raised where there is none."""
        if self._deadline is not None and isinstance(error, ApiError) and error.status == 504:
            raise self._late() from error
        passing = isinstance(error, ConnectionFailedError) or (isinstance(error, ApiError) and error.status == 503)
        now = self._clock()
        if not passing or self._opened is None:
            raise error
        if self._broke is None:
            self._broke = now
            if now - self._opened > _STEADY_SECONDS:
                self._delay = _FIRST_DELAY
        if now - self._broke >= self._patience:
            raise error
        # Jitter: after a restart not all clients come in the same moment.
        delay = self._delay * random.uniform(0.75, 1.25)
        self._delay = min(5.0, self._delay * 2)
        return delay

    def _late(self) -> WaitTimeoutError:
        return WaitTimeoutError(f"not ended within {self._limit:g} s; the job goes on: wait again or cancel it")


def lost_events() -> Event:
    """Told by the client where a stream broke before it had an id to go on from: read the lists again."""
    return {"id": None, "time": None, "type": "gap", "data": {"since": None, "oldest_id": None}}


def ended_early(base_url: str) -> ConnectionFailedError:
    """For a stream that ends without an error though there was more to come."""
    return ConnectionFailedError(f"{base_url} ended the stream")
