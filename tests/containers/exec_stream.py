"""A program that a test is connected to over gRPC."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from fleet.v1 import fleet_pb2

Frame = fleet_pb2.ExecStreamRequest
SECONDS = 100.0


async def ended(call: Any) -> tuple[bytes, bytes, int]:
    """What a program still says, and its exit code."""
    out, err, code = b"", b"", -1
    while (frame := await call.read()) is not grpc.aio.EOF:
        out += frame.stdout
        err += frame.stderr
        if frame.HasField("exit"):
            code = frame.exit.exit_code
    return out, err, code


class Typist:
    """Somebody at a terminal: types lines, and reads on until words are seen.

    A terminal shows what is typed too: words that are waited for must not stand in the line that asks for them.
    """

    def __init__(self, stub: Any, node_id: str, command: str, **fields: Any) -> None:
        self._call = stub.ExecStream()
        self._first: Frame | None = Frame(node_id=node_id, start=fleet_pb2.ExecStart(command=command, **fields))
        self._seen = b""

    async def types(self, line: str, *, before: str = "") -> None:
        """A line; `before` it what needs no end of a line."""
        await self._write(Frame(stdin=f"{before}{line}\n".encode()))

    async def resize(self, rows: int, columns: int) -> None:
        """The window is another one."""
        await self._write(Frame(resize=fleet_pb2.TerminalSize(rows=rows, columns=columns)))

    async def sees(self, words: str) -> None:
        """Reads to these words."""
        wanted = words.encode()
        try:
            async with asyncio.timeout(SECONDS):
                while wanted not in self._seen:
                    frame = await self._call.read()
                    assert frame is not grpc.aio.EOF, self._seen
                    self._seen += frame.stdout
        except TimeoutError:
            raise AssertionError(f"{words!r} did not come, but {self._seen!r}") from None
        self._seen = self._seen.partition(wanted)[2]

    async def exit_code(self) -> int:
        """How it ends."""
        return (await ended(self._call))[2]

    async def _write(self, frame: Frame) -> None:
        if self._first is not None:
            first, self._first = self._first, None
            await self._call.write(first)
        await self._call.write(frame)
