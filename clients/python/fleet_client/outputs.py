"""What both clients can do with outputs as a whole, and with files that payloads name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from fleet_client import calls
from fleet_client.calls import Json, segment

SWEEP_SECONDS = 3610.0
"""A sync, cleanup or move, or an upload, may take an hour."""
_CHUNK_BYTES = 1 << 20
_SYNC, _CLEANUP, _MOVE = "/api/outputs/sync", "/api/outputs/cleanup", "/api/outputs/move-all-to-s3"


def _output(filename: str, call: str = "") -> str:
    return f"/api/vision/outputs/{segment(filename)}{call}"


def _cleanup(max_age_hours: float | None, dry_run: bool, request_id: str | None) -> Json:
    return calls.given({"max_age_hours": max_age_hours, "dry_run": dry_run or None, "request_id": request_id})


def _upload(file: Path | bytes, filename: str | None, content_type: str | None) -> Json:
    name = filename if filename is not None else file.name if isinstance(file, Path) else ""
    size = file.stat().st_size if isinstance(file, Path) else len(file)
    headers = {"content-type": content_type or calls.media_type(name), "content-length": str(size)}
    return {"params": {"filename": name}, "headers": headers, "timeout": calls.timeout(SWEEP_SECONDS)}


def _chunks(file: Path | bytes) -> Iterator[bytes]:
    if isinstance(file, bytes):
        yield file
        return
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk


async def _chunks_later(file: Path | bytes) -> AsyncIterator[bytes]:
    if isinstance(file, bytes):
        yield file
        return
    stream = await asyncio.to_thread(file.open, "rb")
    try:
        while chunk := await asyncio.to_thread(stream.read, _CHUNK_BYTES):
            yield chunk
    finally:
        stream.close()


class OutputCalls:
    """Part of the blocking client."""

    _json: Callable[..., Json]

    def output_stats(self) -> Json:
        """How many outputs are on the server's disk, in S3, and still to be copied; what keeps failing."""
        return self._json("GET", "/api/outputs/stats")

    def list_outputs(self, source: str = "s3", **filters: Any) -> Json:
        """A page of what the bucket (source `s3`) or the server's folder (`local`) really holds, newest first:
        `outputs` and `next_page_token`."""
        return self._json("GET", "/api/outputs/list", params=calls.given({"source": source, **filters}))

    def sync_outputs(self, request_id: str | None = None) -> Json:
        """Copy outputs to S3 now; what was done."""
        params = calls.given({"request_id": request_id})
        return self._json("POST", _SYNC, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    def cleanup_outputs(
        self, max_age_hours: float | None = None, dry_run: bool = False, request_id: str | None = None
    ) -> Json:
        """Remove local files older than that (24 hours) which S3 verifiably has; what was, or would be, done."""
        params = _cleanup(max_age_hours, dry_run, request_id)
        return self._json("POST", _CLEANUP, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    def move_outputs(self, request_id: str | None = None) -> Json:
        """Copy all outputs to S3, then remove the local files that it verifiably has; what was done."""
        params = calls.given({"request_id": request_id})
        return self._json("POST", _MOVE, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    def star_output(self, filename: str, starred: bool = True) -> Json:
        """Give an output a star, or take it away; the output."""
        return self._json("PATCH", _output(filename), json={"starred": starred})

    def rerun_output(self, filename: str, priority: str = "normal", request_id: str | None = None) -> Json:
        """Make an output again from its record, seed included; the receipt."""
        body = calls.given({"priority": priority, "request_id": request_id})
        return self._json("POST", _output(filename, "/rerun"), json=body)

    def upload_input(self, file: Path | bytes, filename: str | None = None, content_type: str | None = None) -> Json:
        """Bring a file (a path, or bytes) for payloads to name; its `reference` is good until `expire_time`."""
        return self._json("POST", "/api/inputs", content=_chunks(file), **_upload(file, filename, content_type))


class AsyncOutputCalls:
    """Part of the asyncio client."""

    _json: Callable[..., Awaitable[Json]]

    async def output_stats(self) -> Json:
        """How many outputs are on the server's disk, in S3, and still to be copied; what keeps failing."""
        return await self._json("GET", "/api/outputs/stats")

    async def list_outputs(self, source: str = "s3", **filters: Any) -> Json:
        """A page of what the bucket (source `s3`) or the server's folder (`local`) really holds, newest first:
        `outputs` and `next_page_token`."""
        return await self._json("GET", "/api/outputs/list", params=calls.given({"source": source, **filters}))

    async def sync_outputs(self, request_id: str | None = None) -> Json:
        """Copy outputs to S3 now; what was done."""
        params = calls.given({"request_id": request_id})
        return await self._json("POST", _SYNC, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    async def cleanup_outputs(
        self, max_age_hours: float | None = None, dry_run: bool = False, request_id: str | None = None
    ) -> Json:
        """Remove local files older than that (24 hours) which S3 verifiably has; what was, or would be, done."""
        params = _cleanup(max_age_hours, dry_run, request_id)
        return await self._json("POST", _CLEANUP, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    async def move_outputs(self, request_id: str | None = None) -> Json:
        """Copy all outputs to S3, then remove the local files that it verifiably has; what was done."""
        params = calls.given({"request_id": request_id})
        return await self._json("POST", _MOVE, params=params, timeout=calls.timeout(SWEEP_SECONDS))

    async def star_output(self, filename: str, starred: bool = True) -> Json:
        """Give an output a star, or take it away; the output."""
        return await self._json("PATCH", _output(filename), json={"starred": starred})

    async def rerun_output(self, filename: str, priority: str = "normal", request_id: str | None = None) -> Json:
        """Make an output again from its record, seed included; the receipt."""
        body = calls.given({"priority": priority, "request_id": request_id})
        return await self._json("POST", _output(filename, "/rerun"), json=body)

    async def upload_input(
        self, file: Path | bytes, filename: str | None = None, content_type: str | None = None
    ) -> Json:
        """Bring a file (a path, or bytes) for payloads to name; its `reference` is good until `expire_time`."""
        return await self._json(
            "POST", "/api/inputs", content=_chunks_later(file), **_upload(file, filename, content_type)
        )
