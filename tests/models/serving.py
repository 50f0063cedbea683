"""Node.ReadFile over real gRPC, for agents that bring files; the test says what goes wrong."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from fleet.v1 import command_pb2

from fleet_agent.inputs import Downloader

CHUNK = 64 << 10
Context = grpc.aio.ServicerContext[Any, Any]


@dataclass
class FileServer:
    """Serves `files` by reference. A read ends early, as UNAVAILABLE, after the next number of bytes in `cuts`."""

    files: dict[str, bytes] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    refusals: list[grpc.StatusCode] = field(default_factory=list)
    reads: list[tuple[str, int]] = field(default_factory=list)
    served: int = 0
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    hold_after: int = 1 << 62
    """After so many bytes of a read the gate must be open."""
    _server: grpc.aio.Server | None = None
    _channel: grpc.aio.Channel | None = None

    async def start(self) -> Downloader:
        server = self._server = grpc.aio.server()
        handler = grpc.unary_stream_rpc_method_handler(
            self.ReadFile, command_pb2.ReadFileRequest.FromString, command_pb2.ReadFileResponse.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("fleet.v1.Node", {"ReadFile": handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        return Downloader(self._channel, (), 30)

    async def stop(self) -> None:
        if self._channel is not None:
            await self._channel.close()
        if self._server is not None:
            await self._server.stop(None)

    async def ReadFile(self, request: command_pb2.ReadFileRequest, context: Context) -> AsyncIterator[Any]:
        self.reads.append((request.reference, request.offset))
        if self.refusals:
            await context.abort(self.refusals.pop(0), "refused by the script")
        data = self.files.get(request.reference)
        if data is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        assert data is not None
        yield command_pb2.ReadFileResponse(size_bytes=len(data))
        cut = self.cuts.pop(0) if self.cuts else 1 << 62
        sent = 0
        for at in range(request.offset, len(data), CHUNK):
            if sent >= self.hold_after:
                await self.gate.wait()
            chunk = data[at : at + CHUNK]
            sent += len(chunk)
            self.served += len(chunk)
            yield command_pb2.ReadFileResponse(chunk=chunk)
            if sent >= cut:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "cut by the script")
