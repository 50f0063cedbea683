"""Ends without files, on the disk with one fsync for all that came meanwhile.

One file of records, each `crc32 | kind | length | bytes`: an end (an encoded fleet.v1.JobComplete), or a token whose
end is settled. A record torn by a crash ends the file. Forgetting is not fsynced: what comes back after a crash is said
again, and the server knows it already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from fleet.v1 import node_pb2
from google.protobuf.message import DecodeError

from fleet_agent.disk import sync_folder

_HEAD = struct.Struct(">IBI")
_KEPT, _FORGOTTEN = 1, 2
_TIDY_BYTES = 4 << 20
"""From here on the file is written anew with what is still waited for."""


class Journal:
    """The file. `open` first; `add` and `forget` belong to one loop."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._opening = asyncio.Lock()
        self._size = 0
        self._tidy_at = _TIDY_BYTES
        self._kept: dict[str, bytes] = {}
        self._waiting: list[tuple[bytes, asyncio.Future[None]]] = []
        self._unsaid: list[bytes] = []
        self._flusher: asyncio.Task[None] | None = None

    def open(self) -> list[node_pb2.JobComplete]:
        """What is kept, oldest first. Blocks. Raises OSError."""
        if self._fd >= 0:
            return [node_pb2.JobComplete.FromString(data) for data in self._kept.values()]
        if not self._path.exists():
            return []
        return self._open()

    def _open(self) -> list[node_pb2.JobComplete]:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(os.dup(fd), "rb") as file:
                data = file.read()
            found, self._size = _read(data)
            self._kept = {one.token: one.SerializeToString() for one in found}
            os.ftruncate(fd, self._size)
            sync_folder(self._path.parent)
        except BaseException:
            os.close(fd)
            raise
        # Last of all, for it says that the file may be written: what came earlier would be cut off.
        self._fd = fd
        return found

    def __contains__(self, token: str) -> bool:
        return token in self._kept

    async def add(self, complete: node_pb2.JobComplete) -> None:
        """Returns when the end is on the disk. Raises OSError, nothing being kept then."""
        if self._fd < 0:
            # Once: a second reading would cut off what was written after it.
            async with self._opening:
                if self._fd < 0:
                    await asyncio.to_thread(self._open)
        token, data = complete.token, complete.SerializeToString()
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((_record(_KEPT, data), done))
        self._kept[token] = data
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush(), name="journal")
        try:
            await done
        except BaseException:
            self.forget(token)
            raise

    def forget(self, token: str) -> None:
        """The end is settled. Never waits."""
        if self._kept.pop(token, None) is not None:
            self._unsaid.append(_record(_FORGOTTEN, token.encode()))

    async def aclose(self) -> None:
        """Writes what waits, and closes the file."""
        if self._flusher is not None:
            await asyncio.wait([self._flusher])
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):
                _write_all(fd, b"".join(self._unsaid), self._size)
            os.close(fd)

    async def _flush(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            # What is forgotten comes first: a token may be kept anew after it.
            data = b"".join([*self._unsaid, *(record for record, _ in batch)])
            self._unsaid = []
            write: Callable[[bytes], None] = self._append
            if self._size + len(data) > self._tidy_at:
                # What is being added is among what is kept.
                write, data = self._anew, b"".join(_record(_KEPT, one) for one in self._kept.values())
            try:
                await asyncio.to_thread(write, data)
            except OSError as error:
                for _, done in batch:
                    if not done.done():
                        done.set_exception(OSError(error.errno, error.strerror))
                continue
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    def _append(self, data: bytes) -> None:
        try:
            _write_all(self._fd, data, self._size)
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(data)

    def _anew(self, live: bytes) -> None:
        """A new file with these records in the old one's place."""
        aside = self._path.with_suffix(".new")
        fd = os.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, live, 0)
            os.fsync(fd)
            aside.replace(self._path)
            sync_folder(self._path.parent)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._size = fd, len(live)
        self._tidy_at = max(_TIDY_BYTES, 2 * len(live))


def _record(kind: int, data: bytes) -> bytes:
    return _HEAD.pack(zlib.crc32(data, kind), kind, len(data)) + data


def _write_all(fd: int, data: bytes, at: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, memoryview(data)[done:], at + done)


def _read(data: bytes) -> tuple[list[node_pb2.JobComplete], int]:
    """The ends that are kept, and how far the records are whole."""
    found: dict[str, node_pb2.JobComplete] = {}
    at = 0
    while at + _HEAD.size <= len(data):
        crc, kind, length = _HEAD.unpack_from(data, at)
        body = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(body) < length or kind not in (_KEPT, _FORGOTTEN) or zlib.crc32(body, kind) != crc:
            break
        if kind == _FORGOTTEN:
            found.pop(body.decode(errors="replace"), None)
        else:
            try:
                complete = node_pb2.JobComplete.FromString(body)
            except DecodeError:
                break
            found[complete.token] = complete
        at += _HEAD.size + length
    return list(found.values()), at
