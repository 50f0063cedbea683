"""Brings model files from the server: each once however many ask, resumed after a cut, whole or not there at all."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import grpc
import structlog

from fleet_agent.engines.models import BadModelFile, read_header
from fleet_agent.inputs import Downloader
from fleet_agent.model_shelf import BadNameError, FileKey, Kept, ModelShelf, Partial, Source, victims

_log = structlog.get_logger("fleet.agent.models")
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_TRIES_OF_BAD_BYTES = 2
_FINAL = {
    grpc.StatusCode.NOT_FOUND: "it is not in the bucket any more",
    grpc.StatusCode.FAILED_PRECONDITION: "it was replaced in the bucket meanwhile: ask again",
    grpc.StatusCode.INVALID_ARGUMENT: "the server does not take the reference",
    grpc.StatusCode.PERMISSION_DENIED: "this agent's key may not read it",
    grpc.StatusCode.UNAUTHENTICATED: "this agent's key is not known",
    grpc.StatusCode.UNIMPLEMENTED: "the server cannot read files for nodes: install the agent's release",
}
Brought = Literal["present", "downloaded"]


class DownloadError(Exception):
    """A file cannot be had now; `reason` is one of the API's words."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class DownloadSettings:
    """`floor_bytes` of the disk stay free; `budget_bytes` is for all model files together, 0: no bound."""

    budget_bytes: int = 0
    floor_bytes: int = 2 << 30
    evict_any: bool = False
    patience_seconds: float = 600.0
    first_pause_seconds: float = 0.2
    longest_pause_seconds: float = 5.0


@dataclass(slots=True)
class Download:
    """One file on its way."""

    source: Source
    done_bytes: int = 0
    task: asyncio.Task[Brought] | None = None
    partial: Partial | None = field(default=None, repr=False)
    admitted: bool = False
    """There is room for it, and nobody else may have that."""


