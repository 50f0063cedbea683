"""Helpers of the raw-socket tests: a real uvicorn in this process, and a client that writes bytes as it
likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import uvicorn

Asgi = Callable[[Any, Any, Any], Any]


async def wait_until(condition: Callable[[], object], seconds: float = 50.0) -> None:
    """Returns once `condition()` is true; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - any condition, not an event
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def serve(app: Asgi, **settings: Any) -> AsyncIterator[uvicorn.Server]:
    """A uvicorn server for `app` on a free loopback port; `port_of` gives the port."""
    settings = {"lifespan": "off", "log_level": "warning", **settings}
    config = uvicorn.Config(app, host="127.0.0.1", port=0, **settings)
    server = uvicorn.Server(config)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(server._serve())
        try:
            await wait_until(lambda: server.started or task.done())
            yield server
        finally:
            server.should_exit = True
            server.force_exit = True


def port_of(server: uvicorn.Server) -> int:
    """The port that the server got."""
    return int(server.servers[0].sockets[0].getsockname()[1])


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply, its header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


class RawClient:
    """One TCP connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        """Writes and waits until the kernel has taken most of it."""
        self.writer.write(data)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """The next reply; raises IncompleteReadError where the connection ends before one."""
        async with asyncio.timeout(50):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            pairs = [line.partition(":") for line in head[1:] if line]
            headers = {name.lower(): value.strip() for name, _, value in pairs}
            if headers.get("transfer-encoding") == "chunked":
                body = await self._chunks()
            else:
                body = await self.reader.readexactly(int(headers.get("content-length", "0")))
            return Reply(int(head[0].split()[1]), headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int((await self.reader.readline()).strip(), 16):
            body += await self.reader.readexactly(size)
            await self.reader.readline()
        await self.reader.readline()
        return body

    async def ended(self) -> bytes:
        """What comes until the server closes; a reset counts as the end."""
        rest = b""
        async with asyncio.timeout(50):
            with contextlib.suppress(ConnectionError):
                while chunk := await self.reader.read(65536):
                    rest += chunk
        return rest


@contextlib.asynccontextmanager
async def connect(server: uvicorn.Server) -> AsyncIterator[RawClient]:
    """A raw connection to the server."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def http_reply(send: Any, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
    """Sends one whole reply over ASGI."""
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    await send({"type": "http.response.body", "body": body})


async def only_connection(server: Any) -> Any:
    """The server's end of the one connection, once it is there."""
    await wait_until(lambda: len(server.server_state.connections) == 1)
    return next(iter(server.server_state.connections))


def header_time_passes(end: Any) -> None:
    """The header's clock of a connection ends, as it would `header_seconds` after it began: where none runs, nothing
    happens. A short time would pass before its bytes come on a busy machine."""
    clock = end._head_timer
    if clock is not None:
        assert 0 < clock.when() - asyncio.get_running_loop().time() <= end.header_seconds
        clock._run()
        clock.cancel()


async def drip(client: RawClient, data: bytes) -> None:
    """Sends byte by byte, slowly."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.02)
