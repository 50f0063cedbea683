"""What waits for one socket: bounded, in order; previews give way, ends never do."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import orjson

PREVIEW = 1
TEXT = 3
PREVIEW_WITH_METADATA = 4
_FORMATS = {"image/jpeg": 1, "image/png": 2}
_JPEG = 1


@dataclass(slots=True)
class Entry:
    """A frame, or the frames of an end (`job_id` is set then). `key` tells what a later one may take the place of."""

    frames: list[str | bytes]
    key: tuple[str, str] | None = None
    ends: str = ""

    @property
    def size(self) -> int:
        return sum(len(frame) for frame in self.frames)


class Outbox:
    """At most `most` entries and `most_bytes`; what comes beyond them, though all that may has given way, closes it."""

    def __init__(self, *, most: int, most_bytes: int, crowded: int = 64, previews: int = 8) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._crowded = crowded
        self._previews = previews
        self._entries: deque[Entry] = deque()
        self._bytes = 0
        self._some = asyncio.Event()
        self.full = False

    def put(self, frame: str | bytes, key: tuple[str, str] | None = None, *, replace: bool = False) -> None:
        """Adds a frame. The newest with the same key that still waits makes room for it where the socket is behind;
        with `replace` once `previews` of them wait: fewer are a busy server's doing, and a short prompt's are all told.
        """
        if key is not None:
            alike = [entry for entry in self._entries if entry.key == key]
            if alike and (len(self._entries) >= self._crowded or (replace and len(alike) >= self._previews)):
                self._bytes += len(frame) - alike[-1].size
                alike[-1].frames = [frame]
                return
        self._add(Entry([frame], key))

    def put_end(self, job_id: str, frames: Sequence[str]) -> None:
        """Adds the frames of an end, which are told together."""
        self._add(Entry(list(frames), None, job_id))

    async def take(self) -> Entry:
        """The next entry; waits for one."""
        while not self._entries:
            self._some.clear()
            await self._some.wait()
        entry = self._entries.popleft()
        self._bytes -= entry.size
        return entry

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self._bytes += entry.size
        if len(self._entries) > self._most or self._bytes > self._most_bytes:
            self._drop_previews()
            self.full = self.full or len(self._entries) > self._most or self._bytes > self._most_bytes
        self._some.set()

    def _drop_previews(self) -> None:
        self._entries = deque(entry for entry in self._entries if entry.key is None or entry.key[0] != "preview")
        self._bytes = sum(entry.size for entry in self._entries)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture in the making as the node sent it (type 4), and what of it clients without metadata get (type 1)."""

    data: bytes
    image: bytes
    format: int

    @property
    def lossy(self) -> bool:
        """Whether a later one may take its place: pictures as PNG are results."""
        return self.format == _JPEG

    @property
    def plain(self) -> bytes:
        return struct.pack(">II", PREVIEW, self.format) + self.image


def picture_of(data: bytes) -> Picture | None:
    """The picture in a binary frame of type 1 or 4; None in another, or where it is malformed."""
    if len(data) < 8:
        return None
    kind, number = struct.unpack(">II", data[:8])
    if kind == PREVIEW:
        return Picture(data, data[8:], number)
    if kind != PREVIEW_WITH_METADATA or len(data) < 8 + number:
        return None
    try:
        metadata = orjson.loads(data[8 : 8 + number])
        return Picture(data, data[8 + number :], _FORMATS.get(metadata.get("image_type"), _JPEG))
    except (ValueError, AttributeError):
        return None
