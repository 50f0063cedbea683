"""Reading a request body: its size and its pace are bounded whatever the headers say."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

from fleet_server.bridge.asgi import Receive
from fleet_server.bridge.settings import BridgeSettings
from fleet_server.domain.errors import FleetError


def body_too_large(limit: int) -> FleetError:
    """The 413 of a call that takes at most `limit` bytes."""
    return FleetError("BODY_TOO_LARGE", f"body: at most {limit} bytes are taken here; send less or split it")


def body_too_slow() -> FleetError:
    """The 408 of a body that did not come."""
    return FleetError("REQUEST_TIMEOUT", "body: it came too slowly; send it again over a faster connection")


def client_closed() -> FleetError:
    """The caller went away before its body was complete (for the logs only)."""
    return FleetError("CLIENT_CLOSED", "the client closed the connection before the body was complete")


def announced_length(headers: Mapping[bytes, bytes], limit: int) -> None:
    """Refuse a body by its Content-Length before any of it is read. Raises FleetError BODY_TOO_LARGE."""
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length[:20]) > limit:
        raise body_too_large(limit)


async def body_chunks(receive: Receive, limit: int, settings: BridgeSettings) -> AsyncGenerator[bytes, None]:
    """The pieces of the body as they come, at least one.

    Raises FleetError BODY_TOO_LARGE, REQUEST_TIMEOUT, CLIENT_CLOSED.
    """
    loop = asyncio.get_running_loop()
    start, received = loop.time(), 0
    while True:
        slowest = start + settings.body_chunk_seconds + received / settings.body_min_bytes_per_second
        try:
            async with asyncio.timeout_at(min(slowest, loop.time() + settings.body_chunk_seconds)):
                message = await receive()
        except TimeoutError:
            raise body_too_slow() from None
        if message["type"] == "http.disconnect":
            raise client_closed()
        chunk: bytes = message.get("body", b"")
        received += len(chunk)
        if received > limit:
            raise body_too_large(limit)
        yield chunk
        if not message.get("more_body", False):
            return


async def read_body(receive: Receive, limit: int, settings: BridgeSettings) -> bytes:
    """The whole body. Raises as body_chunks."""
    chunks = [chunk async for chunk in body_chunks(receive, limit, settings)]
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)
