"""Files that attempts read: brought from the server before the engine begins, gone when the attempt is over."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import grpc
import structlog
from fleet.v1 import command_pb2, node_pb2, node_pb2_grpc

from fleet_agent.upload import Metadata

_log = structlog.get_logger("fleet.agent.inputs")
_FIRST_PAUSE = 0.2
_LONGEST_PAUSE = 5.0
_TRIES_OF_BAD_BYTES = 3
Files = dict[str, list[dict[str, str]]]
"""Path and content type of each reference's files, as a task's frame carries them."""


class InputError(Exception):
    """A file cannot be had; `reason` and `retryable` are those of the attempt's end."""

    def __init__(self, reason: str, detail: str, retryable: bool) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.retryable = retryable


class Downloader:
    """Reads files from the server, on the channel of the uploads."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Metadata, timeout_seconds: float) -> None:
        self._files = node_pb2_grpc.NodeStub(channel)
        self._metadata = metadata
        self._timeout = timeout_seconds

    async def file(
        self, reference: str, offset: int = 0, *, etag: str = ""
    ) -> AsyncGenerator[command_pb2.ReadFileResponse, None]:
        """A file that the server has or can get, from a byte on; its size first. Raises grpc.aio.AioRpcError."""
        request = command_pb2.ReadFileRequest(reference=reference, offset=offset, etag=etag)
        call: Any = self._files.ReadFile(request, timeout=self._timeout, metadata=self._metadata)
        try:
            async for part in call:
                yield part
        finally:
            call.cancel()


class Inputs:
    """One folder for each attempt under `folder`. `downloader` gives that of the session, None while there is none."""

    def __init__(self, folder: Path, downloader: Callable[[], Downloader | None]) -> None:
        self._folder = folder
        self._downloader = downloader

    def clear(self) -> None:
        """Forgets what an earlier process left. Blocks."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def fetch(self, token: str, wanted: Sequence[node_pb2.AssignedInput]) -> Files:
        """Brings all files of an attempt, trying again while the server is away. Raises InputError.

        May be cancelled; call `discard` in the end however it goes.
        """
        files: Files = {}
        have: dict[str, Path] = {}
        folder = self._folder / token
        try:
            await asyncio.to_thread(folder.mkdir, 0o700, True, True)
            for one in wanted:
                source = _source(one)
                path = have.get(source)
                if path is None:
                    path = have[source] = folder / str(len(have))
                    await self._bring(one, path)
                file = {"path": str(path), "content_type": one.content_type, "name": one.filename}
                files.setdefault(one.reference, []).append(file)
        except OSError as error:
            raise InputError("DISK_FULL", f"the node cannot keep an input: {error.strerror}", True) from error
        return files

    async def discard(self, token: str) -> None:
        """Removes an attempt's files."""
        await asyncio.to_thread(shutil.rmtree, self._folder / token, True)

    async def _bring(self, one: node_pb2.AssignedInput, path: Path) -> None:
        pause, bad = _FIRST_PAUSE, 0
        while True:
            downloader = self._downloader()
            if downloader is not None:
                try:
                    if await _written(downloader, one, path):
                        return
                    bad += 1
                    if bad == _TRIES_OF_BAD_BYTES:
                        raise InputError("ENGINE_FAILED", f"{one.reference}: its bytes come spoiled", True)
                except grpc.aio.AioRpcError as error:
                    code = error.code()
                    if code is grpc.StatusCode.NOT_FOUND:
                        detail = f"{one.reference}: the file {one.filename} is there no more"
                        raise InputError("INPUT_NOT_FOUND", detail, False) from error
                    _log.warning("an input is asked for again", filename=one.filename, code=code.name)
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, _LONGEST_PAUSE)


def _source(one: node_pb2.AssignedInput) -> str:
    """What the server is asked for; what stands for a job are its outputs."""
    return one.reference if one.reference.startswith(("input:", "s3://")) else f"output:{one.filename}"


async def _written(downloader: Downloader, one: node_pb2.AssignedInput, path: Path) -> bool:
    """Whether the file came as it should. The hash of an object of S3 may be unknown: then its size must do."""
    digest = hashlib.sha256()
    size, whole = 0, one.size_bytes
    async with contextlib.aclosing(downloader.file(_source(one))) as parts:
        stream = await _opened(path)
        try:
            async for part in parts:
                if part.size_bytes and not one.sha256:
                    whole = part.size_bytes
                size += len(part.chunk)
                digest.update(part.chunk)
                if size > whole:
                    return False
                await asyncio.to_thread(stream.write, part.chunk)
        finally:
            await _closed(stream)
    return size == whole and one.sha256 in ("", digest.hexdigest())


async def _opened(path: Path) -> BinaryIO:
    """The file, new. Who is cancelled meanwhile leaves nothing open, and nothing that is made later."""
    opening = asyncio.ensure_future(asyncio.to_thread(_open, path))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        await asyncio.wait([opening])
        if opening.exception() is None:
            opening.result().close()
        raise


async def _closed(stream: BinaryIO) -> None:
    """Closes it, also where its reader is cancelled meanwhile: a thread's work that has not begun is cancelled too."""
    closing = asyncio.ensure_future(asyncio.to_thread(stream.close))
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await asyncio.wait([closing])
        raise


def _open(path: Path) -> BinaryIO:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb")
