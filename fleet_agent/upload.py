"""Sends spooled outputs to the server, on a channel of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
from fleet.v1 import node_pb2, node_pb2_grpc

from fleet_agent.spool import SpooledFile, SpoolEntry

_CHUNK_BYTES = 256 << 10
Metadata = tuple[tuple[str, str], ...]


class Uploader:
    """`upload` sends one file; the same file again gives the same receipt. At most `limit` at once."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, timeout_seconds: float, limit: int = 4) -> None:
        self._stub = node_pb2_grpc.NodeStub(channel)
        self._metadata = metadata
        self._timeout = timeout_seconds
        self._slots = asyncio.Semaphore(limit)

    async def upload(self, entry: SpoolEntry, index: int) -> node_pb2.OutputReceipt:
        """Sends the file of that place; raises grpc.aio.AioRpcError where the server does not take it."""
        file = entry.files[index]
        header = node_pb2.UploadHeader(
            job_id=entry.complete.job_id,
            token=entry.token,
            index=index,
            content_type=file.content_type,
            size_bytes=file.size_bytes,
            sha256=file.sha256,
        )
        async with self._slots:
            # stubs of the sync and the aio API share one class; the aio channel makes this an aio call
            call = self._stub.UploadOutput(_parts(entry, file, header), timeout=self._timeout, metadata=self._metadata)
            reply: node_pb2.UploadOutputResponse = await call
        return reply.receipt


async def _parts(
    entry: SpoolEntry, file: SpooledFile, header: node_pb2.UploadHeader
) -> AsyncIterator[node_pb2.UploadOutputRequest]:
    yield node_pb2.UploadOutputRequest(header=header)
    stream = await asyncio.to_thread((entry.folder / file.name).open, "rb")
    try:
        while chunk := await asyncio.to_thread(stream.read, _CHUNK_BYTES):
            yield node_pb2.UploadOutputRequest(chunk=chunk)
    finally:
        stream.close()
