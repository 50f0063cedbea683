"""Frames between the agent and a slot's child process: a JSON object and a blob, each with its length before it."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, BinaryIO

import orjson

_HEAD = struct.Struct(">II")
MAX_JSON_BYTES = 16 << 20
MAX_BLOB_BYTES = 1 << 20

Message = dict[str, Any]


class BadFrameError(ValueError):
    """The other side does not speak our frames."""


def encode(message: Message, blob: bytes = b"") -> bytes:
    """One frame."""
    text = orjson.dumps(message)
    return _HEAD.pack(len(text), len(blob)) + text + blob


def _lengths(head: bytes) -> tuple[int, int]:
    text, blob = _HEAD.unpack(head)
    if text > MAX_JSON_BYTES or blob > MAX_BLOB_BYTES:
        raise BadFrameError(f"a frame of {text} + {blob} bytes")
    return text, blob


def read(stream: BinaryIO) -> tuple[Message, bytes] | None:
    """The next frame of a blocking stream; None at its end."""
    head = _exactly(stream, _HEAD.size)
    if head is None:
        return None
    text, blob = _lengths(head)
    raw = _exactly(stream, text)
    rest = _exactly(stream, blob)
    if raw is None or rest is None:
        return None
    return orjson.loads(raw), rest


def _exactly(stream: BinaryIO, length: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < length:
        part = stream.read(length - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)


async def receive(stream: asyncio.StreamReader) -> tuple[Message, bytes] | None:
    """The next frame of an asyncio stream; None at its end."""
    try:
        text, blob = _lengths(await stream.readexactly(_HEAD.size))
        raw = await stream.readexactly(text)
        return orjson.loads(raw), await stream.readexactly(blob)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
