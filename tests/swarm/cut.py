"""A wire between an agent and its Docker engine that can be cut at the worst moment."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path


class Wire:
    """Passes all on. With `deaf_to` set, a request that has these bytes reaches the engine, and its reply is lost."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self.deaf_to = b""
        self.passed = 0
        """Requests that had the bytes of `counted`."""
        self.counted = b""
        self._calls: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Somebody connects."""
        call = asyncio.create_task(self._serve(reader, writer))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        # One that is cancelled before it begins closes nothing itself.
        call.add_done_callback(lambda _: writer.close())

    async def cut(self) -> None:
        """Ends all connections."""
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            engine_reader, engine_writer = await asyncio.open_unix_connection(str(self._target))
        except OSError:
            writer.close()
            return
        try:
            async with asyncio.TaskGroup() as group:
                down = group.create_task(self._down(engine_reader, writer))
                group.create_task(self._up(reader, engine_writer, down))
        except* (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            for one in (writer, engine_writer):
                one.close()

    async def _up(self, reader: asyncio.StreamReader, engine: asyncio.StreamWriter, down: asyncio.Task[None]) -> None:
        while data := await reader.read(65_536):
            if self.counted and self.counted in data:
                self.passed += 1
            engine.write(data)
            await engine.drain()
            if self.deaf_to and self.deaf_to in data:
                down.cancel()
                # The rest of the request goes through too, and the engine does what it was asked; nobody hears of it.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        while data := await reader.read(65_536):
                            engine.write(data)
                raise ConnectionResetError
        down.cancel()

    @staticmethod
    async def _down(engine: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await engine.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()


@asynccontextmanager
async def wire(target: Path, path: Path) -> AsyncIterator[Wire]:
    """A socket at `path` that leads to the one at `target`."""
    made = Wire(target)
    server = await asyncio.start_unix_server(made.accept, str(path))
    try:
        yield made
    finally:
        server.close()
        await made.cut()
