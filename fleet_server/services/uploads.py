"""Outputs on their way from an agent to the disk."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator

from fleet.v1.node_pb2 import OutputReceipt, UploadHeader, UploadOutputRequest

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.domain.job import JobRecord, JobState
from fleet_server.services.refusals import forbidden
from fleet_server.storage.outputs import CHUNK_BYTES, LocalOutputs
from fleet_server.store import Store

_EXTENSIONS = {
    "application/json": ".json",
    "application/zip": ".zip",
    "audio/flac": ".flac",
    "audio/mpeg": ".mp3",
    "audio/wav": ".wav",
    "image/gif": ".gif",
    "image/jpeg": ".jpg",
    "image/png": ".png",
    "image/webp": ".webp",
    "text/plain": ".txt",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
}


def output_stem(token: str, index: int) -> str:
    """The name, less its extension, of an attempt's output: the same at each upload, and nobody can guess it."""
    return hashlib.sha256(f"{token}:{index}".encode()).hexdigest()[:32]


def output_name(token: str, index: int, content_type: str) -> str:
    """The filename of an attempt's output; `.bin` for a media type that we do not know."""
    return output_stem(token, index) + _EXTENSIONS.get(content_type.partition(";")[0].strip().lower(), ".bin")


def accepts_output(record: JobRecord | None, token: str) -> bool:
    """Whether a result of the attempt could still be taken: it is current, or was lost while the job waits again."""
    if record is None or not token:
        return False
    if record.state is JobState.RUNNING:
        return record.token == token
    return record.state is JobState.QUEUED and record.last_token == token


class Uploads:
    """Receives outputs. The same one again, at once or later, gives the same receipt."""

    def __init__(self, store: Store, outputs: LocalOutputs) -> None:
        self._store = store
        self._outputs = outputs

    async def receive(self, requests: AsyncIterator[UploadOutputRequest], *, only: str = "") -> OutputReceipt:
        """The receipt, given when the bytes are on the disk. `only` is the node whose attempts these may be, "" for
        any.

        Raises NODE_FORBIDDEN, JOB_ENDED (not the job's attempt any more), JOB_NOT_FOUND, DISK_FULL, INVALID_FIELD (no
        header first, too many, too few or other bytes than it says).
        """
        header = await _header(requests)
        record = await self._store.jobs.get(header.job_id)
        if record is None:
            raise FleetError("JOB_NOT_FOUND", f"job_id: there is no job {header.job_id!r}")
        filename = output_name(header.token, header.index, header.content_type)
        receipt = OutputReceipt(filename=filename, sha256=header.sha256, size_bytes=header.size_bytes)
        if not accepts_output(record, header.token):
            raise FleetError("JOB_ENDED", f"token: not the attempt of job {header.job_id} any more: drop the output")
        if only and record.node_id and record.node_id != only:
            raise forbidden("token: the attempt is another node's: an agent uploads outputs of its own attempts alone")
        await self._outputs.write(filename, _chunks(requests), size=header.size_bytes, sha256=header.sha256)
        return receipt


async def _header(requests: AsyncIterator[UploadOutputRequest]) -> UploadHeader:
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise invalid_field("header", "must be the first message of an upload")


async def _chunks(requests: AsyncIterator[UploadOutputRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if request.WhichOneof("part") != "chunk":
            raise invalid_field("chunk", "must follow the header: one output is one upload")
        if len(request.chunk) > CHUNK_BYTES:
            raise invalid_field("chunk", f"must be at most {CHUNK_BYTES} bytes", len(request.chunk))
        yield request.chunk
