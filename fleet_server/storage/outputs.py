"""Outputs on the local disk: one folder, whole files or none, what was acknowledged survives a power cut."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat as stat_module
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from fleet_server.disk import lasting_folder
from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.storage.names import is_output_name
from fleet_server.storage.part import PART_PREFIX, Part

P = ParamSpec("P")
T = TypeVar("T")

CHUNK_BYTES = 1 << 20
_PIECE_BYTES = 256 << 10
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@dataclass(frozen=True, slots=True)
class OutputLimits:
    """`reserve_bytes` stay free on the disk; files up to `cached_file_bytes` are kept hot within `cache_bytes`."""

    reserve_bytes: int = 256 << 20
    cache_bytes: int = 64 << 20
    cached_file_bytes: int = 8 << 20
    threads: int = 8
    uploads: int = 16
    """Files received at once; further ones wait."""


@dataclass(frozen=True, slots=True)
class OutputStat:
    """A file that is there. `modified_ms` is Unix ms."""

    filename: str
    size_bytes: int
    modified_ms: int


class LocalOutputs:
    """The folder of outputs. Names are judged by `is_output_name`; links and folders inside are as if not there.

    `open()` before use, `aclose()` at the end. Reads are answered from a bounded cache where they can be.
    """

    def __init__(self, root: Path, limits: OutputLimits | None = None) -> None:
        self._root = root
        self._limits = limits or OutputLimits()
        self._threads = ThreadPoolExecutor(self._limits.threads, thread_name_prefix="outputs")
        self._uploads = asyncio.Semaphore(self._limits.uploads)
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._folder = -1

    async def open(self) -> None:
        """Makes the folder if need be and removes what interrupted uploads left there. Raises OSError."""
        self._folder = await self._in_thread(self._prepare)

    async def aclose(self) -> None:
        """Ends the threads; work under way is finished first."""
        await asyncio.to_thread(self._threads.shutdown)
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    async def write(self, filename: str, chunks: AsyncIterator[bytes], *, size: int, sha256: str) -> None:
        """Stores a file; when it returns, bytes and name are on the disk. The same file again is the same file.

        Nothing is left behind on failure. Raises DISK_FULL, and INVALID_FIELD where the bytes are not `size` long or
        do not have the hash `sha256` (lower-case hex).
        """
        _judge(filename)
        small = size <= self._limits.cached_file_bytes
        async with self._uploads:
            part = Part(self._folder)
            try:
                came, rest = await self._receive(part, chunks, size, keep=small)
                await self._in_thread(self._publish, part, filename, sha256, rest)
            except OSError as error:
                await self._in_thread(part.discard)
                if error.errno in _FULL:
                    raise _disk_full() from error
                raise
            except BaseException:
                # A cancelled upload too: the part must not stay.
                await asyncio.shield(self._in_thread(part.discard))
                raise
        self._drop_cached(filename)
        if small:
            self._keep_cached(filename, came[0] if len(came) == 1 else b"".join(came))

    async def take(self, filename: str, chunks: AsyncIterator[bytes]) -> tuple[int, str]:
        """Stores a file of unknown size, whole or not at all; its size and hash. Raises DISK_FULL."""
        _judge(filename)
        async with self._uploads:
            part = Part(self._folder)
            size, waiting, held = 0, list[bytes](), 0
            try:
                async for chunk in chunks:
                    waiting.append(chunk)
                    size, held = size + len(chunk), held + len(chunk)
                    if held >= CHUNK_BYTES:
                        await self._in_thread(self._check_room, held)
                        await self._in_thread(part.append, waiting)
                        waiting, held = [], 0
                await self._in_thread(self._check_room, held)
                return size, await self._in_thread(part.publish, filename, None, waiting)
            except OSError as error:
                await self._in_thread(part.discard)
                if error.errno in _FULL:
                    raise _disk_full() from error
                raise
            except BaseException:
                await asyncio.shield(self._in_thread(part.discard))
                raise

    async def read(self, filename: str) -> bytes | None:
        """The whole file, None if there is none."""
        if not is_output_name(filename):
            return None
        cached = self._cache.get(filename)
        if cached is not None:
            self._cache.move_to_end(filename)
            return cached
        data = await self._in_thread(self._read_all, filename)
        if data is not None:
            self._keep_cached(filename, data)
        return data

    async def size(self, filename: str) -> int | None:
        """How many bytes a file has, None if there is none."""
        cached = self._cache.get(filename)
        if cached is not None:
            return len(cached)
        seen = await self.stat(filename)
        return None if seen is None else seen.size_bytes

    async def stat(self, filename: str) -> OutputStat | None:
        """What is known of a file, None if there is none."""
        if not is_output_name(filename):
            return None
        return await self._in_thread(self._stat, filename)

    async def stream(self, filename: str, start: int = 0, end: int | None = None) -> AsyncGenerator[bytes, None]:
        """Bytes from `start` to before `end` (None: to the end), at most 1 MiB at a time.

        Raises OUTPUT_NOT_FOUND. A file deleted meanwhile is read to its end.
        """
        cached = self._cache.get(filename)
        if cached is not None:
            for at in range(start, len(cached) if end is None else min(end, len(cached)), CHUNK_BYTES):
                stop = at + CHUNK_BYTES if end is None else min(at + CHUNK_BYTES, end)
                yield cached[at:stop]
            return
        file = await self._in_thread(self._open_for_reading, filename) if is_output_name(filename) else None
        if file is None:
            raise FleetError("OUTPUT_NOT_FOUND", f"filename: there is no output {filename!r}")
        try:
            at = start
            while end is None or at < end:
                wanted = CHUNK_BYTES if end is None else min(CHUNK_BYTES, end - at)
                chunk = await self._in_thread(os.pread, file, wanted, at)
                if not chunk:
                    return
                at += len(chunk)
                yield chunk
        finally:
            os.close(file)

    def path(self, filename: str) -> Path:
        """Where a file is, or would be. Raises INVALID_FIELD for what is no name."""
        _judge(filename)
        return self._root / filename

    def keep(self, filename: str, data: bytes) -> None:
        """Keeps bytes that were had from elsewhere hot, as those of a file."""
        if is_output_name(filename):
            self._keep_cached(filename, data)

    def forget(self, filename: str) -> None:
        """Keeps nothing of a file hot."""
        self._drop_cached(filename)

    async def sha256(self, filename: str) -> str | None:
        """The hash of what the disk has, lower-case hex; None if there is no such file. Raises OSError."""
        return await self._in_thread(self._sha256, filename) if is_output_name(filename) else None

    async def listing(self) -> list[OutputStat]:
        """What the folder really holds, newest first; links, folders and what is no name are not there."""
        return await self._in_thread(self._listing)

    async def delete(self, filename: str) -> bool:
        """Removes a file; whether there was one."""
        if not is_output_name(filename):
            return False
        self._drop_cached(filename)
        return await self._in_thread(self._remove, filename)

    def free_bytes(self) -> int:
        """What the disk has left for us."""
        disk = os.fstatvfs(self._folder)
        return disk.f_bavail * disk.f_frsize

    # In the event loop.

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    async def _receive(
        self, part: Part, chunks: AsyncIterator[bytes], size: int, *, keep: bool
    ) -> tuple[list[bytes], list[bytes]]:
        """Everything (where it is to be kept), and the end of it, which is not in `part` yet.

        A large file is hashed and written while more of it comes; of a small one `_publish` does all in one go.
        """
        whole: list[bytes] = []
        waiting: list[bytes] = []
        received = written = 0
        writing: asyncio.Future[None] | None = None
        async for chunk in chunks:
            received += len(chunk)
            if received > size:
                raise invalid_field("chunk", f"more bytes came than the {size} that size_bytes says")
            waiting.append(chunk)
            if keep:
                whole.append(chunk)
            if received - written >= _PIECE_BYTES:
                if writing is None:
                    await self._in_thread(self._check_room, size)
                else:
                    await writing
                writing = asyncio.ensure_future(self._in_thread(part.append, waiting))
                writing.add_done_callback(_seen)
                waiting, written = [], received
        if writing is not None:
            await writing
        if received < size:
            raise invalid_field("chunk", f"fewer bytes came than the {size} that size_bytes says", received)
        return whole, waiting

    def _keep_cached(self, filename: str, data: bytes) -> None:
        if len(data) > min(self._limits.cached_file_bytes, self._limits.cache_bytes):
            return
        self._drop_cached(filename)
        self._cache[filename] = data
        self._cached_bytes += len(data)
        while self._cached_bytes > self._limits.cache_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= len(old)

    def _drop_cached(self, filename: str) -> None:
        self._cached_bytes -= len(self._cache.pop(filename, b""))

    # In a thread.

    def _prepare(self) -> int:
        lasting_folder(self._root)
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for left in self._root.glob(f"{PART_PREFIX}*"):
            left.unlink(missing_ok=True)
        return folder

    def _check_room(self, size: int) -> None:
        if self.free_bytes() < size + self._limits.reserve_bytes:
            raise _disk_full()

    def _publish(self, part: Part, filename: str, sha256: str, rest: list[bytes]) -> None:
        self._check_room(sum(map(len, rest)))
        part.publish(filename, sha256, rest)

    def _remove(self, name: str) -> bool:
        try:
            os.unlink(name, dir_fd=self._folder)
        except (FileNotFoundError, IsADirectoryError):
            return False
        return True

    def _open_for_reading(self, filename: str) -> int | None:
        try:
            file = os.open(filename, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._folder)
        except (FileNotFoundError, PermissionError):
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                return None
            raise
        if not stat_module.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            return None
        return file

    def _read_all(self, filename: str) -> bytes | None:
        file = self._open_for_reading(filename)
        if file is None:
            return None
        with os.fdopen(file, "rb") as stream:
            return stream.read()

    def _sha256(self, filename: str) -> str | None:
        file = self._open_for_reading(filename)
        if file is None:
            return None
        with os.fdopen(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _listing(self) -> list[OutputStat]:
        found = []
        with os.scandir(self._root) as entries:
            for entry in entries:
                if is_output_name(entry.name) and entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        seen = entry.stat(follow_symlinks=False)
                        found.append(OutputStat(entry.name, seen.st_size, seen.st_mtime_ns // 1_000_000))
        return sorted(found, key=lambda one: (one.modified_ms, one.filename), reverse=True)

    def _stat(self, filename: str) -> OutputStat | None:
        file = self._open_for_reading(filename)
        if file is None:
            return None
        try:
            seen = os.fstat(file)
        finally:
            os.close(file)
        return OutputStat(filename, seen.st_size, seen.st_mtime_ns // 1_000_000)


def _seen(writing: asyncio.Future[None]) -> None:
    """A write that fails after the upload has failed is nobody's to hear of."""
    if not writing.cancelled():
        writing.exception()


def _judge(filename: str) -> None:
    if not is_output_name(filename):
        raise invalid_field("filename", "must be letters, digits and . _ -, at most 128, a letter or digit first")


def _disk_full() -> FleetError:
    return FleetError("DISK_FULL", "the server's disk of outputs is full: free some space, then send it again")
