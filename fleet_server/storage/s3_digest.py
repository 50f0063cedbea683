"""Hashes of a file while it is read once: its SHA-256, and the ETag that a server computes over the same bytes."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from typing import BinaryIO


class Digest:
    """Takes the bytes in order. `part_bytes`: the size of a part, should the object be put in parts."""

    def __init__(self, part_bytes: int) -> None:
        self._part_bytes = part_bytes
        self._sha256 = hashlib.sha256()
        self._part = hashlib.md5(usedforsecurity=False)
        self._parts: list[bytes] = []
        self._in_part = 0
        self.size = 0

    def update(self, data: bytes) -> None:
        """The next bytes."""
        self._sha256.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view:
            if self._in_part == self._part_bytes:
                self._parts.append(self._part.digest())
                self._part = hashlib.md5(usedforsecurity=False)
                self._in_part = 0
            piece = view[: self._part_bytes - self._in_part]
            self._part.update(piece)
            self._in_part += len(piece)
            view = view[len(piece) :]

    @property
    def sha256(self) -> str:
        """Lower-case hex."""
        return self._sha256.hexdigest()

    @property
    def sha256_base64(self) -> str:
        """As S3 writes it in `x-amz-checksum-sha256`."""
        return base64.b64encode(self._sha256.digest()).decode()

    def etag(self) -> str:
        """Of these bytes put as one, or in parts where they are more than one part."""
        if not self._parts:
            return self._part.hexdigest()
        parts = [*self._parts, self._part.digest()]
        return f"{hashlib.md5(b''.join(parts), usedforsecurity=False).hexdigest()}-{len(parts)}"


class HashingReader:
    """A file that is hashed while somebody else reads it; `check` is called before each read and may raise."""

    def __init__(self, file: BinaryIO, digest: Digest, check: Callable[[], None]) -> None:
        self._file = file
        self._digest = digest
        self._check = check

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        self._check()
        data = self._file.read(size)
        self._digest.update(data)
        return data
