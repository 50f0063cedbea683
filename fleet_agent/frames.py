"""Frames between the agent and a slot's child process: a JSON object and a blob, each with its length before it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, BinaryIO

import orjson

if TYPE_CHECKING:
    # The child's side has no use for it, and it takes long to import.
    import asyncio

_HEAD = struct.Struct(">II")
MAX_JSON_BYTES = 16 << 20
MAX_BLOB_BYTES = 1 << 20

Message = dict[str, Any]


class BadFrameError(ValueError):
    """The other side does not speak our frames, or a message does not fit into one."""


def encode(message: Message, blob: bytes = b"") -> bytes:
    """One frame. Raises BadFrameError for what is too large or no JSON."""
    try:
        text = orjson.dumps(message)
    except TypeError as error:
        raise BadFrameError(f"not to be said as JSON: {error}") from error
    if len(text) > MAX_JSON_BYTES or len(blob) > MAX_BLOB_BYTES:
        raise BadFrameError(
            f"a message of {len(text):,} + {len(blob):,} bytes; at most {MAX_JSON_BYTES:,} + {MAX_BLOB_BYTES:,} pass"
        )
    return _HEAD.pack(len(text), len(blob)) + text + blob


def _lengths(head: bytes | bytearray) -> tuple[int, int]:
    text, blob = _HEAD.unpack(head)
    if text > MAX_JSON_BYTES or blob > MAX_BLOB_BYTES:
        raise BadFrameError(f"a frame that claims {text:,} + {blob:,} bytes")
    return text, blob


def _decode(text: bytes) -> Message:
    try:
        message = orjson.loads(text)
    except ValueError as error:
        raise BadFrameError(f"a frame that is no JSON: {error}") from error
    if not isinstance(message, dict):
        raise BadFrameError(f"a frame that holds no object: {text[:80]!r}")
    return message


def read(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """The next frame of a buffered stream; None at its end, also in the middle of a frame. Raises BadFrameError."""
    head = _exactly(stream, _HEAD.size)
    if head is None:
        return None
    text, blob = _lengths(head)
    raw = _exactly(stream, text)
    rest = _exactly(stream, blob)
    if raw is None or rest is None:
        return None
    return _decode(raw), rest


def _exactly(stream: BinaryIO, length: int) -> bytes | None:
    """So many bytes; a buffered stream gives fewer at its end alone."""
    data = stream.read(length)
    return data if len(data) == length else None


class Parts:
    """Takes frames out of bytes as they come."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        """What has come."""
        self._bytes += data

    def next(self) -> tuple[Message, bytes] | None:
        """The next whole frame. Raises BadFrameError."""
        if len(self._bytes) < _HEAD.size:
            return None
        text, blob = _lengths(self._bytes[: _HEAD.size])
        end = _HEAD.size + text + blob
        if len(self._bytes) < end:
            return None
        frame = bytes(self._bytes[_HEAD.size : end])
        del self._bytes[:end]
        return _decode(frame[:text]), frame[text:]


async def receive(stream: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """The next frame of an asyncio stream; None at its end, also in the middle of a frame. Raises BadFrameError."""
    try:
        text, blob = _lengths(await stream.readexactly(_HEAD.size))
        raw = await stream.readexactly(text)
        rest = await stream.readexactly(blob)
    except (EOFError, ConnectionError):
        return None
    return _decode(raw), rest