class ModelDownloads:
    """`in_use` gives what may not go (in memory, wanted by work, pinned), `forget` is told of each file before it goes,
    `arrived` is awaited when a file has come, with its path and hash. `downloader` is that of the session, None while
    there is none.
    """

    def __init__(
        self,
        shelf: ModelShelf,
        settings: DownloadSettings,
        *,
        downloader: Callable[[], Downloader | None],
        in_use: Callable[[], Iterable[FileKey]],
        forget: Callable[[FileKey], None],
        arrived: Callable[[Path, str], Awaitable[None]],
    ) -> None:
        self._shelf = shelf
        self._settings = settings
        self._downloader = downloader
        self._in_use = in_use
        self._forget = forget
        self._arrived = arrived
        self._under_way: dict[FileKey, Download] = {}
        self._room = asyncio.Lock()

    async def open(self) -> None:
        """Tidies up what an earlier process left. A folder that cannot be written to is none that is brought to."""
        with contextlib.suppress(OSError):
            await asyncio.to_thread(self._shelf.open)

    async def aclose(self) -> None:
        """Ends what is under way; it is resumed the next time that it is asked for."""
        tasks = [one.task for one in self._under_way.values() if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def begin(self, source: Source) -> Download:
        """The file's download, which goes on whoever waits for it. Its task raises DownloadError."""
        known = self._under_way.get(source.key)
        if known is not None:
            return known
        download = self._under_way[source.key] = Download(source)
        download.task = asyncio.create_task(self._bring(download), name=f"download {source.name}")
        download.task.add_done_callback(lambda done: self._over(source.key, done))
        return download

    def _over(self, key: FileKey, done: asyncio.Task[Brought]) -> None:
        self._under_way.pop(key, None)
        if not done.cancelled() and (error := done.exception()) is not None:
            _log.warning("a model was not brought", name=key[1], why=str(error))

    async def _bring(self, download: Download) -> Brought:
        source = download.source
        try:
            target = self._shelf.path(source.kind, source.name)
            if await self._present(source, target):
                download.done_bytes = source.size_bytes
                return "present"
            await self._opened(download, target)
        except BadNameError as error:
            raise DownloadError("MODEL_NOT_FOUND", str(error)) from error
        except OSError as error:
            raise _disk(source, error) from error
        partial = download.partial
        if partial is None:
            return "present"
        try:
            await self._make_room(download)
            await self._whole(download, partial)
            await asyncio.to_thread(_judge, partial.path)
            await asyncio.to_thread(partial.publish, target)
        except BadModelFile as error:
            await asyncio.to_thread(partial.discard)
            raise DownloadError("MODEL_NOT_FOUND", f"{source.name} is no model file: {error}") from error
        except OSError as error:
            raise _disk(source, error) from error
        finally:
            await asyncio.shield(asyncio.to_thread(partial.close))
        await self._arrived(target, partial.sha256)
        return "downloaded"

    async def _present(self, source: Source, target: Path) -> bool:
        """Whether the very file is there. Raises DownloadError for another one of that name that is not ours to go."""
        if not await asyncio.to_thread(target.is_file):
            return False
        size = (await asyncio.to_thread(target.stat)).st_size
        note = await asyncio.to_thread(self._shelf.note, target)
        if note is None:
            if size == source.size_bytes:
                return True
            words = f"another file {source.name}, of {size:,} bytes, was put there by hand: remove it first"
            raise DownloadError("NAME_IN_USE", words)
        return size == source.size_bytes and (
            (source.sha256 == note.get("sha256")) if source.sha256 else note.get("etag") in ("", source.etag)
        )

    async def _opened(self, download: Download, target: Path) -> None:
        """The partial file, ours alone; None where another agent on this folder has brought the file meanwhile."""
        partial = self._shelf.partial(download.source)
        while True:
            try:
                await asyncio.to_thread(partial.open)
            except BlockingIOError:
                partial.close()
                await asyncio.sleep(self._settings.longest_pause_seconds)
                if await self._present(download.source, target):
                    return
                continue
            except BaseException:
                await asyncio.shield(asyncio.to_thread(partial.close))
                raise
            download.partial, download.done_bytes = partial, partial.size
            return

    # Room.

    async def _make_room(self, download: Download) -> None:
        """Removes what has not been used for longest until the file fits. Raises DownloadError DISK_FULL."""
        source, settings = download.source, self._settings
        async with self._room:
            kept = await asyncio.to_thread(self._shelf.survey)
            free = await asyncio.to_thread(self._shelf.free_bytes)
            others = [one for one in self._under_way.values() if one.admitted and one is not download]
            total = sum(one.size_bytes for one in kept) + sum(one.source.size_bytes for one in others)
            free -= sum(one.source.size_bytes - one.done_bytes for one in others) - download.done_bytes
            keep = {source.key, *self._in_use(), *self._under_way}
            gone = victims(
                kept,
                source.size_bytes,
                may_go=lambda one: one.key not in keep and (one.brought or settings.evict_any),
                total=total - sum(one.size_bytes for one in kept if one.key == source.key),
                budget=settings.budget_bytes,
                free=free,
                floor=settings.floor_bytes,
            )
            if gone is None:
                raise DownloadError("DISK_FULL", _no_room(source, total, free, settings))
            for one in gone:
                self._forget(one.key)
            for one in gone:
                await self._remove(one, source)
            download.admitted = True

    async def _remove(self, one: Kept, source: Source) -> None:
        _log.info("a model makes room", name=one.name, size_bytes=one.size_bytes, room_for=source.name)
        await asyncio.to_thread(self._shelf.remove, one.path)

    # Bytes.

    async def _whole(self, download: Download, partial: Partial) -> None:
        """Returns when all bytes are there and have the right hash."""
        source = download.source
        for last_try in (*[False] * (_TRIES_OF_BAD_BYTES - 1), True):
            await self._read_on(download, partial)
            if not source.sha256 or partial.sha256 == source.sha256:
                return
            await asyncio.to_thread(partial.restart)
            download.done_bytes = 0
            if last_try:
                raise DownloadError("S3_UNAVAILABLE", f"{source.name}: its bytes do not have the hash {source.sha256}")
            _log.warning("a model came spoiled and is brought again", name=source.name)

    async def _read_on(self, download: Download, partial: Partial) -> None:
        """Reads to the end, again after each loss, while bytes come at all. Raises DownloadError."""
        settings, loop = self._settings, asyncio.get_running_loop()
        pause, heard, why = settings.first_pause_seconds, loop.time(), "the server is not connected"
        while True:
            downloader = self._downloader()
            before = partial.size
            if downloader is not None:
                try:
                    await self._stream(download, partial, downloader)
                    # Only a stream that the server ended itself has all its bytes from one version of the file.
                    if partial.size >= download.source.size_bytes:
                        return
                    why = "the bytes ended early"
                except grpc.aio.AioRpcError as error:
                    if error.code() in _FINAL:
                        raise _refused(download.source, error) from error
                    why = error.details() or error.code().name
            if partial.size > before:
                pause, heard = settings.first_pause_seconds, loop.time()
            elif loop.time() - heard > settings.patience_seconds:
                raise DownloadError("S3_UNAVAILABLE", f"{download.source.name}: no byte came for a long time: {why}")
            await asyncio.sleep(random.uniform(pause / 2, pause))
            pause = min(pause * 2, settings.longest_pause_seconds)

    async def _stream(self, download: Download, partial: Partial, downloader: Downloader) -> None:
        source = download.source
        parts = downloader.file(source.reference, partial.size, etag=source.etag)
        async with contextlib.aclosing(parts):
            first = True
            async for part in parts:
                if first and part.size_bytes != source.size_bytes:
                    raise DownloadError(
                        "S3_UNAVAILABLE",
                        f"{source.name} has {part.size_bytes:,} bytes, not {source.size_bytes:,}: ask again",
                    )
                first = False
                if part.chunk:
                    if partial.size + len(part.chunk) > source.size_bytes:
                        raise DownloadError("S3_UNAVAILABLE", f"{source.name}: more bytes came than it has: ask again")
                    await asyncio.to_thread(partial.write, part.chunk)
                    download.done_bytes = partial.size


def _judge(path: Path) -> None:
    """Raises BadModelFile for what no engine could read."""
    read_header(path)


def _refused(source: Source, error: grpc.aio.AioRpcError) -> DownloadError:
    reason = "MODEL_NOT_FOUND" if error.code() is grpc.StatusCode.NOT_FOUND else "S3_UNAVAILABLE"
    return DownloadError(reason, f"{source.name}: {_FINAL[error.code()]} ({error.details()})")


def _disk(source: Source, error: OSError) -> DownloadError:
    return DownloadError("DISK_FULL", f"{source.name} cannot be kept on this node: {error.strerror or error}")


def _no_room(source: Source, total: int, free: int, settings: DownloadSettings) -> str:
    budget = f"a budget of {settings.budget_bytes:,} bytes, {total:,} taken; " if settings.budget_bytes else ""
    return (
        f"{source.name} needs {source.size_bytes:,} bytes: {budget}{free:,} are free on the disk, of which "
        f"{settings.floor_bytes:,} stay free. What is in use, pinned or put there by hand does not make room"
    )
