"""Sends spooled outputs to the server, on a channel of their own."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, BinaryIO

import grpc
from fleet.v1 import node_pb2, node_pb2_grpc

from fleet_agent.spool import SpoolEntry

_CHUNK_BYTES = 1 << 20
_PATIENCE_SECONDS = 0.5
Metadata = tuple[tuple[str, str], ...]


class Uploader:
    """`upload` sends one file; the same file again gives the same receipt. At most `limit` at once."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, timeout_seconds: float, limit: int = 4) -> None:
        self._stub = node_pb2_grpc.NodeStub(channel)
        self._metadata = metadata
        self._timeout = timeout_seconds
        self._slots = asyncio.Semaphore(limit)

    async def upload(self, entry: SpoolEntry, index: int, *, patient: bool = False) -> node_pb2.OutputReceipt:
        """Sends the file of that place.

        Raises grpc.aio.AioRpcError where the server does not take it, OSError where it cannot be read. A call that is
        refused while a chunk is being written may fail as INTERNAL, its true status lost in grpc.aio; `patient` waits
        a moment after the header, so that a refusal is heard as what it is.
        """
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
            stream = await _opened(entry.folder / file.name)
            # stubs of the sync and the aio API share one class; the aio channel makes this an aio call
            call: Any = self._stub.UploadOutput(timeout=self._timeout, metadata=self._metadata)
            try:
                try:
                    await call.write(node_pb2.UploadOutputRequest(header=header))
                    if patient:
                        await _refused(call)
                    while chunk := await asyncio.to_thread(stream.read, _CHUNK_BYTES):
                        await call.write(node_pb2.UploadOutputRequest(chunk=chunk))
                    await call.done_writing()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    # The server has ended the call, perhaps with a receipt: it knows the file. Its status follows.
                    pass
                reply: node_pb2.UploadOutputResponse = await call
            finally:
                call.cancel()
                stream.close()
        return reply.receipt


async def _opened(path: Path) -> BinaryIO:
    """The file for reading. One that a thread has opened by the time its caller is cancelled is closed again."""
    opening: asyncio.Future[BinaryIO] = asyncio.ensure_future(asyncio.to_thread(path.open, "rb"))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(opened: asyncio.Future[BinaryIO]) -> None:
    if opened.exception() is None:
        opened.result().close()


async def _refused(call: Any) -> None:
    """Waits a moment for the call's end."""
    code = asyncio.ensure_future(call.code())
    try:
        await asyncio.wait({code}, timeout=_PATIENCE_SECONDS)
    finally:
        code.cancel()
