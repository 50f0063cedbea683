"""A unix-socket proxy that can cut, hold or count what passes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

Rule = Callable[[bytes], bool]


class Proxy:
    """Between a client and the server's socket. `cut_after` drops the connection once a matching request was sent."""

    def __init__(self, upstream: Path, path: Path) -> None:
        self.path = path
        self.connections = 0
        self.cuts = 0
        self.down = False
        self.gate = asyncio.Event()
        self.gate.set()
        self._upstream = upstream
        self._rule: Rule | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    def cut_after(self, rule: Rule, *, times: int = 1) -> None:
        """The next `times` requests that match reach the server, and their replies reach nobody."""
        left = times

        def once(data: bytes) -> bool:
            nonlocal left
            if left > 0 and rule(data):
                left -= 1
                return True
            return False

        self._rule = once

    def drop_all(self) -> None:
        """Ends every connection now."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.down:
            writer.close()
            return
        up_reader, up_writer = await asyncio.open_unix_connection(str(self._upstream))
        self._writers |= {writer, up_writer}
        silent = asyncio.Event()

        async def requests() -> None:
            while data := await reader.read(1 << 20):
                if self._rule is not None and self._rule(data):
                    silent.set()
                    self.cuts += 1
                up_writer.write(data)
                await up_writer.drain()

        async def replies() -> None:
            while data := await up_reader.read(1 << 20):
                if silent.is_set():
                    return
                await self.gate.wait()
                writer.write(data)
                await writer.drain()

        try:
            await self._first(requests, replies)
        finally:
            for one in (writer, up_writer):
                self._writers.discard(one)
                one.transport.abort()

    @staticmethod
    async def _first(*ways: Callable[[], Awaitable[None]]) -> None:
        tasks = [asyncio.ensure_future(way()) for way in ways]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def proxied(upstream: Path, path: Path) -> AsyncIterator[Proxy]:
    """A running proxy on a socket of its own."""
    proxy = Proxy(upstream, path)
    running: set[asyncio.Task[None]] = set()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        running.add(task)
        try:
            await proxy.serve(reader, writer)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            running.discard(task)

    server = await asyncio.start_unix_server(accept, path=str(path))
    try:
        yield proxy
    finally:
        server.close()
        proxy.drop_all()
        for task in list(running):
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
