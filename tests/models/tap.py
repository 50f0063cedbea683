"""A TCP relay before an S3 server that counts reads of objects, holds them up, or cuts them."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections import Counter
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_GET = re.compile(rb"^GET (/[^ ?]+\.safetensors)[ ?].*?\r\n(.*?)\r\n\r\n", re.S | re.M)
_RANGE = re.compile(rb"^range: *bytes=(\d+)-(\d*)", re.I | re.M)
_SMALL = 512 << 10
"""Reads of headers ask for less."""


@dataclass
class _Reading:
    """What a connection is asked for now: one may serve many requests."""

    passed: int | None = None
    """Bytes that came of a whole object or its end; None for anything else."""


class Tap:
    """Runs in a thread of its own. `reads` counts GETs of whole objects or of their ends, not of their headers."""

    def __init__(self, target_port: int) -> None:
        self._target = target_port
        self.reads: Counter[str] = Counter()
        self.offsets: list[int] = []
        self.passed = 0
        """Bytes of such reads that came."""
        self.cut_after: int | None = None
        """The next such read is cut after so many bytes, once."""
        self.hold_after: int | None = None
        """Such reads stop after so many bytes while this is set."""
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="tap", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(50)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None and self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(50)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._target)
        reading = _Reading()
        tasks = [
            asyncio.create_task(self._requests(reader, up_writer, reading)),
            asyncio.create_task(self._replies(up_reader, writer, reading)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in (writer, up_writer):
                with contextlib.suppress(OSError):
                    one.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reading: _Reading) -> None:
        while data := await reader.read(1 << 16):
            found = _GET.search(data)
            reading.passed = None
            if found is not None:
                span = _RANGE.search(found[2])
                start, end = (int(span[1]), int(span[2] or 1 << 62)) if span else (0, 1 << 62)
                if end - start >= _SMALL:
                    self.reads[found[1].decode()] += 1
                    self.offsets.append(start)
                    reading.passed = 0
            writer.write(data)
            await writer.drain()

    async def _replies(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, reading: _Reading) -> None:
        while data := await reader.read(1 << 16):
            if reading.passed is not None:
                passed = reading.passed = reading.passed + len(data)
                self.passed += len(data)
                if self.cut_after is not None and passed >= self.cut_after:
                    self.cut_after = None
                    return
                while self.hold_after is not None and passed >= self.hold_after:  # noqa: ASYNC110 - by another thread
                    await asyncio.sleep(0.01)
            writer.write(data)
            await writer.drain()
