"""Outputs on the local disk: one folder, whole files or none, what was acknowledged survives a power cut."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import stat as stat_module
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from fleet_server.domain.errors import FleetError, invalid_field
from fleet_server.storage.names import is_output_name

P = ParamSpec("P")
T = TypeVar("T")

CHUNK_BYTES = 1 << 20
_PART_PREFIX = ".part-"
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
        async with self._uploads:
            if await self._in_thread(self.free_bytes) < size + self._limits.reserve_bytes:
                raise _disk_full()
            part = f"{_PART_PREFIX}{secrets.token_hex(8)}"
            try:
                whole = await self._receive(part, chunks, size, sha256)
                await self._in_thread(self._publish, part, filename)
            except OSError as error:
                await self._in_thread(self._remove, part)
                if error.errno in _FULL:
                    raise _disk_full() from error
                raise
            except BaseException:
                # A cancelled upload too: the part must not stay.
                await asyncio.shield(self._in_thread(self._remove, part))
                raise
        self._drop_cached(filename)
        if whole is not None:
            self._keep_cached(filename, whole)

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

    async def stat(self, filename: str) -> OutputStat | None:
        """What is known of a file, None if there is none."""
        if not is_output_name(filename):
            return None
        return await self._in_thread(self._stat, filename)

    async def stream(self, filename: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
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

    async def _receive(self, part: str, chunks: AsyncIterator[bytes], size: int, sha256: str) -> bytes | None:
        """Receives into `part`; the whole where it is small enough to keep. Small files cost one step on the disk."""
        digest = hashlib.sha256()
        waiting = bytearray()
        received = 0
        small = size <= self._limits.cached_file_bytes
        async for chunk in chunks:
            received += len(chunk)
            if received > size:
                raise invalid_field("chunk", f"more bytes came than the {size} that size_bytes says")
            waiting += chunk
            if not small and len(waiting) >= CHUNK_BYTES:
                await self._in_thread(self._append, part, bytes(waiting), digest.update)
                waiting.clear()
        if received < size:
            raise invalid_field("chunk", f"fewer bytes came than the {size} that size_bytes says", received)
        rest = bytes(waiting)
        await self._in_thread(self._append, part, rest, digest.update)
        if digest.hexdigest() != sha256:
            raise invalid_field("sha256", "the bytes that came have another hash: send the file again")
        return rest if small else None

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
        self._root.mkdir(parents=True, exist_ok=True)
        folder = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for left in self._root.glob(f"{_PART_PREFIX}*"):
            left.unlink(missing_ok=True)
        return folder

    def _append(self, part: str, data: bytes, hashed: Callable[[bytes], None]) -> None:
        hashed(data)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(part, flags, 0o644, dir_fd=self._folder)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(file, view) :]
        finally:
            os.close(file)

    def _publish(self, part: str, filename: str) -> None:
        file = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
        try:
            os.fsync(file)
        finally:
            os.close(file)
        os.rename(part, filename, src_dir_fd=self._folder, dst_dir_fd=self._folder)
        os.fsync(self._folder)

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

    def _stat(self, filename: str) -> OutputStat | None:
        file = self._open_for_reading(filename)
        if file is None:
            return None
        try:
            seen = os.fstat(file)
        finally:
            os.close(file)
        return OutputStat(filename, seen.st_size, seen.st_mtime_ns // 1_000_000)


def _judge(filename: str) -> None:
    if not is_output_name(filename):
        raise invalid_field("filename", "must be letters, digits and . _ -, at most 128, a letter or digit first")


def _disk_full() -> FleetError:
    return FleetError("DISK_FULL", "the server's disk of outputs is full: free some space, then send it again")
