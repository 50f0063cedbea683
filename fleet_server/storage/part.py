"""A file on its way into a folder: hidden until it is whole and on the disk."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterable

from fleet_server.domain.errors import invalid_field

PART_PREFIX = ".part-"


class Part:
    """Bytes of one file. Its methods block: call them in threads; they may be called in several, one waits for another.

    `append` as often as need be, then `publish`; or `discard`, after which the others do nothing.
    """

    def __init__(self, folder: int) -> None:
        self._folder = folder
        self._name = f"{PART_PREFIX}{secrets.token_hex(8)}"
        self._file = -1
        self._digest = hashlib.sha256()
        self._discarded = False
        self._lock = threading.Lock()

    def append(self, chunks: Iterable[bytes]) -> None:
        """Hashes and writes. Raises OSError."""
        with self._lock:
            self._append(chunks)

    def publish(self, filename: str, sha256: str | None, rest: Iterable[bytes]) -> str:
        """Writes the rest and gives the file its name; bytes and name are on the disk when this returns, with the hash.

        Raises INVALID_FIELD where the hash is not `sha256` (None: any will do), OSError.
        """
        with self._lock:
            self._append(rest)
            digest = self._digest.hexdigest()
            if self._discarded:
                return digest
            if sha256 is not None and digest != sha256:
                raise invalid_field("sha256", "the bytes that came have another hash: send the file again")
            os.fsync(self._file)
            os.rename(self._name, filename, src_dir_fd=self._folder, dst_dir_fd=self._folder)
            self._close()
            os.fsync(self._folder)
            return digest

    def discard(self) -> None:
        """Leaves nothing behind, but for what has its name already."""
        with self._lock:
            self._discarded = True
            if self._file >= 0:
                self._close()
                os.unlink(self._name, dir_fd=self._folder)

    def _append(self, chunks: Iterable[bytes]) -> None:
        if self._discarded:
            return
        if self._file < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._file = os.open(self._name, flags, 0o644, dir_fd=self._folder)
        for chunk in chunks:
            self._digest.update(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(self._file, view) :]

    def _close(self) -> None:
        os.close(self._file)
        self._file = -1
